"""What every tagger shares: sizes, the loss, the crops of a clip and their scores.

A tagger is model(audio (batch, time) float, full scale [-1, 1]) -> logits (batch, n_class). `time` is one second in
training; a clip's score is the mean over its one-second crops, as with the baselines of FSD50K (Fonseca et al.,
"FSD50K: an open dataset of human-labeled sound events", arXiv 2010.00475).
"""

import operator
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiomodels.audio import check_sample_rate
from audiomodels.pretrained import Pretrained


@dataclass(frozen=True)
class TaggerConfig:
    """What a tagger hears and what it answers. Errors: TypeError, ValueError naming the field, the rule, what came."""

    n_class: int = 200  # labels
    labels: tuple[str, ...] = ()  # their names, in the order of the outputs; or none
    sample_rate: int = 16000  # of the audio
    output: Literal["sigmoid", "softmax"] = "sigmoid"  # any number of labels a clip, or one
    loss: Literal["bce", "huber"] = "bce"  # cross-entropy (binary for sigmoid), or Huber's on the probabilities

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                raise ValueError(f"{field.name} must be one of {get_args(field.type)}, got {value!r}")
            if field.type is int:
                try:
                    object.__setattr__(self, field.name, operator.index(value))  # numpy's and torch's integers too
                except TypeError:
                    raise TypeError(f"{field.name} must be an int, got {value!r}") from None
        check_sample_rate(self.sample_rate)
        if not 1 <= self.n_class <= 100_000:
            raise ValueError(f"n_class must be 1 .. 100000, got {self.n_class}")
        if not all(isinstance(name, str) for name in self.labels):
            raise TypeError(f"labels must be texts, got {self.labels[:3]!r}")
        if self.labels and len(self.labels) != self.n_class:
            raise ValueError(f"labels must be n_class = {self.n_class} names or none, got {len(self.labels)}")


class Tagger(nn.Module, Pretrained):
    """Base of the taggers: a subclass sets `config` and has forward(audio) -> logits."""

    config: TaggerConfig

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits (..., n_class) -> float32 in [0, 1], as config.output says."""
        logits = logits.float()
        return logits.sigmoid() if self.config.output == "sigmoid" else logits.softmax(-1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss, in nats for "bce", of logits (batch, n_class) against labels (batch, n_class) of 0 and 1.

        With softmax the labels of a clip share its probability evenly, and "bce" is the categorical cross-entropy.
        """
        logits, labels = logits.float(), labels.to(logits.device, torch.float32)
        if self.config.output == "softmax":
            labels = labels / labels.sum(-1, keepdim=True).clamp(min=1)
        if self.config.loss == "huber":
            return F.huber_loss(self.probabilities(logits), labels)
        if self.config.output == "softmax":
            return F.cross_entropy(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)

    @torch.no_grad()
    def score(self, crops: Tensor, *, batch: int = 64) -> Tensor:
        """Probabilities (n, n_class), on the CPU, of crops (n, samples), in evaluation mode."""
        device, was_training = next(self.parameters()).device, self.training
        self.eval()
        try:
            return torch.cat([self.probabilities(self(part.to(device))).cpu() for part in crops.split(batch)])
        finally:
            self.train(was_training)


def seconds_of(audio: Tensor, sample_rate: int, hop: float = 0.5) -> list[Tensor]:
    """Crops (sample_rate,) of audio (time,): one every `hop` seconds, the last one at the end; less is repeated."""
    if audio.ndim != 1 or not len(audio):
        raise ValueError(f"audio must have shape (time,) with time > 0, got {tuple(audio.shape)}")
    if not hop > 0:
        raise ValueError(f"hop must be positive, got {hop}")
    if len(audio) < sample_rate:
        return [audio.repeat(-(-sample_rate // len(audio)))[:sample_rate]]
    last = len(audio) - sample_rate
    starts = [*range(0, last, max(1, round(hop * sample_rate))), last]
    return [audio[start : start + sample_rate] for start in starts]


def check_audio(audio: Tensor) -> None:
    """Raise TypeError or ValueError unless audio is floating point (batch, time)."""
    if not isinstance(audio, Tensor) or not audio.is_floating_point():
        came = audio.dtype if isinstance(audio, Tensor) else type(audio).__name__
        raise TypeError(f"audio must be a floating point tensor, got {came}")
    if audio.ndim != 2:
        raise ValueError(f"audio must have shape (batch, time), got {tuple(audio.shape)}")

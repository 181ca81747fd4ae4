"""Training and scoring of taggers: the task for train.fit, mean average precision, note F1.

mAP is the mean over labels of scikit-learn's average_precision_score; a label without a positive clip has no average
precision and is left out, and how many were is told. For chords the same probabilities give note F1 (harmonic mean of
precision and recall over all pairs of clip and note, at a threshold) and frame AP (average precision over all pairs; a
frame is a clip of one second).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from audiomodels import checkpoint
from audiomodels._optional import require
from audiomodels.tag_data import TagClips
from audiomodels.tagger import Tagger, seconds_of
from audiomodels.train import TrainConfig


@dataclass(frozen=True)
class TagScores:
    """How well clips were tagged."""

    bits: float
    """Binary cross-entropy of the clips' probabilities, per label, in bits."""
    mean_ap: float
    """mAP, in [0, 1]."""
    frame_ap: float
    """Average precision over all pairs of clip and label."""
    note_f1: float
    """F1 over all pairs, at probability 0.5."""
    n_scored: int
    """Labels with a positive clip."""
    n_skipped: int
    """Labels without one, which mean_ap leaves out."""
    n_clip: int


class Tagging:
    """The task of a tagger, for train.fit: crops(step) -> (audio, labels), valid is a TagClips."""

    scores = TagScores

    def batch(self, drawn: tuple[Tensor, Tensor], config: TrainConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The global batch: audio (batch, samples), labels (batch, n_class)."""
        audio, labels = drawn
        if tuple(audio.shape) != (config.batch, config.length) or len(labels) != config.batch:
            wanted, came = (config.batch, config.length), tuple(audio.shape)
            raise ValueError(f"crops must give audio of shape {wanted} and as many labels, got {came}, {len(labels)}")
        return audio, labels, {}

    def loss(self, model: nn.Module, audio: Tensor, labels: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """The model's own loss."""
        return checkpoint.unwrap(model).loss(model(audio), labels)

    def evaluate(self, model: Tagger, valid: TagClips, config: TrainConfig) -> TagScores:
        """Scores on all clips of `valid`, or on config.eval_targets of them, evenly spread."""
        if len(valid) > config.eval_targets:
            valid = valid.only(i * len(valid) // config.eval_targets for i in range(config.eval_targets))
        return tag_scores(score_clips(model, valid), valid.labels)


def score_clips(model: Tagger, clips: TagClips, *, hop: float = 0.5) -> Tensor:
    """Probabilities (clips, n_class): of each clip the mean over its one-second crops, one every `hop` seconds."""
    if clips.sample_rate != model.config.sample_rate:
        raise ValueError(f"clips must have the model's {model.config.sample_rate} Hz, got {clips.sample_rate}")
    scores = []
    for first in range(0, len(clips), 32):
        part = range(first, min(first + 32, len(clips)))
        crops = [seconds_of(clips[index][0], clips.sample_rate, hop) for index in part]
        found = model.score(torch.stack([crop for clip in crops for crop in clip]))
        scores += [clip.mean(0) for clip in found.split([len(clip) for clip in crops])]
    return torch.stack(scores)


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each label, (n_class,), NaN where no clip has it; scores and labels are (clips, n_class)."""
    if scores.shape != labels.shape or scores.ndim != 2:
        raise ValueError(f"scores and labels must both be (clips, n_class), got {scores.shape} and {labels.shape}")
    score = require("sklearn.metrics").average_precision_score
    scores, labels = scores.double().numpy(), labels.bool().numpy()
    columns = zip(labels.T, scores.T, strict=True)
    return torch.tensor([score(y, s) if y.any() else math.nan for y, s in columns], dtype=torch.float64)


def mean_average_precision(scores: Tensor, labels: Tensor, *, least: int = 1) -> tuple[float, int]:
    """(mean of the average precisions of the labels with at least `least` positive clips, the number of others)."""
    kept = labels.bool().sum(0) >= max(1, least)
    mean = float(average_precisions(scores[:, kept], labels[:, kept]).mean()) if kept.any() else math.nan
    return mean, int((~kept).sum())


def note_f1(scores: Tensor, labels: Tensor, *, threshold: float = 0.5) -> float:
    """2 hits / (notes found + notes played), over all clips; NaN where neither has any."""
    found, played = scores >= threshold, labels.bool()
    total = int(found.sum() + played.sum())
    return 2 * int((found & played).sum()) / total if total else math.nan


def frame_ap(scores: Tensor, labels: Tensor) -> float:
    """Average precision over all pairs of clip and label; NaN where no label is set."""
    return float(average_precisions(scores.reshape(-1, 1), labels.reshape(-1, 1)))


def tag_scores(scores: Tensor, labels: Tensor) -> TagScores:
    """All figures of probabilities (clips, n_class) against labels (clips, n_class)."""
    mean_ap, skipped = mean_average_precision(scores, labels)
    nats = nn.functional.binary_cross_entropy(scores.double().clamp(1e-7, 1 - 1e-7), labels.double())
    return TagScores(
        bits=float(nats) / math.log(2),
        mean_ap=mean_ap,
        frame_ap=frame_ap(scores, labels),
        note_f1=note_f1(scores, labels),
        n_scored=labels.shape[1] - skipped,
        n_skipped=skipped,
        n_clip=len(labels),
    )

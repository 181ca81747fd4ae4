"""Units: the codes of any Encoder by k-means over its rows, how long they last, and streams of them without repeats.

A unit is a code that may be held for a while: "aaab" is a for three frames and b for one. A language model over units
sees the order alone; how long each is held is drawn from what was counted (Lakhotia et al. 2021, arXiv 2102.01192, 50,
100 or 200 units over HuBERT). A PatchCodes is a coder already and needs no Units; wav2vec 2.0, HuBERT, EnCodec, SimCLR
and a VGG (encoders.py) become one through them.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import audiokernels
from audiomodels import codebook as cb
from audiomodels.data import Recordings
from audiomodels.encoders import Encoder
from audiomodels.pretrained import Pretrained


@dataclass(frozen=True)
class UnitsConfig:
    """How many units, and of what encoder."""

    n_code: int = 100  # units are 0 .. n_code - 1
    dim: int = 64  # numbers in a row of the encoder
    sample_rate: int = 16000  # of the encoder
    hop: int = 320  # of the encoder
    encoder: str = ""  # where the encoder is, for those who load these units
    layer: int = -1  # of a Hugging Face encoder; -1: its last

    def __post_init__(self):
        for name, (low, high) in {"n_code": (2, 32768), "dim": (1, 1 << 20), "hop": (1, 1 << 20)}.items():
            value = operator.index(getattr(self, name))
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low} .. {high}, got {value}")


class Units(nn.Module, Pretrained):
    """units.encode(audio) -> codes. The encoder is not part of the folder: `attach` it after from_pretrained."""

    config_class = UnitsConfig

    def __init__(self, config: UnitsConfig = UnitsConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config, self.sample_rate, self.hop = config, config.sample_rate, config.hop
        self.register_buffer("codebook", torch.zeros(config.n_code, config.dim))
        self.encoder = None

    def attach(self, encoder: Encoder) -> "Units":
        """Use this encoder, which must have the rate, hop and dim of the config; returns self."""
        for name in ("sample_rate", "hop", "dim"):
            if getattr(encoder, name) != getattr(self.config, name):
                wanted, got = getattr(self.config, name), getattr(encoder, name)
                raise ValueError(f"encoder must have {name} {wanted} as these units, got {got}: is it another one?")
        object.__setattr__(self, "encoder", encoder)  # not a submodule: its weights are saved elsewhere
        return self

    @classmethod
    def learn(
        cls, encoder: Encoder, sounds: Iterable[Tensor], n_code: int, *, seed: int = 0, where: str = ""
    ) -> "Units":
        """Units by k-means over the rows of all sounds (samples,). where: of the encoder, for the config."""
        layer = getattr(encoder, "layer", None)
        config = UnitsConfig(
            n_code, encoder.dim, encoder.sample_rate, encoder.hop, where, -1 if layer is None else layer
        )
        units = cls(config).attach(encoder)
        with torch.no_grad():
            rows = [encoder.embed(sound[None])[0].float() for sound in sounds]
        if not rows:
            raise ValueError("sounds must hold at least one")
        units.codebook.copy_(cb.fit_codebook(torch.cat(rows), n_code, seed=seed))
        return units.eval()

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Units of audio (batch, samples): integers (batch, time), one for each row of the encoder."""
        if self.encoder is None:
            raise ValueError("these units have no encoder yet: see Units.attach")
        return cb.nearest(self.encoder.embed(audio).float(), self.codebook)


@dataclass(frozen=True)
class DurationsConfig:
    """Of how many units, and the longest time that is told apart."""

    n_code: int = 100
    longest: int = 64  # frames; longer ones count as this
    codebook: str = ""  # codebook.name_of the codebook of the units

    def __post_init__(self):
        for name, (low, high) in {"n_code": (2, 32768), "longest": (1, 1 << 16)}.items():
            if not low <= operator.index(getattr(self, name)) <= high:
                raise ValueError(f"{name} must be {low} .. {high}, got {getattr(self, name)}")


class Durations(nn.Module, Pretrained):
    """How long each unit lasts: a histogram for each, drawn from by inverse CDF."""

    config_class = DurationsConfig

    def __init__(self, config: DurationsConfig = DurationsConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.register_buffer("counts", torch.zeros(config.n_code, config.longest))

    def count(self, streams: Iterable[Tensor]) -> None:
        """Add the runs of streams of codes (time,); a stream's last run, which may go on, is left out."""
        for codes in streams:
            units, durations = cb.collapse(codes.long())
            place = units[:-1] * self.config.longest + durations[:-1].clamp(max=self.config.longest) - 1
            self.counts.view(-1).index_add_(0, place, torch.ones(len(place)))

    def draw(self, units: Tensor, *, seed: int = 0, position: int = 0) -> Tensor:
        """Frames (int64, >= 1) of units (time,), those at `position` and after in their stream; a unit that was never
        counted lasts as long as units do."""
        weights = self.counts[cb.check_codes(units, self.config.n_code, 1)]
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, self.counts.sum(0) + 1e-6)
        cdf = weights.double().cumsum(1)
        uniforms = audiokernels.philox_uniform(seed, 1, len(units), position=position)[0].double()
        return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(1).clamp(max=self.config.longest - 1) + 1


def collapsed(streams: Recordings) -> Recordings:
    """Streams of codes without repeats: what a language model of units trains on."""
    rows = [replace(stream, codes=cb.collapse(stream.codes)[0]) for stream in streams]
    return Recordings(
        rows,
        sample_rate=streams.sample_rate,
        companding=streams.companding,
        n_class=streams.n_class,
        label_names=streams.label_names,
    )

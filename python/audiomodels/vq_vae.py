"""VQVAE: sound as codes at three rates, learned end to end on the waveform, and language models that make new codes.

    z = encoder(x), one row every hop samples;  code = argmin_k |z - e_k|;  x' = decoder(e_code)
    loss = |x - x'|^2 / |x|^2 + spectral(x, x') + 0.02 |z - sg(e_code)|^2,   e_k: a moving mean of the z that chose k
    spectral(x, x') = mean over windows of | |STFT x| - |STFT x'| | / | |STFT x| |

After Jukebox (Dhariwal et al. 2020, arXiv 2005.00341, sections 3 and 4): three separate VQ-VAEs of hop 8, 32 and 128;
convolutions of width 4 and stride 2 with dilated residual blocks between them; codes that nobody chooses start anew at
a z of the batch. The quantiser is vector-quantize-pytorch's. The top level's codes come from a language model, each
level below from one that is conditioned on the level above (CodeLM in both cases); every level decodes to sound. Three
levels want a GPU; `VQVAEConfig(hops=(128,))` is the top level alone, which a CPU can train.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiomodels import checkpoint, features, quantize
from audiomodels import codebook as cb
from audiomodels._optional import require
from audiomodels.code_lm import CodeLM, CodeLMConfig
from audiomodels.data import Recordings
from audiomodels.pretrained import Pretrained
from audiomodels.train import TrainConfig, changed, fit
from audiomodels.unit_decoder import ConditionedCrops

WINDOWS = (2048, 1024, 512, 128)  # samples of the spectral loss; hops are a quarter


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a VQVAE, and the sound that it takes."""

    hops: tuple[int, ...] = (8, 32, 128)  # samples of a code of each level, finest first; powers of two
    n_code: int = 2048  # codes of each level
    width: int = 64  # channels of the convolutions
    depth: int = 4  # dilated residual blocks after each of them
    n_embd: int = 64  # numbers of a code
    commit: float = 0.02  # weight of |z - e|^2
    spectral: float = 1.0  # weight of the spectral loss
    decay: float = 0.9  # of the moving means of codes, a step; nearer to 1, unused codes start anew later
    restart: float = 0.1  # a code chosen less often a step than this starts anew
    sample_rate: int = 16000  # Hz

    def __post_init__(self):
        limits = {"n_code": (2, 32768), "width": (1, 8192), "depth": (0, 16), "n_embd": (1, 8192)}
        for name, (low, high) in {**limits, "sample_rate": (1000, 768_000)}.items():
            value = operator.index(getattr(self, name))
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low} .. {high}, got {value}")
        object.__setattr__(self, "hops", tuple(map(operator.index, self.hops)))
        powers = all(1 < hop <= 1 << 15 and hop & (hop - 1) == 0 for hop in self.hops)
        if not self.hops or not powers or list(self.hops) != sorted(set(self.hops)):
            raise ValueError(f"hops must be rising powers of two, 2 .. 32768, got {self.hops}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay}")
        for name in ("commit", "spectral", "restart"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


class Residual(nn.Module):
    """x + a dilated convolution of it."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.wide = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.narrow = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.wide(F.relu(x))))


class Level(nn.Module):
    """One VQ-VAE. An Encoder, a Coder and a Decoder of encoders.py."""

    def __init__(self, config: VQVAEConfig, hop: int):
        super().__init__()
        self.config, self.hop, self.sample_rate, self.dim = config, hop, config.sample_rate, config.n_embd
        width, halvings = config.width, hop.bit_length() - 1
        down: list[nn.Module] = []
        up: list[nn.Module] = [nn.Conv1d(config.n_embd, width, 3, padding=1)]
        for i in range(halvings):
            down += [
                nn.Conv1d(width if i else 1, width, 4, 2, 1),
                *(Residual(width, 3**d) for d in range(config.depth)),
            ]
            up += [*(Residual(width, 3**d) for d in reversed(range(config.depth)))]
            up += [nn.ConvTranspose1d(width, width, 4, 2, 1)]
        self.encoder = nn.Sequential(*down, nn.Conv1d(width, config.n_embd, 3, padding=1))
        self.decoder = nn.Sequential(*up, nn.ReLU(), nn.Conv1d(width, 1, 3, padding=1))
        self.quantiser = require("vector_quantize_pytorch").VectorQuantize(
            config.n_embd,
            config.n_code,
            decay=config.decay,
            kmeans_init=True,
            commitment_weight=1.0,
            threshold_ema_dead_code=config.restart,
            rotation_trick=False,
        )

    @property
    def codebook(self) -> Tensor:
        """(n_code, n_embd)."""
        return self.quantiser.codebook

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """audio (batch, samples), samples a multiple of the hop -> (its reconstruction, the commitment loss)."""
        rows, _, commitment = self.quantiser(self.encoder(audio[:, None]).transpose(1, 2))
        return self.decoder(rows.transpose(1, 2))[:, 0], commitment.sum()

    def embed(self, audio: Tensor) -> Tensor:
        """z of audio (batch, samples): float (batch, ceil(samples / hop), n_embd)."""
        if audio.ndim != 2 or not audio.shape[1] or not torch.isfinite(audio).all():
            raise ValueError(f"audio must be finite (batch, at least 1 sample), got shape {tuple(audio.shape)}")
        audio = F.pad(audio, (0, -audio.shape[1] % self.config.hops[-1]))
        return self.encoder(audio[:, None]).transpose(1, 2)

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Codes of audio (batch, samples): integers (batch, samples / hop), the end padded to a code of the top."""
        return cb.nearest(self.embed(audio), self.codebook)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Sound of codes (batch, time): float32 (batch, time * hop)."""
        rows = self.codebook[cb.check_codes(codes, self.config.n_code)]
        return self.decoder(rows.transpose(1, 2))[:, 0]


class VQVAE(nn.Module, Pretrained):
    """model.encode(audio) -> codes of each level; model.levels[i].decode(codes) -> audio. levels[0] is the finest."""

    config_class = VQVAEConfig

    def __init__(self, config: VQVAEConfig = VQVAEConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config, self.sample_rate = config, config.sample_rate
        self.levels = nn.ModuleList(Level(config, hop) for hop in config.hops)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> "VQVAE":
        """See Pretrained.from_pretrained."""
        model = super().from_pretrained(folder, device=device)
        for level in model.levels:
            level.quantiser.zero = torch.zeros((), device=device)  # its constant is in no file
        return model

    def forward(self, audio: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(reconstruction, commitment loss) of each level; audio (batch, samples), a multiple of the largest hop."""
        if audio.ndim != 2 or not audio.shape[1] or audio.shape[1] % self.config.hops[-1]:
            raise ValueError(
                f"audio must be (batch, a multiple of {self.config.hops[-1]} samples), got {tuple(audio.shape)}"
            )
        return [level(audio) for level in self.levels]

    def encode(self, audio: Tensor) -> list[Tensor]:
        """Codes of each level, (batch, samples / hop) of audio (batch, samples) padded to a multiple of all hops."""
        return [level.encode(audio) for level in self.levels]


def vq_loss(model: nn.Module, audio: Tensor, targets: Tensor) -> Tensor:
    """The loss above, summed over the levels, for train.Objective on crops of audio, Crops(...).audio."""
    config: VQVAEConfig = checkpoint.unwrap(model).config
    total, power = audio.new_zeros(()), targets.square().mean().clamp(min=1e-5)
    for found, commitment in model(audio):
        spectral = spectral_distance(found, targets)
        total = total + F.mse_loss(found, targets) / power + config.spectral * spectral + config.commit * commitment
    return total


def spectral_distance(found: Tensor, audio: Tensor) -> Tensor:
    """The multi-resolution spectral distance of two sounds (batch, samples): a scalar, 0 for the same magnitudes.

    Windows longer than the sound are left out. Source: Jukebox, section 3.2; normalised as in Yamamoto et al. 2020
    (Parallel WaveGAN, arXiv 1910.11480), spectral convergence.
    """
    distances = []
    for window in WINDOWS:
        if window <= audio.shape[1]:
            a, b = (features.spectrogram(x, window, window // 4) for x in (found, audio))
            distances.append((a - b).norm() / b.norm().clamp(min=1e-3))
    if not distances:
        raise ValueError(f"audio must hold at least {min(WINDOWS)} samples, got {audio.shape[1]}")
    return torch.stack(distances).mean()


def snr(found: Tensor, audio: Tensor) -> float:
    """Signal-to-noise ratio of a reconstruction in dB."""
    return float(10 * torch.log10(audio.square().sum() / (found - audio).square().sum().clamp(min=1e-20)))


# ---- new codes: a prior for the top level, an upsampler for each level below


def prior_config(model: VQVAE, level: int, sizes: CodeLMConfig) -> CodeLMConfig:
    """`sizes` for the codes of a level, conditioned on those above it."""
    here, top = model.levels[level], level + 1 == len(model.levels)
    return replace(
        sizes,
        n_class=model.config.n_code,
        condition_class=0 if top else model.config.n_code,
        condition_hop=1 if top else model.levels[level + 1].hop // here.hop,
        codebook=cb.name_of(here.codebook),
        sample_rate=model.sample_rate,
        hop=here.hop,
    )


def train_prior(model: VQVAE, level: int, recordings: Recordings, sizes: CodeLMConfig, training: TrainConfig) -> CodeLM:
    """A CodeLM of a level's codes, trained on `recordings` of sound; training.length and context count its codes."""
    prior = CodeLM(prior_config(model, level, sizes))
    here, above, rows = model.levels[level], model.levels[min(level + 1, len(model.levels) - 1)], []
    for recording in recordings:
        audio = quantize.decode(recording.codes, recordings.companding, recordings.n_class)[None]
        codes, condition = (one.encode(audio.to(one.codebook.device))[0].cpu() for one in (here, above))
        rows.append(replace(recording, codes=codes, condition=condition))
    streams = Recordings(rows, sample_rate=1, companding="codes", n_class=model.config.n_code)
    options = {"batch": training.batch, "length": training.length, "context": training.context}
    crops = ConditionedCrops(streams, above.hop // here.hop, **options, seed=training.seed)
    fit(prior, crops if prior.condition is not None else changed(crops, operator.itemgetter(0)), training)
    return prior.eval()


class Sample(NamedTuple):
    """New codes of every level, finest first, and the sound that each level makes of its own."""

    codes: list[Tensor]
    audio: list[Tensor]


def sample(
    model: VQVAE, priors: Sequence[CodeLM], n: int, *, temperature: float = 1.0, seed: int = 0, batch: int = 1
) -> Sample:
    """n new codes of the top level, and of the levels below what their upsamplers make of them.

    priors: one for each level, finest first, as train_prior gives them. Errors: ValueError where one was made for other
    codes.
    """
    if len(priors) != len(model.levels):
        raise ValueError(f"priors must be {len(model.levels)}, one for each level, got {len(priors)}")
    for i, (prior, level) in enumerate(zip(priors, model.levels, strict=True)):
        if prior.config.codebook != cb.name_of(level.codebook):
            raise ValueError(f"priors[{i}] must be made for the codebook of level {i}, got {prior.config.codebook!r}")
    options = {"temperature": temperature, "seed": seed, "batch": batch}
    codes = [priors[-1].generate(n, **options)]
    for prior in reversed(priors[:-1]):
        above = codes[0]
        codes.insert(0, prior.generate(above.shape[1] * prior.config.condition_hop, condition=above, **options))
    return Sample(codes, [level.decode(row) for level, row in zip(model.levels, codes, strict=True)])

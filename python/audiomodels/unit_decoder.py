"""From codes back to sound, learned: a WaveNet that is conditioned on the codes, or codes -> mel -> WaveNet.

    UnitWaveNet   each frame's code, one_hot, is the condition of a WaveNet (audiokernels.wavenet_generate)
    UnitToMel     codes -> log-mel frames: convolutions over the codes, then a GRU that also reads the frame before
    MelWaveNet    UnitToMel, then a WaveNet whose condition is the mel frame

UnitToMel is Tacotron's decoder (Wang et al. 2017, arXiv 1703.10135) without attention: a code already says which frame
it is of. Both WaveNets train with train.fit on `ConditionedCrops` with `NoisyPast`, UnitToMel on `MelCrops` with
Objective(mel_error).
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiomodels import features, quantize
from audiomodels.codebook import check_codes
from audiomodels.data import Recordings, in_words
from audiomodels.encoders import Coder
from audiomodels.pretrained import Pretrained
from audiomodels.train import NextCode, TrainConfig
from audiomodels.wavenet import WaveNet


def one_hot(codes: Tensor, n_code: int) -> Tensor:
    """Codes (...) as conditions of a WaveNet: float (..., n_code), sqrt(n_code) at the code, 0 elsewhere.

    A layer is initialised for inputs of mean square 1: with a 1 at the code, that of 512 codes moves by 0.03, and a
    WaveNet learns to do without it (docs/codes.md, "Codes back to sound").
    """
    return n_code**0.5 * F.one_hot(check_codes(codes, n_code, codes.ndim), n_code).float()


class UnitWaveNet:
    """A Decoder: wavenet's condition is the one_hot code of each frame, condition_hop the samples of a frame."""

    def __init__(self, wavenet: WaveNet):
        config = wavenet.config
        if config.condition_channels < 2:
            raise ValueError(f"wavenet must have a condition channel for each code, got {config.condition_channels}")
        self.wavenet, self.sample_rate, self.hop = wavenet.eval(), config.sample_rate, config.condition_hop
        self.n_code = config.condition_channels

    def decode(self, codes: Tensor, *, prompt: Tensor | None = None, **options) -> Tensor:
        """Sound of codes (batch, time): float32 (batch, time * hop - m).

        prompt: audio (batch, m) that the sound begins with and that is not given back. options: of WaveNet.generate
        (temperature, seed, dtype, progress).
        """
        return _generate(self.wavenet, one_hot(check_codes(codes, self.n_code), self.n_code), prompt, options)


class MelWaveNet:
    """A Decoder: codes -> mel frames -> WaveNet."""

    def __init__(self, to_mel: "UnitToMel", wavenet: WaveNet):
        mel, wave = to_mel.config, wavenet.config
        if (mel.n_mel, mel.hop, mel.sample_rate) != (wave.condition_channels, wave.condition_hop, wave.sample_rate):
            raise ValueError(
                "wavenet must have the condition channels, hop and sample rate of to_mel, "
                f"{(mel.n_mel, mel.hop, mel.sample_rate)}, got "
                f"{(wave.condition_channels, wave.condition_hop, wave.sample_rate)}"
            )
        self.to_mel, self.wavenet = to_mel.eval(), wavenet.eval()
        self.sample_rate, self.hop = wave.sample_rate, wave.condition_hop

    def decode(self, codes: Tensor, *, prompt: Tensor | None = None, **options) -> Tensor:
        """As UnitWaveNet.decode."""
        return _generate(self.wavenet, self.to_mel.generate(codes), prompt, options)


def _generate(wavenet: WaveNet, condition: Tensor, prompt: Tensor | None, options: dict) -> Tensor:
    config, n = wavenet.config, condition.shape[1] * wavenet.config.condition_hop
    if prompt is not None:
        prompt = quantize.encode(prompt[:, : n - 1], config.companding, config.n_class)
        n -= prompt.shape[1]
    codes = wavenet.generate(n, prompt, condition=condition, batch=len(condition), **options)
    return quantize.decode(codes, config.companding, config.n_class)


@dataclass(frozen=True)
class UnitToMelConfig:
    """Sizes of a UnitToMel."""

    n_code: int = 100
    n_mel: int = 80
    n_embd: int = 128
    sample_rate: int = 16000  # Hz
    hop: int = 512  # samples of a frame

    def __post_init__(self):
        limits = {"n_code": (2, 32768), "n_mel": (8, 512), "n_embd": (8, 8192), "hop": (1, 1 << 16)}
        for name, (low, high) in limits.items():
            if not low <= operator.index(getattr(self, name)) <= high:
                raise ValueError(f"{name} must be {low} .. {high}, got {getattr(self, name)}")


class UnitToMel(nn.Module, Pretrained):
    """model(codes, mel) -> mel, each frame from the codes around it and the true frames before; generate(codes)."""

    config_class = UnitToMelConfig

    def __init__(self, config: UnitToMelConfig = UnitToMelConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config, e = config, config.n_embd
        self.embedding = nn.Embedding(config.n_code, e)
        self.convs = nn.Sequential(*(m for _ in range(3) for m in (nn.Conv1d(e, e, 5, padding=2), nn.GELU())))
        self.prenet = nn.Sequential(nn.Linear(config.n_mel, e), nn.ReLU(), nn.Dropout(0.5))  # so codes are needed
        self.gru = nn.GRU(2 * e, e, batch_first=True)
        self.out = nn.Linear(2 * e, config.n_mel)

    def forward(self, codes: Tensor, mel: Tensor) -> Tensor:
        """codes (batch, time), mel (batch, time, n_mel) -> mel; frame t of the result has not seen mel[:, t:]."""
        states = self._states(codes)
        if tuple(mel.shape) != (*codes.shape, self.config.n_mel):
            raise ValueError(f"mel must have shape {(*codes.shape, self.config.n_mel)}, got {tuple(mel.shape)}")
        before = F.pad(mel, (0, 0, 1, 0))[:, :-1]
        found, _ = self.gru(torch.cat([self.prenet(before), states], 2))
        return self.out(torch.cat([found, states], 2))

    @torch.no_grad()
    def generate(self, codes: Tensor) -> Tensor:
        """codes (batch, time) -> log-mel frames (batch, time, n_mel), each fed back into the next."""
        states, memory = self._states(codes), None
        frame, frames = states.new_zeros(len(codes), 1, self.config.n_mel), []
        for t in range(codes.shape[1]):
            here = states[:, t : t + 1]
            found, memory = self.gru(torch.cat([self.prenet(frame), here], 2), memory)
            frame = self.out(torch.cat([found, here], 2))
            frames.append(frame)
        return torch.cat(frames, 1) if frames else states.new_zeros(len(codes), 0, self.config.n_mel)

    def _states(self, codes: Tensor) -> Tensor:
        x = self.embedding(check_codes(codes, self.config.n_code)).transpose(1, 2)
        return (x + self.convs(x)).transpose(1, 2)


def mel_error(model: nn.Module, codes: Tensor, mel: Tensor) -> Tensor:
    """Mean squared error of the mel frames, for train.Objective on crops (codes, mel)."""
    return F.mse_loss(model(codes, mel), mel)


def mel_frames(audio: Tensor, config: UnitToMelConfig) -> Tensor:
    """log10 of mel power, about -1 .. 1: (batch, ceil(samples / hop), n_mel) of audio (batch, samples)."""
    audio = F.pad(audio, (0, -audio.shape[1] % config.hop))
    n_fft = max(1024, 1 << (2 * config.hop - 1).bit_length())
    power = features.mel(audio, config.sample_rate, n_fft=n_fft, hop=config.hop, n_mel=config.n_mel)
    return ((power[:, :, :-1] + 1e-4).log10() / 4).transpose(1, 2)


def unit_frames(coder: Coder, audio: Tensor) -> Tensor:
    """Codes of each whole frame of audio (samples,): int64 (samples // hop,). Some encoders give a few frames less than
    that: the last one is repeated."""
    units, frames = coder.encode(audio[None])[0].long(), len(audio) // coder.hop
    return torch.cat([units, units[-1:].expand(max(0, frames - len(units)))])[:frames]


def unit_recordings(recordings: Recordings, coder: Coder, wavenet: WaveNet, *, context: int) -> Recordings:
    """`recordings` in the codes of a UnitWaveNet's wavenet, with their units, one_hot, as condition.

    Silence is put before each, `context` samples rounded up to whole frames, and after it up to a whole frame.
    """
    n_code = len(coder.codebook)
    if (wavenet.config.condition_hop, wavenet.config.condition_channels) != (coder.hop, n_code):
        got = (wavenet.config.condition_hop, wavenet.config.condition_channels)
        raise ValueError(f"wavenet must have condition_hop and condition_channels {(coder.hop, n_code)}, got {got}")
    frames = partial(unit_frames, coder)
    return _conditioned(recordings, wavenet, lambda audio: one_hot(frames(audio), n_code), context)


def mel_recordings(recordings: Recordings, config: UnitToMelConfig, wavenet: WaveNet, *, context: int) -> Recordings:
    """The same for the wavenet of a MelWaveNet: mel frames as condition."""
    return _conditioned(recordings, wavenet, lambda audio: mel_frames(audio[None], config)[0], context)


def _conditioned(
    recordings: Recordings, wavenet: WaveNet, frames: Callable[[Tensor], Tensor], context: int
) -> Recordings:
    config, rows = wavenet.config, []
    hop = config.condition_hop
    if recordings.sample_rate != config.sample_rate:
        raise ValueError(f"recordings must be at {config.sample_rate} Hz as the wavenet, got {recordings.sample_rate}")
    for recording in recordings:
        audio = quantize.decode(recording.codes, recordings.companding, recordings.n_class)
        audio = F.pad(audio, (-(-context // hop) * hop, -len(audio) % hop))
        codes = quantize.encode(audio, config.companding, config.n_class)
        rows.append(replace(recording, codes=codes, condition=frames(audio)))
    return Recordings(rows, sample_rate=config.sample_rate, companding=config.companding, n_class=config.n_class)


def unit_mel_recordings(recordings: Recordings, coder: Coder, config: UnitToMelConfig) -> Recordings:
    """`recordings` as their units, with mel frames as condition: what MelCrops takes."""
    rows = []
    for recording in recordings:
        audio = quantize.decode(recording.codes, recordings.companding, recordings.n_class)
        audio = F.pad(audio, (0, -len(audio) % config.hop))
        rows.append(replace(recording, codes=unit_frames(coder, audio), condition=mel_frames(audio[None], config)[0]))
    return Recordings(rows, sample_rate=1, companding="codes", n_class=config.n_code)


class ConditionedCrops:
    """crops(step) -> (codes (batch, context + length + 1), {"condition": (batch, frames, channels)}) for train.fit.

    Crops begin at a frame, so that the condition holds for the same samples as in generation. context and length are
    multiples of `hop`. Recordings shorter than a crop are left out. A pure function of (seed, step).
    """

    def __init__(self, recordings: Recordings, hop: int, *, batch: int, length: int, context: int, seed: int = 0):
        if length % hop or context % hop:
            raise ValueError(f"length and context must be multiples of the hop {hop}, got {length} and {context}")
        self.frames = (context + length) // hop
        self.recordings = [r for r in recordings if len(r.condition) >= self.frames]
        if not self.recordings:
            raise ValueError(f"recordings must hold one of at least {self.frames * hop} samples, as long as a crop")
        self.hop, self.batch, self.seed, self.silence = hop, batch, seed, recordings.n_class // 2
        self.ends = np.cumsum([len(r.condition) - self.frames + 1 for r in self.recordings])

    @property
    def data(self) -> str:
        """What is drawn from, in words: for a run that may be resumed with others."""
        return in_words((r.name, r.codes) for r in self.recordings)

    def __call__(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The crops of training step `step`."""
        places = np.random.Philox(key=np.array([self.seed, step], np.uint64)).random_raw(self.batch)
        codes, condition = [], []
        for place in (int(raw) * int(self.ends[-1]) >> 64 for raw in places):
            index = int(np.searchsorted(self.ends, place, side="right"))
            recording = self.recordings[index]
            first = place - (int(self.ends[index - 1]) if index else 0)
            wave = F.pad(recording.codes, (1, 0), value=self.silence)  # the code before the first
            codes.append(wave[first * self.hop :][: self.frames * self.hop + 1])
            condition.append(recording.condition[first : first + self.frames])
        return torch.stack(codes), {"condition": torch.stack(condition)}


class NoisyPast(NextCode):
    """The task NextCode for a conditioned WaveNet: what it sees of the past carries noise, its targets do not.

    Told the true past, a WaveNet reads the pitch off it and hardly needs the codes; on its own past, which errs, it
    then drifts. noise: largest standard deviation, in codes; each row draws its own up to it, from torch's generator.
    """

    def __init__(self, n_class: int = 256, noise: float = 6.0):
        self.n_class, self.noise = n_class, noise

    def batch(self, drawn: tuple[Tensor, dict], config: TrainConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As NextCode's, the inputs with noise."""
        inputs, targets, extra = super().batch(drawn, config)
        scale = self.noise * torch.rand(len(inputs), 1)
        noisy = (inputs + scale * torch.randn(inputs.shape)).round().clamp(0, self.n_class - 1)
        return noisy.to(inputs.dtype), targets, extra


class MelCrops(ConditionedCrops):
    """crops(step) -> (codes (batch, length), mel (batch, length, n_mel)) of unit_mel_recordings, for UnitToMel."""

    def __init__(self, recordings: Recordings, *, batch: int, length: int, seed: int = 0):
        super().__init__(recordings, 1, batch=batch, length=length, context=0, seed=seed)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The crops of training step `step`."""
        codes, extra = super().__call__(step)
        return codes[:, 1:], extra["condition"]

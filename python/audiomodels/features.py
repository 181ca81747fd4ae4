"""Pictures of sound in time and frequency: spectrogram, log-frequency spectrogram, mel bands, constant-Q transform.

    spectrogram      |STFT| of Hann windows: bins evenly spaced in Hz
    log_spectrogram  the same, resampled to bins evenly spaced in pitch: interpolated where these are narrower than the
                     STFT's, averaged where they are wider
    mel              power in triangular bands on the mel scale (HTK's or Slaney's)
    constant_q       one kernel per bin whose length is Q periods (Brown, JASA 89, 1991): sharp in pitch at low, in time
                     at high frequencies; computed as Brown & Puckette, JASA 92, 1992

All take audio (..., time) of any floating dtype, on any device, and return (..., bins, frames); frame t is centred on
sample t * hop, what lies beyond the ends counts as silence. All are differentiable. On the two logarithmic axes a
harmonic tone that rises by k semitones moves by k * bins_per_octave / 12 bins and keeps its shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from audiomodels._constants import constant

__all__ = [
    "constant_q",
    "log_bins",
    "log_spectrogram",
    "mel",
    "mel_filters",
    "mel_to_hz",
    "hz_to_mel",
    "spectrogram",
]

LOWEST_HZ = 55.0  # A1: default bottom of the logarithmic axes


def spectrogram(audio: Tensor, n_fft: int = 1024, hop: int = 256, *, win_length: int | None = None) -> Tensor:
    """Magnitude of the short-time Fourier transform.

    Args:
        audio: (..., time).
        n_fft: samples of a transform; bin k is k * sample_rate / n_fft Hz.
        hop: samples between frames.
        win_length: samples of the Hann window, centred in n_fft zeros; default n_fft.

    Returns:
        (..., n_fft // 2 + 1, time // hop + 1), as torch.stft(..., pad_mode="constant").abs(). A sine of amplitude a has
        a peak of a * sum(window) / 2.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """
    window = torch.hann_window(win_length or n_fft, dtype=_real(audio), device=audio.device)
    return _stft(audio, n_fft, hop, window).abs()


def log_spectrogram(
    audio: Tensor,
    sample_rate: int,
    *,
    n_fft: int = 4096,
    hop: int = 256,
    bins_per_octave: int = 24,
    f_min: float = LOWEST_HZ,
) -> Tensor:
    """Spectrogram over bins f_min * 2^(i / bins_per_octave) Hz, up to half the sample rate (`log_bins`).

    Each bin is the weighted mean of the STFT bins under a triangle that reaches to its neighbours, or to the next STFT
    bins where these are further.

    Returns:
        (..., bins, time // hop + 1), magnitudes on the scale of `spectrogram`.
    """
    hz = log_bins(sample_rate, bins_per_octave, f_min)
    filters = _log_filters(hz, sample_rate, n_fft, bins_per_octave).to(audio.device, _real(audio))
    return filters @ spectrogram(audio, n_fft, hop)


def mel(
    audio: Tensor,
    sample_rate: int,
    *,
    n_fft: int = 1024,
    hop: int = 256,
    win_length: int | None = None,
    n_mel: int = 80,
    scale: str = "htk",
    norm: str | None = None,
) -> Tensor:
    """Power of the spectrogram in mel bands: mel_filters(...) @ spectrogram(...)^2, (..., n_mel, time // hop + 1)."""
    filters = _mel_filters(n_mel, n_fft, sample_rate, scale, norm).to(audio.device, _real(audio))
    return filters @ spectrogram(audio, n_fft, hop, win_length=win_length).square()


def constant_q(
    audio: Tensor, sample_rate: int, *, hop: int = 256, bins_per_octave: int = 24, f_min: float = LOWEST_HZ
) -> Tensor:
    """Magnitude of the constant-Q transform over the bins of `log_bins`.

    Bin i correlates the audio with a complex sinusoid under a Hann window of Q / f_i seconds, Q = 1 / (2^(1 /
    bins_per_octave) - 1); the window sums to 1, so a sine of amplitude a has a peak of a / 2 in every bin.

    Returns:
        (..., bins, time // hop + 1). The longest kernel has Q * sample_rate / f_min samples.
    """
    hz = log_bins(sample_rate, bins_per_octave, f_min)
    kernels = _constant_q_kernels(hz, sample_rate, bins_per_octave)
    n_fft = 2 * (kernels.shape[1] - 1)
    real = _real(audio)
    spectrum = _stft(audio, n_fft, hop, torch.ones(n_fft, dtype=real, device=audio.device))
    return (kernels.to(spectrum.device, spectrum.dtype) @ spectrum).abs()


def log_bins(sample_rate: int, bins_per_octave: int = 24, f_min: float = LOWEST_HZ) -> tuple[float, ...]:
    """The centres in Hz of the bins of log_spectrogram and constant_q: f_min * 2^(i / bins_per_octave).

    The last one lies two bins below half the sample rate: constant_q's main lobe reaches that far.
    """
    _check_int("bins_per_octave", bins_per_octave, 1, 1200)
    if not 0 < f_min < sample_rate / 16:
        raise ValueError(f"f_min must lie between 0 and {sample_rate / 16:g}, the sample rate / 16; got {f_min}")
    count = math.floor(bins_per_octave * math.log2(sample_rate / 2 / f_min)) - 1
    return tuple(f_min * 2 ** (i / bins_per_octave) for i in range(count))


# ------------------------------------------------------------------------------------------------------- filter banks


def mel_filters(n_mel: int, n_fft: int, sample_rate: int, scale: str = "htk", norm: str | None = None) -> Tensor:
    """Triangular bands, evenly spaced on the mel scale from 0 to half the sample rate.

    Args:
        n_mel: bands.
        n_fft: of the spectrum that they are applied to.
        sample_rate: Hz.
        scale: "htk" (2595 log10(1 + f / 700)) or "slaney" (linear to 1 kHz, then 27 bands per factor of 6.4).
        norm: None: every triangle is 1 at its top; "slaney": every triangle has an area of 1 Hz.

    Returns:
        (n_mel, n_fft // 2 + 1) float32, as torchaudio's melscale_fbanks transposed. A band narrower than a bin may hold
        none: its row is zero.
    """
    return _mel_filters(n_mel, n_fft, sample_rate, scale, norm).clone()


@constant(16)
def _mel_filters(n_mel: int, n_fft: int, sample_rate: int, scale: str, norm: str | None) -> Tensor:
    _check_int("n_mel", n_mel, 1, 1 << 16)
    _check_int("n_fft", n_fft, 2, 1 << 24)
    if norm not in (None, "slaney"):
        raise ValueError(f"norm must be None or 'slaney', got {norm!r}")
    top = hz_to_mel(sample_rate / 2, scale)
    edges = torch.tensor([mel_to_hz(top * i / (n_mel + 1), scale) for i in range(n_mel + 2)], dtype=torch.float64)
    hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    filters = _triangles(hz, edges[:-2], edges[1:-1], edges[2:])
    if norm == "slaney":
        filters = filters * (2 / (edges[2:] - edges[:-2]))[:, None]
    return filters.float()


def hz_to_mel(hz: float, scale: str = "htk") -> float:
    """Mel of a frequency; see mel_filters for the scales."""
    if scale == "htk":
        return 2595 * math.log10(1 + hz / 700)
    if scale == "slaney":
        return 3 * hz / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000, 6.4)
    raise ValueError(f"scale must be 'htk' or 'slaney', got {scale!r}")


def mel_to_hz(mels: float, scale: str = "htk") -> float:
    """The inverse of hz_to_mel."""
    if scale == "htk":
        return 700 * (10 ** (mels / 2595) - 1)
    if scale == "slaney":
        return 200 * mels / 3 if mels < 15 else 1000 * 6.4 ** ((mels - 15) / 27)
    raise ValueError(f"scale must be 'htk' or 'slaney', got {scale!r}")


@constant(16)
def _log_filters(hz: tuple[float, ...], sample_rate: int, n_fft: int, bins_per_octave: int) -> Tensor:
    """(bins, n_fft // 2 + 1), rows that sum to 1."""
    centres, step = torch.tensor(hz, dtype=torch.float64), 2 ** (1 / bins_per_octave)
    bin_hz = sample_rate / n_fft
    low = torch.minimum(centres / step, centres - bin_hz)
    high = torch.maximum(centres * step, centres + bin_hz)
    filters = _triangles(torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64), low, centres, high)
    return (filters / filters.sum(1, keepdim=True)).float()


@constant(4)
def _constant_q_kernels(hz: tuple[float, ...], sample_rate: int, bins_per_octave: int) -> Tensor:
    """(bins, n_fft // 2 + 1) complex64: by Parseval, kernels @ STFT without window is the sum over time.

    Negative frequencies are left out: only side lobes reach there, below 1 % of the result on noise, in the top bins.
    """
    periods = 1 / (2 ** (1 / bins_per_octave) - 1)
    n_fft = 2 ** math.ceil(math.log2(periods * sample_rate / hz[0] + 1))
    kernels = torch.zeros(len(hz), n_fft, dtype=torch.complex128)
    for kernel, f in zip(kernels, hz, strict=True):
        half = round(periods * sample_rate / f / 2)
        time = torch.arange(-half, half + 1, dtype=torch.float64)
        window = torch.hann_window(2 * half + 1, periodic=False, dtype=torch.float64)
        phase = 2 * math.pi * f / sample_rate * time
        kernel[n_fft // 2 - half : n_fft // 2 + half + 1] = torch.polar(window / window.sum(), phase)
    return (torch.fft.fft(kernels).conj()[:, : n_fft // 2 + 1] / n_fft).to(torch.complex64)


def _triangles(hz: Tensor, low: Tensor, centre: Tensor, high: Tensor) -> Tensor:
    """(len(centre), len(hz)): 0 at low and high, 1 at centre."""
    rising = (hz - low[:, None]) / (centre - low)[:, None]
    falling = (high[:, None] - hz) / (high - centre)[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


# ----------------------------------------------------------------------------------------------------------- together


def _stft(audio: Tensor, n_fft: int, hop: int, window: Tensor) -> Tensor:
    _check_int("n_fft", n_fft, 2, 1 << 24)
    _check_int("hop", hop, 1, 1 << 24)
    if window.numel() > n_fft:
        raise ValueError(f"win_length must be at most n_fft, {n_fft}; got {window.numel()}")
    if audio.ndim < 1 or audio.shape[-1] < 1:
        raise ValueError(f"audio must hold at least one sample, got shape {tuple(audio.shape)}")
    # torch.stft's own constant padding refuses audio shorter than half a window
    padded = F.pad(audio.to(window.dtype).reshape(-1, audio.shape[-1]), (n_fft // 2, n_fft // 2))
    length = window.numel()
    spectrum = torch.stft(padded, n_fft, hop, length, window, center=False, return_complex=True)
    return spectrum.reshape(*audio.shape[:-1], *spectrum.shape[1:])


def _real(audio: Tensor) -> torch.dtype:
    """The dtype to compute in: at least float32."""
    if not isinstance(audio, Tensor) or not audio.is_floating_point():
        came = audio.dtype if isinstance(audio, Tensor) else type(audio).__name__
        raise TypeError(f"audio must be a floating point tensor, got {came}")
    return torch.promote_types(audio.dtype, torch.float32)


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} .. {high}, got {value}")

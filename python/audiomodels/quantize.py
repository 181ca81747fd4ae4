"""Audio <-> integer codes: mu-law with any number of levels, linear 8 bit, linear 16 bit.

    mu-law:         y = sign(x) ln(1 + mu |x|) / ln(1 + mu),  mu = n_class - 1,  code = floor((y + 1) / 2 * mu + 1/2)
    linear 8 bit:   the same without the companding, y = x
    linear 16 bit:  code = round(32768 x) + 32768, so that every 16-bit PCM sample keeps its own code

mu-law is torchaudio's formula (torchaudio.functional.mu_law_encoding), which is WaveNet's (van den Oord 2016, section
2.2) with rounding. One rule for all encoders: samples outside [-1, 1], infinities included, are clipped; NaN is an
error. Silence (0.0) has the code n_class // 2, from which a WaveNet starts; as 256 levels have no middle one, that code
decodes to a little more than 0 (mu-law 0.00009, linear 8 bit 0.0039).
"""

from __future__ import annotations

from math import log1p

import torch
from torch import Tensor

from audiomodels._constants import constant

COMPANDINGS = ("mulaw", "linear")


def code_dtype(n_class: int) -> torch.dtype:
    """The integer type that holds the codes 0 .. n_class - 1: uint8, int16 above 256 classes, int32 above 32768."""
    return torch.uint8 if n_class <= 256 else torch.int16 if n_class <= 32768 else torch.int32


def encode(audio: Tensor, companding: str = "mulaw", n_class: int = 256) -> Tensor:
    """Codes of `audio` by the companding's name, "mulaw" or "linear"; see mulaw_encode and linear_encode."""
    return (mulaw_encode if _is_mulaw(companding) else linear_encode)(audio, n_class)


def decode(codes: Tensor, companding: str = "mulaw", n_class: int = 256) -> Tensor:
    """Audio of `codes` by the companding's name, "mulaw" or "linear"; see mulaw_decode and linear_decode."""
    return (mulaw_decode if _is_mulaw(companding) else linear_decode)(codes, n_class)


def mulaw_encode(audio: Tensor, n_class: int = 256) -> Tensor:
    """mu-law codes of audio.

    audio: any shape, floating point (half precision is widened to float32), full scale is [-1, 1]; what lies outside is
    clipped. n_class: 2 .. 65536. Returns codes 0 .. n_class - 1 of the same shape; uint8, int16 above 256 classes,
    int32 above 32768. Errors: TypeError if audio is not floating point, ValueError if it holds NaN or n_class is out of
    range. Source: torchaudio.functional.mu_law_encoding.
    """
    mu = _levels(n_class, "mulaw") - 1
    audio = _checked_audio(audio)
    companded = torch.sign(audio) * torch.log1p(mu * torch.abs(audio)) / log1p(mu)
    return ((companded + 1) / 2 * mu + 0.5).to(code_dtype(n_class))


def mulaw_decode(codes: Tensor, n_class: int = 256) -> Tensor:
    """float32 audio in [-1, 1] of mu-law codes (any integer type, any shape): the inverse of mulaw_encode.

    Errors: TypeError if codes are not integers, ValueError if one is not in 0 .. n_class - 1. Source:
    torchaudio.functional.mu_law_decoding.
    """
    _levels(n_class, "mulaw")
    return _look_up(_mulaw_table(n_class), codes)


def linear_encode(audio: Tensor, n_class: int = 256) -> Tensor:
    """Linear codes of audio; n_class is 256, or 65536 (16-bit PCM plus 32768). Else as mulaw_encode."""
    levels = _levels(n_class, "linear")
    audio = _checked_audio(audio)
    if levels == 256:
        return ((audio + 1) / 2 * 255 + 0.5).to(torch.uint8)
    return (torch.round(audio * 32768) + 32768).clamp_(max=65535).to(torch.int32)


def linear_decode(codes: Tensor, n_class: int = 256) -> Tensor:
    """float32 audio in [-1, 1] of linear codes; n_class is 256 or 65536. Else as mulaw_decode."""
    _levels(n_class, "linear")
    return _look_up(_linear_table(n_class), codes)


def _is_mulaw(companding: str) -> bool:
    if companding not in COMPANDINGS:
        raise ValueError(f"companding must be one of {', '.join(COMPANDINGS)}; got {companding!r}")
    return companding == "mulaw"


def _levels(n_class: int, companding: str) -> int:
    if isinstance(n_class, bool) or not isinstance(n_class, int):
        raise TypeError(f"n_class must be an int; got {type(n_class).__name__}")
    if companding == "linear" and n_class not in (256, 65536):
        raise ValueError(f"n_class must be 256 or 65536 for linear codes; got {n_class}")
    if not 2 <= n_class <= 65536:
        raise ValueError(f"n_class must be in 2 .. 65536; got {n_class}")
    return n_class


def _checked_audio(audio: Tensor) -> Tensor:
    if not isinstance(audio, Tensor) or not audio.is_floating_point():
        # Integer PCM would be taken for samples far out of range and clipped to a square wave.
        kind = audio.dtype if isinstance(audio, Tensor) else type(audio).__name__
        raise TypeError(f"audio must be a floating-point tensor with full scale [-1, 1]; got {kind}")
    if torch.isnan(audio).any():
        raise ValueError(f"audio must not hold NaN; got {int(torch.isnan(audio).sum())} of {audio.numel()} samples")
    wide = audio if audio.dtype in (torch.float32, torch.float64) else audio.float()
    return wide.clamp(-1, 1)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"codes must be an integer tensor; got {kind}")
    index = codes.long()
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= len(table)):
        raise ValueError(f"codes must be in 0 .. {len(table) - 1}; got {int(index.min())} .. {int(index.max())}")
    return table.to(codes.device)[index]


@constant(8)
def _mulaw_table(n_class: int) -> Tensor:
    y = torch.arange(n_class, dtype=torch.float64) / (n_class - 1) * 2 - 1
    return (torch.sign(y) * torch.expm1(torch.abs(y) * log1p(n_class - 1)) / (n_class - 1)).float()


@constant(2)
def _linear_table(n_class: int) -> Tensor:
    code = torch.arange(n_class, dtype=torch.float64)
    return (code / 255 * 2 - 1 if n_class == 256 else (code - 32768) / 32768).float()

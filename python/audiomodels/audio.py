"""Audio files in and out: soundfile reads and writes, soxr resamples, and one exception covers every bad file.

A file is untrusted: its header is checked against the limits below before any memory is taken, and it is decoded block
by block, so that a file costs at most what `max_seconds` allows, whatever its header claims or its contents unpack to.
Two things are never done silently, but with a Python warning of the category `AudioNotice`: resampling, and clipping
on writing. `warnings.simplefilter("error", AudioNotice)` makes them errors, `"ignore"` drops them.
"""

from __future__ import annotations

import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from audiomodels._optional import require

MAKER = "audiokernels"  # of written files, in their metadata
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1000, 768000
MAX_CHANNELS = 64
_BLOCK_SAMPLES = 1 << 18  # what is decoded at a time, all channels together: 1 MB as float32
_UNKNOWN_SIZE = 0x7FFF0000  # a program that writes into a pipe puts a size from here up for "not known yet"
_CLAIM = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_OPEN_END = re.compile(r"^Ogg: (Last page lacks an end-of-stream bit|Junk after the last page)", re.MULTILINE)


class AudioError(ValueError):
    """An audio file that cannot be read or written; the message names the file and the rule."""


class AudioNotice(UserWarning):
    """Something was done to the audio that was not asked for in so many words: resampled, clipped, skipped."""


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says. `frames` counts samples of one channel; `format` and `subtype` as soundfile says."""

    frames: int
    sample_rate: int
    channels: int
    format: str
    subtype: str

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate


def audio_info(path: str | os.PathLike) -> AudioInfo:
    """The header of an audio file, checked like read_audio's but without a limit on its length. Errors: AudioError."""
    with _opened(path) as handle:
        return _checked_header(path, handle, math.inf)


def read_audio(
    path: str | os.PathLike, *, sample_rate: int | None = None, max_seconds: float = 3600.0
) -> tuple[Tensor, int]:
    """Read a file as mono: (audio float32 (time,), sample rate in Hz).

    Channels are averaged. Full scale is [-1, 1]; a file of floats may go beyond, and is returned as it is. With
    `sample_rate`, a file of another rate is resampled (soxr HQ), with an AudioNotice; without, it keeps its own.
    Peak memory is about twice the result's.

    Errors: AudioError (a ValueError) where the file is missing, not a regular file, not audio, damaged, truncated or
    empty, is longer than `max_seconds` or does not state its length, has a sample rate outside 1000 .. 768000 Hz or
    more than 64 channels, or holds NaN or infinity. ValueError for a wrong argument.
    """
    audio, info = read_mono(path, sample_rate=sample_rate, max_seconds=max_seconds)
    if sample_rate is not None and sample_rate != info.sample_rate:
        warnings.warn(f"{path}: resampled from {info.sample_rate} to {sample_rate} Hz", AudioNotice, stacklevel=2)
    return audio, sample_rate or info.sample_rate


def read_mono(
    path: str | os.PathLike, *, sample_rate: int | None = None, max_seconds: float = 3600.0
) -> tuple[Tensor, AudioInfo]:
    """read_audio without its notice, for callers that give one for many files: (audio, the file's own header)."""
    if sample_rate is not None:
        check_sample_rate(sample_rate)
    if not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive; got {max_seconds}")
    with _opened(path) as handle:
        info = _checked_header(path, handle, max_seconds)
        blocks = _mono_blocks(path, handle, info, max_seconds)
        if sample_rate is not None and sample_rate != info.sample_rate:
            blocks = _resampled(blocks, info.sample_rate, sample_rate)
        try:
            audio = np.concatenate(list(blocks))
        except MemoryError:
            raise AudioError(f"{path}: {info.seconds:.0f} s do not fit in memory; lower max_seconds") from None
    if not len(audio):
        raise AudioError(f"{path}: {info.frames} samples at {info.sample_rate} Hz are none at {sample_rate} Hz")
    if not np.isfinite(audio).all():
        raise AudioError(f"{path}: samples must be finite; some overflow when resampled")
    return torch.from_numpy(audio), info


def write_audio(path: str | os.PathLike, audio: Tensor | np.ndarray, sample_rate: int) -> None:
    """Write mono audio as 16-bit PCM, WAV or FLAC by the suffix (.wav, .flac), at once or not at all.

    audio: (time,) floating point, full scale [-1, 1]; what lies outside is clipped, with an AudioNotice. The file is
    written beside its place and then renamed, so that a reader never sees half of it. It says that it was made here
    (`is_ours`). A file of 16-bit samples that was read comes back bit for bit. Errors: TypeError or ValueError for a
    wrong argument (NaN and infinity among them), AudioError where the file cannot be written.
    """
    check_sample_rate(sample_rate)
    path = Path(path)
    formats = {".wav": "WAV", ".flac": "FLAC"}
    if path.suffix.lower() not in formats:
        raise ValueError(f"path must end in {' or '.join(formats)}; got {str(path)!r}")
    samples = audio.detach().cpu().numpy() if isinstance(audio, Tensor) else np.asarray(audio)
    if samples.dtype.kind != "f" or samples.ndim != 1:
        raise TypeError(f"audio must be floating point of shape (time,); got {samples.dtype} {samples.shape}")
    if not len(samples):
        raise ValueError("audio must hold at least one sample; got none")
    if not np.isfinite(samples).all():
        raise ValueError(f"audio must be finite; got {int((~np.isfinite(samples)).sum())} samples of NaN or infinity")
    outside = int((np.abs(samples) > 1).sum())
    if outside:
        peak = float(np.abs(samples).max())
        text = f"{path}: {outside} of {len(samples)} samples lie outside [-1, 1] (peak {peak:.3g}) and are clipped"
        warnings.warn(text, AudioNotice, stacklevel=2)
    codes = np.clip(np.rint(samples.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)
    soundfile = require("soundfile")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        kind = {"format": formats[path.suffix.lower()], "subtype": "PCM_16"}
        with soundfile.SoundFile(_name(part), "w", sample_rate, 1, **kind) as file:
            file.software = MAKER
            file.write(codes)
        os.replace(part, path)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"{path}: cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def is_ours(path: str | os.PathLike) -> bool:
    """Whether a file is sound that `write_audio` wrote, which the same command may write anew."""
    try:
        with _opened(path) as file:
            return file.software.startswith(MAKER)
    except AudioError:
        return False


def check_sample_rate(sample_rate: int) -> None:
    """Raise TypeError or ValueError unless `sample_rate` is an int in 1000 .. 768000 (Hz)."""
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int):
        raise TypeError(f"sample_rate must be an int; got {type(sample_rate).__name__}")
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise ValueError(f"sample_rate must be in {MIN_SAMPLE_RATE} .. {MAX_SAMPLE_RATE} Hz; got {sample_rate}")


def _name(path) -> str | bytes:
    """A path as soundfile takes it: it encodes text itself, and fails at a name that is not UTF-8."""
    name = os.fsdecode(path)
    return name if name.isprintable() else os.fsencode(name)


def _opened(path):
    soundfile = require("soundfile")
    try:
        # A pipe or a device would block or never end, so it is not even opened.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AudioError(f"{path}: is not a regular file")
        return soundfile.SoundFile(_name(path))
    except OSError as error:
        raise AudioError(f"{path}: {error.strerror or error}") from error
    # soundfile raises TypeError for headerless formats, the others for headers that it cannot even represent.
    except (soundfile.SoundFileError, TypeError, ValueError, MemoryError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{path}: is not a readable audio file ({error})") from error


def _checked_header(path, handle, max_seconds: float) -> AudioInfo:
    info = AudioInfo(handle.frames, handle.samplerate, handle.channels, handle.format, handle.subtype)
    if not MIN_SAMPLE_RATE <= info.sample_rate <= MAX_SAMPLE_RATE:
        rule = f"{MIN_SAMPLE_RATE} .. {MAX_SAMPLE_RATE} Hz"
        raise AudioError(f"{path}: its sample rate must be in {rule}; its header claims {info.sample_rate}")
    if not 1 <= info.channels <= MAX_CHANNELS:
        raise AudioError(f"{path}: must have 1 .. {MAX_CHANNELS} channels; its header claims {info.channels}")
    if info.frames <= 0:
        raise AudioError(f"{path}: holds no samples")
    if info.frames >= 1 << 62:
        raise AudioError(f"{path}: its header does not state a length; write it anew, e.g. with flac or sox")
    if info.seconds > max_seconds:
        raise AudioError(f"{path}: may last {max_seconds:g} s at most; its header claims {info.seconds:.1f} s")
    # libsndfile shortens a truncated file to what is there, and says so only in its log.
    open_end = _OPEN_END.search(handle.extra_info)
    if open_end:
        raise AudioError(f"{path}: is truncated ({open_end[1].lower()})")
    claim = _CLAIM.search(handle.extra_info)
    if claim and int(claim[2]) < int(claim[1]) < _UNKNOWN_SIZE:
        raise AudioError(f"{path}: is truncated; its header claims {claim[1]} bytes, {claim[2]} are there")
    return info


def _mono_blocks(path, handle, info: AudioInfo, max_seconds: float) -> Iterator[np.ndarray]:
    soundfile = require("soundfile")
    buffer = np.empty((_BLOCK_SAMPLES // info.channels, info.channels), np.float32)
    count = 0
    while True:
        try:
            block = handle.read(out=buffer)
        except (soundfile.SoundFileError, ValueError, MemoryError) as error:
            raise AudioError(f"{path}: is damaged after {count} samples ({error})") from error
        if not len(block):
            break
        count += len(block)
        if count > max_seconds * info.sample_rate:
            raise AudioError(f"{path}: may last {max_seconds:g} s at most; it holds more")
        mono = block.mean(axis=1, dtype=np.float64).astype(np.float32)
        if not np.isfinite(mono).all():
            raise AudioError(f"{path}: samples must be finite; it holds NaN or infinity")
        yield mono
    # An MP3 without a length in its first frame has it only estimated.
    if count < info.frames and info.format != "MP3" or not count:
        raise AudioError(f"{path}: is truncated; its header claims {info.frames} samples, {count} are there")


def _resampled(blocks: Iterator[np.ndarray], rate_in: int, rate_out: int) -> Iterator[np.ndarray]:
    stream = require("soxr").ResampleStream(rate_in, rate_out, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)

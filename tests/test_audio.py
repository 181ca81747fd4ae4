"""audio.py: what it reads and writes, and that a hostile file gives AudioError or a valid read, at little memory.

The mutated files and the header bombs are read in one fresh process, this file run as a script (see the end).
"""

import faulthandler
import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audiomodels import _optional
from audiomodels.audio import AudioError, AudioInfo, AudioNotice, audio_info, is_ours, read_audio, write_audio
from audiomodels.data import clips

RATE = 16000
FORMATS = [  # six families, some of them with a codec beside plain PCM
    ("wav", "WAV", "PCM_16"),
    ("wav", "WAV", "FLOAT"),
    ("wav", "WAV", "IMA_ADPCM"),
    ("flac", "FLAC", "PCM_16"),
    ("ogg", "OGG", "VORBIS"),
    ("ogg", "OGG", "OPUS"),
    ("aiff", "AIFF", "PCM_16"),
    ("au", "AU", "PCM_16"),
    ("caf", "CAF", "PCM_16"),
    ("caf", "CAF", "ALAC_16"),
    ("mp3", "MP3", "MPEG_LAYER_III"),
]


def sine(frequency, seconds=1.0, rate=RATE, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def peak_of(audio, rate):
    """(frequency, amplitude) of a sine, from the middle of `audio`."""
    middle = audio[len(audio) // 4 : len(audio) // 4 + len(audio) // 2].double().numpy()
    window = np.hanning(len(middle))
    spectrum = np.abs(np.fft.rfft(middle * window, 1 << 20))
    return spectrum.argmax() * rate / (1 << 20), 2 * spectrum.max() / window.sum()


# ------------------------------------------------------------------------------------------------------------ reading


def test_every_bundled_clip_reads_as_its_manifest_says():
    rows = [json.loads(line) for line in (clips() / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        audio, rate = read_audio(clips() / row["path"])
        assert rate == 16000 and audio.dtype == torch.float32 and audio.ndim == 1 and 0.01 < audio.abs().max() <= 1
        assert len(audio) / rate == pytest.approx(row["seconds"], abs=0.001)
        assert row["path"] in (clips() / "LICENSES").read_text()
    assert len(rows) == len(list(clips().rglob("*.flac"))) == 23


@pytest.mark.parametrize("suffix, kind, subtype", FORMATS)
def test_formats(tmp_path, suffix, kind, subtype):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, sine(1000), RATE, format=kind, subtype=subtype)
    audio, rate = read_audio(path)
    assert rate == RATE and abs(len(audio) - RATE) < 700
    frequency, amplitude = peak_of(audio, rate)
    assert frequency == pytest.approx(1000, abs=1) and amplitude == pytest.approx(0.5, rel=0.03)
    assert audio_info(path) == AudioInfo(len(audio), RATE, 1, kind, subtype)


@pytest.mark.parametrize("subtype, bits", [("PCM_U8", 8), ("PCM_16", 16), ("PCM_24", 24), ("PCM_32", 25)])
def test_bit_depths(tmp_path, subtype, bits):
    wanted = sine(440)
    soundfile.write(tmp_path / "a.wav", wanted, RATE, subtype=subtype)
    audio, _ = read_audio(tmp_path / "a.wav")
    assert np.abs(audio.numpy() - wanted).max() <= 1.01 * 2 ** (1 - bits)


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_float_files_are_returned_as_they_are(tmp_path, subtype):
    wanted = sine(440) * 3
    soundfile.write(tmp_path / "a.wav", wanted, RATE, subtype=subtype)
    assert np.array_equal(read_audio(tmp_path / "a.wav")[0].numpy(), wanted)


@pytest.mark.parametrize("channels", [2, 3, 8])
def test_channels_are_averaged(tmp_path, channels):
    # Longer than one block, so that the blocks have to join.
    parts = np.stack([sine(200 * (n + 1), 20) for n in range(channels)], axis=1)
    soundfile.write(tmp_path / "a.wav", parts, RATE, subtype="FLOAT")
    audio, _ = read_audio(tmp_path / "a.wav")
    assert np.abs(audio.numpy() - parts.mean(axis=1, dtype=np.float64)).max() < 1e-7


def test_blocks_join_without_a_seam(tmp_path):
    noise = np.random.default_rng(0).integers(-32768, 32767, 600_011).astype(np.int16)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"a.{suffix}", noise, 44100)
        assert np.array_equal(read_audio(tmp_path / f"a.{suffix}")[0].numpy() * 32768, noise)


# --------------------------------------------------------------------------------------------------------- resampling


RATES = [(44100, 16000), (48000, 8000), (8000, 16000), (22050, 16000), (16000, 8000)]


@pytest.mark.parametrize("rate_in, rate_out", RATES)
def test_resampling_keeps_frequency_level_and_length(tmp_path, rate_in, rate_out):
    soundfile.write(tmp_path / "a.wav", sine(1000, 13, rate_in), rate_in, subtype="FLOAT")
    with pytest.warns(AudioNotice, match=f"resampled from {rate_in} to {rate_out} Hz"):
        audio, rate = read_audio(tmp_path / "a.wav", sample_rate=rate_out)
    assert rate == rate_out and abs(len(audio) - 13 * rate_out) <= 1
    frequency, amplitude = peak_of(audio, rate)
    assert frequency == pytest.approx(1000, abs=0.1) and amplitude == pytest.approx(0.5, rel=0.002)
    expected = sine(1000, 13, rate_out)[rate_out : 12 * rate_out]
    assert np.abs(audio.numpy()[rate_out : 12 * rate_out] - expected).max() < 2e-4


def test_resampling_removes_what_would_alias(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(7000, 2, 48000), 48000, subtype="FLOAT")
    with pytest.warns(AudioNotice):
        audio, _ = read_audio(tmp_path / "a.wav", sample_rate=8000)
    assert audio[4000:12000].abs().max() < 1e-3


def test_no_notice_where_nothing_was_done(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(100), RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_audio(tmp_path / "a.wav")
        read_audio(tmp_path / "a.wav", sample_rate=RATE)
        write_audio(tmp_path / "b.wav", torch.tensor([1.0, -1.0]), RATE)


# --------------------------------------------------------------------------------------------------------- bad files


def wav(data=b"\0" * 200, *, claim=None, rate=RATE, channels=1, bits=16, code=1, align=None, fmt_size=16):
    """A WAV file, field by field, so that each can be a lie."""
    align = channels * bits // 8 if align is None else align
    fmt = struct.pack("<HHIIHH", code, channels & 0xFFFF, rate, rate * align & 0xFFFFFFFF, align & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack("<I", fmt_size) + fmt
    body += b"data" + struct.pack("<I", len(data) if claim is None else claim) + data
    return b"RIFF" + struct.pack("<I", len(body) if claim is None else 0xFFFFFFFF) + body


def refused(path, words, **options):
    with pytest.raises(AudioError, match=words) as caught:
        read_audio(path, **options)
    assert str(path) in str(caught.value)


def test_missing_folder_device_pipe_and_text(tmp_path):
    refused(tmp_path / "none.wav", "No such file")
    refused(tmp_path, "not a regular file")
    refused(Path("/dev/zero"), "not a regular file")
    os.mkfifo(tmp_path / "pipe.wav")
    refused(tmp_path / "pipe.wav", "not a regular file")
    for name, content in (("empty.wav", b""), ("text.wav", b"no sound here" * 100), ("a.raw", b"\0" * 1000)):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "not a readable audio file")
    with pytest.raises(AudioError):
        read_audio("nul\0byte.wav")
    with pytest.raises(AudioError, match="not a regular file"):
        audio_info(tmp_path)


def test_a_file_without_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
    refused(tmp_path / "a.wav", "holds no samples")
    soundfile.write(tmp_path / "b.wav", np.zeros(1), 48000)
    refused(tmp_path / "b.wav", "1 samples at 48000 Hz are none at 1000 Hz", sample_rate=1000)


@pytest.mark.parametrize("suffix, kind, subtype", [f for f in FORMATS if f[0] != "mp3"] + [("w64", "W64", "PCM_16")])
def test_truncated(tmp_path, suffix, kind, subtype):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, RATE), RATE, format=kind, subtype=subtype)
    whole = path.read_bytes()
    for share in (0.9, 0.5, 0.1):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path, "truncated|damaged|not a readable audio file")


def test_a_truncated_mp3_is_what_is_left_of_it(tmp_path):
    path = tmp_path / "a.mp3"
    soundfile.write(path, sine(440, 4), RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 0.3 * 4 * RATE < len(read_audio(path)[0]) < 0.7 * 4 * RATE


def test_a_length_left_open_by_a_pipe_is_no_error(tmp_path):
    for claim in (0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFF - 36):
        (tmp_path / "a.wav").write_bytes(wav(b"\1\0" * 500, claim=claim))
        assert len(read_audio(tmp_path / "a.wav")[0]) == 500


def test_a_flac_that_states_no_length(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.flac").write_bytes(flac(total=0))
    refused(tmp_path / "a.flac", "does not state a length")
    with pytest.raises(AudioError, match="does not state a length"):
        audio_info(tmp_path / "a.flac")


def test_a_decoder_that_ends_early(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", sine(100), RATE)
    read, given = soundfile.SoundFile.read, iter([9000, 0])
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda handle, out: read(handle, out=out)[: next(given)])
    refused(tmp_path / "a.wav", "is truncated; its header claims 16000 samples, 9000 are there")


def test_a_decoder_that_does_not_end(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", sine(100), RATE)
    monkeypatch.setattr(soundfile.SoundFile, "frames", property(lambda _: 100))
    assert len(read_audio(tmp_path / "a.wav")[0]) == RATE
    refused(tmp_path / "a.wav", "may last 0.5 s at most; it holds more", max_seconds=0.5)


@pytest.mark.parametrize("rate", [0, 999, 768001, 1 << 31, (1 << 32) - 1])
def test_sample_rate_limits(tmp_path, rate):
    (tmp_path / "a.wav").write_bytes(wav(rate=rate))
    refused(tmp_path / "a.wav", "sample rate must be in 1000 .. 768000 Hz|not a readable")


def test_limits_themselves_are_allowed(tmp_path):
    for rate, channels in ((1000, 1), (768000, 64)):
        (tmp_path / "a.wav").write_bytes(wav(b"\0" * 1280, rate=rate, channels=channels))
        assert read_audio(tmp_path / "a.wav")[1] == rate
    (tmp_path / "a.wav").write_bytes(wav(b"\0" * 1300, channels=65))
    refused(tmp_path / "a.wav", "1 .. 64 channels; its header claims 65")


def test_max_seconds(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE * 2), RATE)
    assert len(read_audio(tmp_path / "a.wav", max_seconds=2)[0]) == 2 * RATE
    refused(tmp_path / "a.wav", "may last 1.9 s at most; its header claims 2.0 s", max_seconds=1.9)
    assert audio_info(tmp_path / "a.wav").seconds == 2
    assert len(read_audio(tmp_path / "a.wav", max_seconds=math.inf)[0]) == 2 * RATE


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 5000, 299_999])
def test_samples_that_are_not_numbers(tmp_path, bad, at):
    audio = np.stack([sine(100, 20), sine(150, 20)], axis=1)[:300_000]
    audio[at, at % 2] = bad
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    refused(tmp_path / "a.wav", "samples must be finite; it holds NaN or infinity")
    with pytest.raises(AudioError, match="finite"):
        read_audio(tmp_path / "a.wav", sample_rate=8000)


def test_samples_that_overflow(tmp_path):
    loud = np.full((1000, 2), 3e38, np.float32)
    soundfile.write(tmp_path / "a.wav", loud, RATE, subtype="FLOAT")
    assert torch.equal(read_audio(tmp_path / "a.wav")[0], torch.full((1000,), 3e38))
    refused(tmp_path / "a.wav", "some overflow when resampled", sample_rate=44100)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"sample_rate": 0}, ValueError, "sample_rate must be in 1000 .. 768000 Hz; got 0"),
        ({"sample_rate": 1 << 40}, ValueError, "sample_rate"),
        ({"sample_rate": 16000.0}, TypeError, "sample_rate must be an int; got float"),
        ({"max_seconds": 0}, ValueError, "max_seconds must be positive; got 0"),
        ({"max_seconds": math.nan}, ValueError, "max_seconds"),
    ],
)
def test_wrong_arguments_of_read(options, error, words):
    with pytest.raises(error, match=words) as caught:
        read_audio(clips() / "music/choir.flac", **options)
    assert not isinstance(caught.value, AudioError)


def test_a_missing_package_names_the_extra():
    with pytest.raises(ImportError, match=r"no_such_package is needed here: pip install 'audiokernels\[train\]'"):
        _optional.require("no_such_package", "train")
    assert _optional.require("json") is json


def test_a_package_whose_library_does_not_load_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("raise OSError('libmissing.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"audiokernels\[models\].*libmissing"):
        _optional.require("half_installed")


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("suffix", ["wav", "flac", "WAV"])
def test_written_samples_come_back_bit_for_bit(tmp_path, suffix):
    audio = torch.arange(-32768, 32768).float() / 32768
    path = tmp_path / f"a.{suffix}"
    write_audio(path, audio, 44100)
    back, rate = read_audio(path)
    assert rate == 44100 and torch.equal(back, audio)
    assert audio_info(path) == AudioInfo(65536, 44100, 1, suffix.upper(), "PCM_16")
    assert os.listdir(tmp_path) == [path.name]


def test_write_takes_arrays_and_other_precisions(tmp_path):
    for audio in (sine(100), sine(100).astype(np.float64), torch.tensor(sine(100)).double(), sine(100)[::-3]):
        write_audio(tmp_path / "a.wav", audio, RATE)
        assert np.abs(read_audio(tmp_path / "a.wav")[0].numpy() - np.asarray(audio)).max() <= 0.51 / 32768


def test_write_clips_with_a_notice(tmp_path):
    with pytest.warns(AudioNotice, match=r"2 of 4 samples lie outside \[-1, 1\] \(peak 2\) and are clipped"):
        write_audio(tmp_path / "a.wav", torch.tensor([0.0, 1.5, -2.0, 0.5]), RATE)
    assert read_audio(tmp_path / "a.wav")[0].tolist() == [0.0, 32767 / 32768, -1.0, 0.5]


@pytest.mark.parametrize(
    "name, audio, rate, error, words",
    [
        ("a.wav", torch.tensor([0.0, math.nan]), RATE, ValueError, "audio must be finite; got 1 sample"),
        ("a.wav", torch.tensor([math.inf]), RATE, ValueError, "audio must be finite"),
        ("a.wav", torch.zeros(2, 3), RATE, TypeError, r"audio must be floating point of shape \(time,\)"),
        ("a.wav", torch.zeros(3, dtype=torch.int16), RATE, TypeError, "audio must be floating point"),
        ("a.wav", torch.zeros(0), RATE, ValueError, "audio must hold at least one sample"),
        ("a.mp3", torch.zeros(3), RATE, ValueError, "path must end in .wav or .flac; got .*a.mp3"),
        ("a.wav", torch.zeros(3), 16, ValueError, "sample_rate must be in 1000"),
        ("no/a.wav", torch.zeros(3), RATE, AudioError, "cannot be written"),
        ("a.flac", torch.zeros(3), 700_001, AudioError, "cannot be written"),
    ],
)
def test_wrong_writes_leave_nothing(tmp_path, name, audio, rate, error, words):
    with pytest.raises(error, match=words):
        write_audio(tmp_path / name, audio, rate)
    assert os.listdir(tmp_path) == []


def test_a_reader_never_sees_half_a_file(tmp_path):
    write_audio(tmp_path / "a.wav", torch.full((100,), 0.25), RATE)
    with open(tmp_path / "a.wav", "rb") as reader:
        before = (tmp_path / "a.wav").read_bytes()
        write_audio(tmp_path / "a.wav", torch.zeros(100), RATE)
        assert reader.read() == before != (tmp_path / "a.wav").read_bytes()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    write_audio(path, torch.tensor([0.25]), RATE)

    def half(file, data):
        Path(os.fsdecode(file.name)).write_bytes(b"RIFF")
        raise OSError("No space left on device")

    monkeypatch.setattr(soundfile.SoundFile, "write", half)
    with pytest.raises(AudioError, match="cannot be written: No space left"):
        write_audio(path, torch.zeros(1000), RATE)
    assert os.listdir(tmp_path) == ["a.wav"] and read_audio(path)[0].tolist() == [0.25]


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_file_says_that_it_was_made_here(tmp_path, suffix):
    path, other = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    write_audio(path, torch.tensor([0.25]), RATE)
    soundfile.write(other, [0.25], RATE)
    (tmp_path / "c.wav").write_text("audiokernels")
    assert is_ours(path) and not is_ours(other) and not is_ours(tmp_path / "c.wav")


# -------------------------------------------------------------------------------------- hostile files, in one process


def mutant(whole: bytes, seed: str) -> bytes:
    """One seeded mutation: bits, bytes and sizes in the header or anywhere, cuts, copies and insertions."""
    rng, data = random.Random(seed), bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        area = min(len(data), rng.choice((48, 256, len(data))))
        at = rng.randrange(max(1, area - 8))
        length = rng.choice((1, 4, 64, 1024))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at : at + 4] = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0)).to_bytes(4, "little")
        elif kind == 3:
            data[at : at + 8] = rng.randrange(1 << 64).to_bytes(8, "big")
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = rng.randbytes(length)
        else:
            data[at:at] = data[at // 2 : at // 2 + length]
        if len(data) < 16:
            break
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 and len(data) > 1 else data)


def chunk(name: bytes, data: bytes, claim: int | None = None, order: str = "<I") -> bytes:
    return name + struct.pack(order, len(data) if claim is None else claim) + data


def flac(total=None, rate=None, channels=None, samples=None) -> bytes:
    """A FLAC file with a STREAMINFO that may lie (20 bits rate, 3 channels - 1, 5 bits - 1, 36 total samples)."""
    path = Path(f"base-{os.getpid()}.flac")
    soundfile.write(path, sine(440, 0.1) if samples is None else samples, RATE)
    data = bytearray(path.read_bytes())
    path.unlink()
    bits = int.from_bytes(data[18:26], "big")
    for value, shift, width in ((rate, 44, 20), (None if channels is None else channels - 1, 41, 3), (total, 0, 36)):
        if value is not None:
            bits = bits & ~(((1 << width) - 1) << shift) | value << shift
    data[18:26] = bits.to_bytes(8, "big")
    return bytes(data)


def silence(suffix, kind, subtype, seconds, rate) -> bytes:
    """Much silence in a small file."""
    path = Path(f"base-{os.getpid()}.{suffix}")
    with soundfile.SoundFile(path, "w", rate, 1, subtype, format=kind) as handle:
        for _ in range(seconds):
            handle.write(np.zeros(rate, np.int16))
    data = path.read_bytes()
    path.unlink()
    return data


def ogg_with_granule(granule: int) -> bytes:
    """An Ogg Vorbis file whose last page claims to end at sample `granule`, with the page's checksum made right."""
    path = Path(f"base-{os.getpid()}.ogg")
    soundfile.write(path, sine(440), RATE)
    data = bytearray(path.read_bytes())
    path.unlink()
    page = data.rindex(b"OggS")
    data[page + 6 : page + 14] = granule.to_bytes(8, "little")
    data[page + 22 : page + 26] = b"\0" * 4
    crc = 0
    for byte in data[page:]:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 if crc & 1 << 31 else crc << 1) & 0xFFFFFFFF
    data[page + 22 : page + 26] = crc.to_bytes(4, "little")
    return bytes(data)


def aiff(frames=100, channels=1, rate=b"\x40\x0c\xfa" + b"\0" * 7, claim=None):
    """`rate` is an 80-bit float, by default 16000."""
    comm = chunk(b"COMM", struct.pack(">hIh", channels, frames, 16) + rate, order=">I")
    ssnd = chunk(b"SSND", b"\0" * 208, claim, ">I")
    return chunk(b"FORM", b"AIFF" + comm + ssnd, order=">I")


def au(size=200, rate=RATE, channels=1, offset=24, encoding=3):
    return struct.pack(">4sIIIII", b".snd", offset, size, encoding, rate, channels) + b"\0" * 200


def caf(size=None, rate=float(RATE), channels=1, per_packet=1, bits=16, kind=b"lpcm", extra=b""):
    desc = struct.pack(">d4sIIIII", rate, kind, 0, 2 * channels & 0xFFFFFFFF, per_packet, channels, bits)
    data = chunk(b"data", b"\0" * 204, size, ">q")
    return b"caff\0\1\0\0" + chunk(b"desc", desc, order=">q") + extra + data


def bombs():
    """(name, contents): headers that claim what is not there, and small files that unpack to much."""
    top32, top63 = 0xFFFFFFFF, (1 << 63) - 1
    tail, plain = wav()[12:], flac(samples=np.zeros(1000, np.int16))
    pakt = struct.pack(">qqii", top63, top63, 0, 0)
    long_flac = silence("flac", "FLAC", "PCM_16", 3660, RATE)
    yield "flac of 2^36 - 1 samples", flac(total=(1 << 36) - 1)
    yield "flac of 97 bytes and 2^36 - 1 samples", flac(total=(1 << 36) - 1)[:97]
    yield "flac of 2^36 - 1 samples, 8 channels", flac(total=(1 << 36) - 1, channels=8, rate=655350)
    yield "flac of no stated length", flac(total=0)
    yield "flac within the limit by its claim", flac(total=339 * 655350, rate=655350)
    yield "flac of rate 0", flac(rate=0)
    yield "flac of rate 1 Hz", flac(rate=1)
    yield "flac of rate 2^20 - 1 Hz", flac(rate=(1 << 20) - 1)
    yield "flac that unpacks to 234 MB", long_flac
    short = bytearray(long_flac)
    short[18:26] = (int.from_bytes(short[18:26], "big") >> 36 << 36 | 1000).to_bytes(8, "big")
    yield "the same, claiming 1000 samples", bytes(short)
    short[18:26] = (int.from_bytes(short[18:26], "big") >> 36 << 36).to_bytes(8, "big")
    yield "the same, claiming nothing", bytes(short)
    yield "flac with a picture of 16 MB", b"fLaC\x06\xff\xff\xff" + plain[4:]
    yield "flac with 2^32 comments", b"fLaC\x04\0\0\x08\0\0\0\0" + b"\xff" * 4 + plain[4:]
    for suffix, kind, subtype in (f for f in FORMATS if f[2] in ("ALAC_16", "OPUS", "MPEG_LAYER_III")):
        yield f"{subtype} that unpacks to 67 MB".lower(), silence(suffix, kind, subtype, 350, 48000)
    yield "wav of 4 GiB", wav(claim=top32)
    yield "wav of 4 GiB less 64 K", wav(claim=top32 - 0xFFFF)
    yield "wav of 2 GiB less 64 K", wav(claim=0x7FFEFFFF)
    yield "wav of 65535 channels", wav(channels=65535, align=2)
    yield "wav of 1024 channels", wav(b"\0" * 4096, channels=1024)
    yield "wav of 0 channels", wav(channels=0, align=2)
    yield "wav of 0 bits", wav(bits=0)
    yield "wav of 65535 bits", wav(bits=65535, align=2)
    yield "wav of rate 2^32 - 1", wav(rate=top32)
    yield "wav with a format chunk of 4 GiB", wav(fmt_size=top32)
    yield "wav of ima adpcm, 65535 a block", wav(code=0x11, align=65535, bits=4)
    yield "wav of ms adpcm, 1 a block", wav(code=2, align=1, bits=4)
    yield "wav with a list of 4 GiB", wav()[:12] + chunk(b"LIST", b"INFOISFT", top32) + tail
    yield "wav with a text of 2 GiB", wav()[:12] + chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"a", 1 << 31)) + tail
    yield "wav with 2^32 cues", wav()[:12] + chunk(b"cue ", b"\xff" * 28) + tail
    yield "wav with 2^32 loops", wav()[:12] + chunk(b"smpl", b"\xff" * 60) + tail
    yield "wav with 20,000 chunks", wav()[:12] + chunk(b"junk", b"") * 20_000 + tail
    ds64 = chunk(b"ds64", struct.pack("<QQQI", top63, top63, top63, top32))
    yield "rf64 of 2^63 bytes", b"RF64" + b"\xff" * 4 + b"WAVE" + ds64 + tail
    yield "wav behind an id3 tag of 256 MB", b"ID3\3\0\0\x7f\x7f\x7f\x7f" + wav()
    yield "aiff of 2^32 frames", aiff(frames=top32, claim=top32)
    yield "aiff of 32767 channels", aiff(channels=32767)
    yield "aiff of an infinite rate", aiff(rate=b"\x7f\xff" + b"\x80" + b"\0" * 7)
    yield "aiff of a huge rate", aiff(rate=b"\x60\0" + b"\xff" * 8)
    yield "au of 4 GiB", au(size=top32 - 1)
    yield "au of 2^32 channels", au(channels=top32)
    yield "au with its samples at 4 GiB", au(offset=top32)
    yield "caf of 2^63 bytes", caf(size=top63)
    yield "caf of 2^32 channels", caf(channels=top32)
    yield "caf of an infinite rate", caf(rate=math.inf)
    yield "caf of rate NaN", caf(rate=math.nan)
    yield "caf with 2^63 packets", caf(kind=b"alac", per_packet=4096, extra=chunk(b"pakt", pakt, order=">q"))
    yield "caf with a packet table of 2^63", caf(kind=b"alac", extra=chunk(b"pakt", pakt, top63, ">q"))
    yield "caf with texts of 2^62 bytes", caf(extra=chunk(b"info", b"\xff" * 8, 1 << 62, ">q"))
    yield "ogg that ends at 2^62", ogg_with_granule(1 << 62)
    yield "ogg that ends at 2^40", ogg_with_granule(1 << 40)
    yield "ogg that ends within the limit", ogg_with_granule(339 * RATE)
    nist = b"NIST_1A\n   1024\nchannel_count -i 1\nsample_rate -i 16000\nsample_n_bytes -i 2\n"
    nist += b"sample_byte_format -s2 01\nsample_count -i 1000000000000000000\nend_head\n"
    yield "nist of 10^18 samples", nist.ljust(1200, b"\0")
    yield "voc block of 16 MB", b"Creative Voice File\x1a\x1a\0\x0a\x01\x29\x11\1\xff\xff\xff\xa5\0" + b"\0" * 100
    yield "matlab matrix of 2^31", struct.pack("<IIIII", 0, 1, 0x7FFFFFFF, 0, 11) + b"samplerate\0" + b"\0" * 200


def run_child(folder, *arguments):
    """Read the files in `folder` (see `child`) in a fresh process and check what it reports."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(folder), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["other"] == []
    assert report["slowest"][0] < 10
    assert report["growth_mb"] <= 64
    return report


def write_sources(folder):
    notes = np.concatenate([sine(440, 0.1), sine(660, 0.1)])
    for number, (suffix, kind, subtype) in enumerate(FORMATS):
        audio = np.stack([notes, notes[::-1]], axis=1) if number % 2 else notes
        soundfile.write(folder / f"source-{number:02d}.{suffix}", audio, RATE, subtype, format=kind)


def check_mutants(tmp_path, count, seed):
    write_sources(tmp_path)
    report = run_child(tmp_path, count, seed)
    assert report["refused"] + report["read"] == count
    # Were all refused, or none, then nothing would have been tried.
    assert min(report["refused"], report["read"]) > count / 10


def test_500_mutated_files(tmp_path):
    check_mutants(tmp_path, 500, "short")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_5000_mutated_files(tmp_path, seed):
    check_mutants(tmp_path, 5000, seed)


def test_bombs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)
    count = 0
    for count, (name, contents) in enumerate(bombs(), 1):  # noqa: B007
        (tmp_path / f"bomb {count:02d} {name.replace('/', ' ')}.bin").write_bytes(contents)
    # Honest headers before holes that take no disk: 2 GiB of samples, and 64 channels that make 6 MB of mono.
    for name, size, options in (
        ("mono", 0x7FFE0000, {}),
        ("wide", 64 * 2 * 48000 * 30, {"rate": 48000, "channels": 64}),
    ):
        (tmp_path / f"bomb {name}.bin").write_bytes(wav(b"", claim=size, **options))
        os.truncate(tmp_path / f"bomb {name}.bin", size + 44)
    report = run_child(tmp_path)
    assert report["refused"] + report["read"] == count + 2 >= 50 and report["refused"] >= 40


def high_water_mb() -> float:
    """The process's peak memory. On Linux not getrusage, where a child starts with what its parent had reached."""
    try:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def child(folder, count="0", seed=""):
    """Read each bomb of `folder`, and `count` mutants of its sources; print what came of them as JSON."""
    warnings.simplefilter("ignore", AudioNotice)
    report = {"read": 0, "refused": 0, "other": [], "slowest": [0.0, ""]}

    def trial(name, path, sample_rate):
        print(name, flush=True)
        faulthandler.dump_traceback_later(60, exit=True)
        start = time.perf_counter()
        try:
            audio, rate = read_audio(path, sample_rate=sample_rate, max_seconds=340)
            report["read"] += 1
            valid = audio.dtype == torch.float32 and audio.ndim == 1 and len(audio) and bool(audio.isfinite().all())
            if not valid or not 1000 <= rate <= 768000 or rate != (sample_rate or rate):
                report["other"].append([name, f"{audio.dtype} {audio.shape} at {rate}"])
        except AudioError:
            report["refused"] += 1
        except BaseException as error:
            report["other"].append([name, repr(error)])
        report["slowest"] = max(report["slowest"], [time.perf_counter() - start, name])
        faulthandler.cancel_dump_traceback_later()

    sources = sorted(Path(folder).glob("source*"))
    for source in sources:  # what the libraries set up once is not counted
        read_audio(source), read_audio(source, sample_rate=8000)
    before = high_water_mb()
    for number, path in enumerate(sorted(Path(folder).glob("bomb*"))):
        trial(path.name, path, None if number % 2 else 44100)
    for number in range(int(count)):
        source = sources[number % len(sources)]
        path = source.with_name("mutant" + source.suffix)
        path.write_bytes(mutant(source.read_bytes(), f"{seed}:{number}"))
        trial(f"{source.name} {seed}:{number}", path, None if number % 3 else 8000)
    print(json.dumps({**report, "growth_mb": high_water_mb() - before}))


if __name__ == "__main__":
    child(*sys.argv[1:])

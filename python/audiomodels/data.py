"""Recordings as integer codes, their division into splits, and random crops of them for training.

A data set is a folder of audio files, some files, a `manifest.jsonl` as shared by the corpus builder (one JSON object a
line: path, part, split, seconds, labels, source, license, detail), or a pack of codes, `<part>_<split>.mulaw.npz`.

Splits are made by group (a piece, a voice, takes of one sound), never by clip, and never change: they depend on
nothing but the group's name. Three splits, train, dev (every choice) and test (read once, at the end); `valid` is dev
and test together. Where the manifest names a split it stands, and its `valid` is divided into dev and test.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from audiomodels import quantize
from audiomodels.audio import AudioError, AudioNotice, check_sample_rate, read_mono

SUFFIXES = (".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".snd", ".w64", ".wav")
VALID_SHARE = 2000  # of 10,000 groups, where the data itself names no split
MAX_PACK_BYTES = 4 << 30  # 4 GiB is 74 hours of 8-bit codes at 16 kHz

# Words that tell takes and variants of one sound apart, as in the corpus builder.
_TAKE_WORDS = (
    "soft|softest|hard|hardest|med|medium|low|high|miss|big|small|huge|large|tiny|a|b|c|hit|die|l|r|inside|outside|"
    "start|shutdown"
)


def clips() -> Path:
    """The folder of recordings that comes with the package: 23 clips, 67.6 s at 16 kHz, with LICENSES and manifest."""
    return Path(str(files("audiomodels") / "clips"))


@dataclass(frozen=True, eq=False)
class Recording:
    """One recording. codes: (time,) integers; group: what must stay on one side of a split; label: its index in
    Recordings.label_names; condition: (frames, channels) float32 or codes (frames,), filled by models that use one."""

    name: str
    codes: Tensor
    group: str
    label: int | None = None
    condition: Tensor | None = None


class Recordings(Sequence):
    """A list of `Recording`s of one sample rate (Hz), companding and number of classes."""

    def __init__(
        self,
        recordings: Iterable[Recording],
        *,
        sample_rate: int,
        companding: str = "mulaw",
        n_class: int = 256,
        label_names: Sequence[str] = (),
    ):
        self._list = list(recordings)
        self.sample_rate, self.companding, self.n_class = sample_rate, companding, n_class
        self.label_names = tuple(label_names)

    def __len__(self) -> int:
        return len(self._list)

    def __getitem__(self, index):
        return self._like(self._list[index]) if isinstance(index, slice) else self._list[index]

    def __repr__(self) -> str:
        kind = f"{self.companding} {self.n_class} at {self.sample_rate} Hz"
        return f"Recordings({len(self)} of {kind}, {self.seconds:.1f} s)"

    @property
    def n_sample(self) -> int:
        """Samples of all recordings together."""
        return sum(len(recording.codes) for recording in self)

    @property
    def seconds(self) -> float:
        return self.n_sample / self.sample_rate

    @property
    def labels(self) -> Tensor | None:
        """(len(self),) int64 global labels, or None where the recordings carry none."""
        if any(recording.label is None for recording in self):
            return None
        return torch.tensor([recording.label for recording in self], dtype=torch.int64)

    def cut(self, fraction: float) -> tuple[Recordings, Recordings]:
        """(head, tail): each recording's first `fraction` of time, and the rest. For a data set of one recording, which
        cannot be split by group. Of a recording too short for both, one side is left out; ValueError where no recording
        is long enough for one of them."""
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1; got {fraction}")
        if any(recording.condition is not None for recording in self):
            raise ValueError("cut takes recordings without a local condition")
        head, tail = [], []
        for recording in self:
            border = round(len(recording.codes) * fraction)
            for side, codes in ((head, recording.codes[:border]), (tail, recording.codes[border:])):
                if len(codes):
                    side.append(replace(recording, codes=codes))
        for side, use in ((head, "train"), (tail, "test")):
            if not side:
                what = self[0].name if len(self) == 1 else f"{len(self)} recordings"
                raise ValueError(f"{what}: too short, nothing is left to {use} on")
        return self._like(head), self._like(tail)

    def _like(self, recordings: Iterable[Recording]) -> Recordings:
        return Recordings(
            recordings,
            sample_rate=self.sample_rate,
            companding=self.companding,
            n_class=self.n_class,
            label_names=self.label_names,
        )

    @classmethod
    def load(
        cls,
        source: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        sample_rate: int,
        companding: str = "mulaw",
        n_class: int = 256,
        split: str | None = None,
        part: str | None = None,
        labels: Sequence[str] | None = None,
    ) -> Recordings:
        """Read, resample and encode a data set.

        source: a folder (its manifest.jsonl where it has one, else every audio file below it; a file is a group of its
        own), a manifest.jsonl, a .npz pack (its rate, mu-law and 256 classes must be the ones asked for), one audio
        file, or several files. split: "train", "valid" (= "dev" and "test"), "dev", "test", or None for all of it.
        part: a part of the manifest, such as "piano". labels: names; a recording's label is the index of the one among
        them that it carries. Files of another rate are resampled, with one AudioNotice for all of them; another says
        how many samples lay beyond full scale and were clipped. In a folder, a file that cannot be read is left out,
        with an AudioNotice; elsewhere it is an error.

        Errors: AudioError (a ValueError) for files, a manifest or a pack that cannot be used, or where nothing is
        left; ValueError for a wrong argument, such as a split that does not exist: the message lists those that do.
        """
        check_sample_rate(sample_rate)
        quantize.encode(torch.zeros(1), companding, n_class)
        if isinstance(source, str | os.PathLike) and Path(source).suffix == ".npz":
            rows, codes_of = _pack_rows(Path(source), sample_rate, companding, n_class), _packed_codes
        else:
            rows, codes_of = _file_rows(source), _Encoder(sample_rate, companding, n_class)
        rows = _select(rows, source, part, split)
        recordings, failure = [], None
        for row in rows:
            try:
                codes = codes_of(row)
            except AudioError as error:
                if not row.get("optional"):
                    raise
                failure = error
                warnings.warn(f"left out: {error}", AudioNotice, stacklevel=2)
                continue
            label = _label(row, labels) if labels is not None else None
            recordings.append(Recording(row["path"], codes, " | ".join(groups_of(row)), label))
        if not recordings:
            raise AudioError(f"{source}: none of its {len(rows)} audio files can be read; the last: {failure}")
        if isinstance(codes_of, _Encoder):
            codes_of.give_notice(source)
        return cls(
            recordings, sample_rate=sample_rate, companding=companding, n_class=n_class, label_names=labels or ()
        )


class Crops:
    """Random crops for training: `crops(step)` -> codes (batch, context + length + 1), a pure function of (seed, step).

    The last `length` codes of a row are the targets that the loss counts; the `context` + 1 codes before them are what
    the model sees to the left of the first. So inputs are row[:-1], targets row[1:], and the loss takes the last
    `length` positions. A draw picks a sample uniformly among all samples of all recordings, puts it at a uniformly
    random place among the targets, and then slides the crop until its targets lie within the recording. Each sample
    further than `length` from an end is thus equally likely, and a recording's share is its share of the samples; at
    the very ends of a recording it is down to half of that (no choice of whole crops can make it even there). What lies
    before the recording is silence, n_class // 2: in the context, and in targets too where it is shorter than `length`.

    recordings: at least one sample in all. batch, length >= 1, context >= 0, 0 <= seed < 2**64.
    """

    def __init__(self, recordings: Recordings, *, batch: int, length: int, context: int, seed: int = 0):
        for name, value, least in (("batch", batch, 1), ("length", length, 1), ("context", context, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in 0 .. 2**64 - 1; got {seed}")
        if not recordings.n_sample:
            raise ValueError("recordings must hold at least one sample; got none")
        self.recordings, self.batch, self.length, self.context, self.seed = recordings, batch, length, context, seed
        self._ends = np.cumsum([len(recording.codes) for recording in recordings])

    @property
    def data(self) -> str:
        """What is drawn from, in words that other recordings hardly have: for a run that may be resumed with others."""
        return in_words((recording.name, recording.codes) for recording in self.recordings)

    def places(self, step: int) -> tuple[list[int], list[int]]:
        """Of each row of the batch at `step`: the recording's index, and the sample of it that is the first target
        (negative in a recording shorter than `length`)."""
        if not 0 <= step < 1 << 64:
            raise ValueError(f"step must be in 0 .. 2**64 - 1; got {step}")
        # Only Philox's raw numbers are used: numpy promises that these, unlike its distributions, never change.
        raw = np.random.Philox(key=np.array([self.seed, step], np.uint64)).random_raw(2 * self.batch).tolist()
        which, first = [], []
        for sample, place in zip(raw[0::2], raw[1::2], strict=True):
            sample = sample * int(self._ends[-1]) >> 64
            index = int(np.searchsorted(self._ends, sample, side="right"))
            size = len(self.recordings[index].codes)
            start = sample - (int(self._ends[index]) - size) - (place * self.length >> 64)
            which.append(index)
            first.append(min(max(start, 0), size - self.length))
        return which, first

    def __call__(self, step: int) -> Tensor:
        """Codes (batch, context + length + 1), of the recordings' integer type, of training step `step` >= 0."""
        silence = self.recordings.n_class // 2
        dtype = self.recordings[0].codes.dtype
        crops = torch.full((self.batch, self.context + self.length + 1), silence, dtype=dtype)
        for row, index, first in zip(crops, *self.places(step), strict=True):
            codes = self.recordings[index].codes[max(first - self.context - 1, 0) : first + self.length]
            row[len(row) - len(codes) :] = codes
        return crops

    def audio(self, step: int) -> Tensor:
        """The targets of `step` as sound, float32 (batch, length): what a model of waveforms, not of codes, trains on.
        Recordings of 65536 linear classes are 16-bit sound."""
        return quantize.decode(self(step)[:, -self.length :], self.recordings.companding, self.recordings.n_class)


# -------------------------------------------------------------------------------------------------- groups and splits


def split_of(group: str) -> str:
    """ "train", "dev" or "test" for a group that no manifest has placed: 80, 10 and 10 % of all groups."""
    return half_of(group) if _digest("recording:" + group) % 10000 < VALID_SHARE else "train"


def half_of(group: str) -> str:
    """ "dev" or "test": the side of a group of the validation set."""
    return ("dev", "test")[_digest("dev:" + group) % 2]


def voice_sides(voices: Iterable[str]) -> dict[str, str]:
    """voice -> "train", "dev" or "test": in the order of a hash of their names, the first is the test, the second dev.

    For data of so few voices that a split by shares would leave a side empty. ValueError below three voices.
    """
    order = sorted(set(voices), key=lambda voice: hashlib.sha256(f"voice:{voice}".encode()).digest())
    if len(order) < 3:
        raise ValueError(f"voices must be at least three to hold two out, got {len(order)}")
    return {voice: "train" for voice in order} | {order[0]: "test", order[1]: "dev"}


def groups_of(row: dict) -> tuple[str, ...]:
    """The groups that a manifest row belongs to; a mixture belongs to those of all its sources.

    "group" in the row stands. Else, for the corpus builder's rows: piano by piece, speech by voice, sounds by source
    recording (takes and variants together, told by their names), rendered notes by soundfont and program. Else the
    path without its suffix.
    """
    if row.get("group"):
        return (str(row["group"]),)
    source, labels = row.get("source") or "", row.get("labels") or []
    if row.get("part") == "speech" and labels:
        return (f"voice:{labels[-1]}",)
    if row.get("part") == "piano" and source:
        return (source.split(" + ")[0],)
    if ":" not in source:
        return (str(PurePosixPath(row["path"]).with_suffix("")),)
    return tuple(sorted({group for key in source.split(" | ") for group in _source_groups(key)}))


def _source_groups(key: str) -> list[str]:
    rendered = re.fullmatch(r"([^:]+):programs? \[?([\d, ]+)\]?( phrase \d+)?", key)
    if rendered:
        return [f"{rendered[1]}:program {int(number)}" for number in rendered[2].split(",")]
    package, _, path = key.partition(":")
    if package == "voice":  # a clip of the corpus's own speech: its speaker's
        return [f"voice:{path.partition('/')[0]}"]
    words = re.sub(rf"\b({_TAKE_WORDS})\b", " ", file_words(PurePosixPath(path).stem))
    return [f"{package}:{PurePosixPath(path).parent.name}:{' '.join(words.split())}"]


def file_words(stem: str) -> str:
    """A file's name as words: "FootStepGrass1" -> "foot step grass"."""
    return re.sub(r"[^a-z]+", " ", re.sub(r"([a-z])([A-Z])", r"\1 \2", stem).lower()).strip()


def in_words(sounds: Iterable[tuple[str, Tensor]]) -> str:
    """Sounds (name, samples (time,)), in words that others hardly have: number, length, a digest of the starts."""
    digest, number, samples = hashlib.sha256(), 0, 0
    for name, sound in sounds:
        digest.update(f"{name} {len(sound)} ".encode(errors="surrogateescape"))
        digest.update(sound[:4096].numpy().tobytes())
        number, samples = number + 1, samples + len(sound)
    return f"{number} recordings, {samples} samples, {digest.hexdigest()[:8]}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "big")


def _splits_of(row: dict) -> set[str]:
    """The names under which a row can be asked for. A mixture of groups of two sides belongs to neither."""
    groups = groups_of(row)
    named = row.get("split")
    if named == "valid":
        return {"valid"} if row.get("undivided") else {"valid"} | _only(half_of(group) for group in groups)
    if named:
        return {named, "valid"} if named in ("dev", "test") else {named}
    names = _only(split_of(group) for group in groups)
    return names | {"valid"} if names & {"dev", "test"} else names


def _only(names: Iterable[str]) -> set[str]:
    found = set(names)
    return found if len(found) == 1 else set()


def _select(rows: list[dict], source, part: str | None, split: str | None) -> list[dict]:
    if part is not None:
        parts = sorted({row["part"] for row in rows if row.get("part") is not None})
        rows = [row for row in rows if row.get("part") == part]
        if not rows:
            rule = f"one of {', '.join(parts)}" if parts else f"left out: {source} has no parts"
            raise ValueError(f"part must be {rule}; got {part!r}")
    if split is None:
        return rows
    names = [_splits_of(row) for row in rows]
    known = {"train", "valid", "dev", "test"}.union(*names)
    if split not in known:
        raise ValueError(f"split must be one of {', '.join(sorted(known))}; got {split!r}")
    chosen = [row for row, name in zip(rows, names, strict=True) if split in name]
    if not chosen:
        count = Counter(name for row in names for name in row)
        held = ", ".join(f"{name} {count[name]}" for name in sorted(known))
        why = "groups are placed by a fixed hash, so a small data set may leave a side empty: see Recordings.cut"
        if any(row.get("undivided") for row in rows):
            why = "a pack needs its manifest.jsonl beside it to tell dev from test"
        raise AudioError(f"{source}: split {split!r} holds none of the {len(rows)} recordings ({held}); {why}")
    return chosen


# ------------------------------------------------------------------------------------------------ rows of a data set


def rows_of(source: str | os.PathLike, *, part: str | None = None, split: str | None = None) -> list[dict]:
    """The rows of a folder or manifest that Recordings.load would read, each with "file", the place of its audio."""
    return _select(_file_rows(source), source, part, split)


def _file_rows(source) -> list[dict]:
    """Manifest rows, each with "file", the place of its audio, added; "optional" where it may be left out."""
    if not isinstance(source, str | os.PathLike):
        paths = [Path(path) for path in source]
        if not paths:
            raise AudioError("the list of files is empty")
        return [{"path": path.name, "file": path} for path in paths]
    source = Path(source)
    if source.is_dir():
        if (source / "manifest.jsonl").is_file():
            return _manifest_rows(source / "manifest.jsonl")
        found = (path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        paths = sorted(path for path in found if not path.name.startswith("."))
        if not paths:
            raise AudioError(f"{source}: the folder holds no audio files ({' '.join(SUFFIXES)})")
        return [{"path": path.relative_to(source).as_posix(), "file": path, "optional": True} for path in paths]
    if source.suffix == ".jsonl":
        return _manifest_rows(source)
    return [{"path": source.name, "file": source}]


def _manifest_rows(manifest: Path) -> list[dict]:
    rows = []
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AudioError(f"{manifest}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise AudioError(f"{manifest}, line {number}: must be a JSON object with a path")
        for key, kind in (("labels", list), ("source", str), ("split", str), ("part", str)):
            if not isinstance(row.get(key, kind()), kind):
                raise AudioError(f"{manifest}, line {number}: {key} must be a {kind.__name__}")
        relative = PurePosixPath(row["path"])
        # A manifest from elsewhere must not make this read files outside its own folder.
        if relative.is_absolute() or ".." in relative.parts or not relative.name:
            raise AudioError(f"{manifest}, line {number}: path must stay below the manifest; got {row['path']!r}")
        rows.append({**row, "file": manifest.parent / relative, "optional": False, "undivided": False})
    if not rows:
        raise AudioError(f"{manifest}: holds no recordings")
    return rows


def _pack_rows(path: Path, sample_rate: int, companding: str, n_class: int) -> list[dict]:
    """Rows of a pack, each with its "codes". The manifest.jsonl beside it, where there is one, tells the sources."""
    codes, offsets, names, labels, rate = _read_pack(path)
    for name, asked, held in (
        ("sample_rate", sample_rate, rate),
        ("companding", companding, "mulaw"),
        ("n_class", n_class, 256),
    ):
        if asked != held:
            raise ValueError(f"{name} must be {held}, as in {path}; got {asked}")
    manifest = path.with_name("manifest.jsonl")
    known = {row["path"]: row for row in _manifest_rows(manifest)} if manifest.is_file() else {}
    rows = []
    for index, name in enumerate(names):
        part, _, rest = name.partition("/")
        row = {"path": name, "part": part, "split": rest.partition("/")[0], "labels": labels[index]}
        row["undivided"] = part != "speech"  # only a voice is told by the labels, other groups need the source
        rows.append({**known.get(name, row), "codes": codes[offsets[index] : offsets[index + 1]]})
    return rows


def _read_pack(path: Path):
    try:
        with np.load(path, allow_pickle=False) as pack:
            size = sum(entry.file_size for entry in pack.zip.infolist())
            if size > MAX_PACK_BYTES:
                raise AudioError(f"{path}: may unpack to {MAX_PACK_BYTES} bytes at most; it claims {size}")
            codes, offsets, rate = pack["codes"], pack["offsets"], int(pack["rate"])
            names, labels = pack["paths"].tolist(), [json.loads(text) for text in pack["labels"].tolist()]
    except AudioError:
        raise
    except (OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, AttributeError) as error:
        raise AudioError(f"{path}: is not a pack of codes ({error})") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise AudioError(f"{path}: is not a pack of codes ({error})") from error
    whole = codes.dtype == np.uint8 and codes.ndim == 1 and offsets.dtype.kind in "iu" and offsets.ndim == 1
    if not whole or len(offsets) != len(names) + 1 or len(labels) != len(names) or not names:
        raise AudioError(f"{path}: codes, offsets, paths and labels do not fit together")
    if offsets[0] != 0 or offsets[-1] != len(codes) or (np.diff(offsets) <= 0).any():
        raise AudioError(f"{path}: offsets must rise from 0 to the {len(codes)} codes")
    if not all(isinstance(name, str) for name in names) or not all(isinstance(label, list) for label in labels):
        raise AudioError(f"{path}: paths must be texts and labels lists")
    return torch.from_numpy(codes), offsets.tolist(), names, labels, rate


def _packed_codes(row: dict) -> Tensor:
    return row["codes"]


class _Encoder:
    """File -> codes, counting what is to be told about all of the files together."""

    def __init__(self, sample_rate: int, companding: str, n_class: int):
        self.sample_rate, self.companding, self.n_class = sample_rate, companding, n_class
        self.rates, self.samples, self.clipped = Counter(), 0, 0

    def __call__(self, row: dict) -> Tensor:
        audio, info = read_mono(row["file"], sample_rate=self.sample_rate)
        self.rates[info.sample_rate] += 1
        self.samples += len(audio)
        self.clipped += int((audio.abs() > 1).sum())
        return quantize.encode(audio, self.companding, self.n_class)

    def give_notice(self, source) -> None:
        others = {rate: count for rate, count in sorted(self.rates.items()) if rate != self.sample_rate}
        if others:
            text = ", ".join(f"{count} from {rate} Hz" for rate, count in others.items())
            told = f"{source}: resampled to {self.sample_rate} Hz ({text}, of {sum(self.rates.values())} files)"
            warnings.warn(told, AudioNotice, stacklevel=3)
        if self.clipped:
            told = f"{source}: {self.clipped} of {self.samples} samples lay beyond full scale and were clipped"
            warnings.warn(told, AudioNotice, stacklevel=3)


def _label(row: dict, labels: Sequence[str]) -> int:
    carried = [index for index, name in enumerate(labels) if name in (row.get("labels") or [])]
    if len(carried) != 1:
        raise ValueError(f"labels must name one label of each recording; {row['path']} carries {row.get('labels')}")
    return carried[0]

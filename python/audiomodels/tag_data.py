"""Clips with labels, for taggers: FSD50K as it is downloaded, the corpus's tags and pitch, and batches of one second.

FSD50K (Fonseca et al., arXiv 2010.00475) is a folder that holds

    FSD50K.dev_audio/<fname>.wav   FSD50K.ground_truth/dev.csv         fname,labels,mids,split   (split: train or val)
    FSD50K.eval_audio/<fname>.wav  FSD50K.ground_truth/eval.csv        fname,labels,mids
                                   FSD50K.ground_truth/vocabulary.csv  index,label,mid

and gives the splits train, dev (its val) and test (its eval). The corpus is a folder with manifest.jsonl and
labels.json, parts `tags` (mixtures of two seconds), `tags_src` (the recordings they are mixed from, for training on
fresh mixtures) and `pitch` (chords; the labels are MIDI numbers). Its splits are those of data.py, by source; pitch is
split by clip, and by instrument: five General MIDI programs are never trained on, the split "unseen" has them alone.

Batches are a pure function of (seed, step), so every model that is trained with one seed hears the same.
"""

from __future__ import annotations

import csv
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from audiomodels.audio import AudioError, AudioNotice, check_sample_rate, read_mono
from audiomodels.data import groups_of, half_of, in_words, rows_of

HELD_OUT_PROGRAMS = {6, 22, 42, 60, 73}  # harpsichord, harmonica, cello, French horn, flute
MAX_CSV_BYTES = 64 << 20
EVENTS = (0.5, 0.85)  # share of mixtures of one event, of one or two; the rest have three


@dataclass(frozen=True, eq=False)
class TagClips:
    """Clips of audio, int16 (time,) each, with labels (clips, n_class) bool, whose names are `names`."""

    audio: list[Tensor]
    labels: Tensor
    names: tuple[str, ...]
    sample_rate: int
    groups: tuple[str, ...] = ()  # what the clips of a bootstrap are drawn by

    def __len__(self) -> int:
        return len(self.audio)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(audio float32 (time,), labels (n_class,) bool)."""
        return self.audio[index].float() / 32768, self.labels[index]

    @property
    def seconds(self) -> float:
        return sum(map(len, self.audio)) / self.sample_rate

    def only(self, indices: Iterable[int]) -> TagClips:
        """These clips alone."""
        indices = list(indices)
        groups = tuple(self.groups[i] for i in indices) if self.groups else ()
        return replace(self, audio=[self.audio[i] for i in indices], labels=self.labels[indices], groups=groups)

    @classmethod
    def load(cls, source: str | os.PathLike, *, split: str, part: str = "tags", sample_rate: int = 16000) -> TagClips:
        """Read a split of FSD50K or of a part of the corpus.

        Args:
            source: the folder.
            split: "train", "dev" or "test"; of the corpus's pitch also "unseen".
            part: of the corpus: "tags", "tags_src" or "pitch".
            sample_rate: Hz; files of another rate are resampled, with one AudioNotice.

        Raises:
            AudioError, ValueError: naming the file or argument and the rule.
        """
        check_sample_rate(sample_rate)
        source = Path(source)
        if (source / "FSD50K.ground_truth").is_dir():
            names, rows = _fsd50k_rows(source / "FSD50K.ground_truth", split)
        elif (source / "manifest.jsonl").is_file():
            names, rows = _corpus_rows(source, part, split)
        else:
            raise AudioError(f"{source}: must hold FSD50K.ground_truth, or a manifest.jsonl with labels.json")
        index = {name: i for i, name in enumerate(names)}
        labels = torch.zeros(len(rows), len(names), dtype=torch.bool)
        for mine, (file, wanted, _) in zip(labels, rows, strict=True):
            for name in wanted:
                if name not in index:
                    raise AudioError(f"{file}: its label {name!r} is none of the {len(names)} of the vocabulary")
                mine[index[name]] = True
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and resampling leave Python's lock
            read = list(pool.map(lambda row: _read(row[0], sample_rate), rows))
        others = sum(rate != sample_rate for _, rate in read)
        if others:
            told = f"{source}: resampled to {sample_rate} Hz ({others} of {len(read)} files)"
            warnings.warn(told, AudioNotice, stacklevel=2)
        return cls([audio for audio, _ in read], labels, names, sample_rate, tuple(group for _, _, group in rows))


def training_data(source: str | os.PathLike, part: str, sample_rate: int) -> tuple[type[TagCrops], TagClips, TagClips]:
    """(how to draw batches, the clips to draw them from, dev) of FSD50K, or of the corpus's tags or pitch.

    The corpus's tags are mixed afresh from tags_src.
    """
    mixed = part == "tags" and not (Path(source) / "FSD50K.ground_truth").is_dir()
    train = TagClips.load(source, split="train", part="tags_src" if mixed else part, sample_rate=sample_rate)
    dev = TagClips.load(source, split="dev", part=part, sample_rate=sample_rate)
    return Mixtures if mixed else TagCrops, train, dev


def _read(file: Path, sample_rate: int) -> tuple[Tensor, int]:
    audio, info = read_mono(file, sample_rate=sample_rate)
    return (audio * 32768).round().clamp(-32768, 32767).to(torch.int16), info.sample_rate


# ------------------------------------------------------------------------------------------------------------- batches


class TagCrops:
    """crops(step) -> (audio (batch, sample_rate) float32, labels (batch, n_class) float32): one second of a clip each.

    Every clip is as likely as another, then every second of it; a clip shorter than a second is repeated. The second
    has all labels of its clip.
    """

    n_draw = 2

    def __init__(self, clips: TagClips, *, batch: int, seed: int = 0):
        if batch < 1:
            raise ValueError(f"batch must be at least 1; got {batch}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in 0 .. 2**64 - 1; got {seed}")
        if not len(clips):
            raise ValueError("clips must hold at least one clip; got none")
        self.clips, self.batch, self.seed = clips, batch, seed

    @property
    def data(self) -> str:
        """What is drawn from, with its labels, in words: for a run that may be resumed with others."""
        names = ("".join(map(str, row)) for row in self.clips.labels.int().tolist())
        return in_words(zip(names, self.clips.audio, strict=True))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        if not 0 <= step < 1 << 64:
            raise ValueError(f"step must be in 0 .. 2**64 - 1; got {step}")
        # Only Philox's raw numbers are used: numpy promises that these, unlike its distributions, never change.
        raw = np.random.Philox(key=np.array([self.seed, step], np.uint64)).random_raw(self.n_draw * self.batch)
        rows = [self.row(draws) for draws in (raw >> np.uint64(11)).reshape(self.batch, -1) * 2.0**-53]
        audio, labels = zip(*rows, strict=True)
        return torch.stack(audio), torch.stack(labels).float()

    def row(self, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """One second and its labels, from n_draw numbers in [0, 1)."""
        index = int(draws[0] * len(self.clips))
        audio, labels = self.clips[index]
        size = self.clips.sample_rate
        if len(audio) < size:
            audio = audio.repeat(-(-size // len(audio)))
        start = int(draws[1] * (len(audio) - size + 1))
        return audio[start : start + size], labels


class Mixtures(TagCrops):
    """crops(step) as TagCrops, but of fresh mixtures: a second of silence with one, two or three clips in it.

    As the corpus builder makes its two-second mixtures: one event in half of them, three in 15 %; a label first, each
    as likely, then one of its clips; at a random place, the first at full level, others up to 9 dB below it; the whole
    peaks between -15 and -1 dB.
    """

    n_draw = 2 + 3 * 5

    def __init__(self, clips: TagClips, *, batch: int, seed: int = 0):
        super().__init__(clips, batch=batch, seed=seed)
        carriers = [clips.labels[:, label].nonzero()[:, 0].tolist() for label in range(len(clips.names))]
        self.carriers = [indices for indices in carriers if indices]
        if not self.carriers:
            raise ValueError("clips must carry labels; none does")

    def row(self, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        size = self.clips.sample_rate
        mix, labels = torch.zeros(size), torch.zeros(len(self.clips.names), dtype=torch.bool)
        events = 1 + sum(draws[0] >= share for share in EVENTS)
        for event in range(events):
            label, clip, cut, place, level = draws[2 + 5 * event :][:5]
            carriers = self.carriers[int(label * len(self.carriers))]
            audio, mine = self.clips[carriers[int(clip * len(carriers))]]
            start = int(cut * (max(0, len(audio) - size) + 1))
            audio = audio[start : start + size]
            where = int(place * (size - len(audio) + 1))
            gain = 10 ** (-9 * level / 20) if event else 1.0
            mix[where : where + len(audio)] += audio * (gain / (float(audio.square().mean().sqrt()) + 1e-6))
            labels |= mine
        return mix * (10 ** ((-15 + 14 * draws[1]) / 20) / max(1e-6, float(mix.abs().max()))), labels


# ---------------------------------------------------------------------------------------------------------------- rows

Row = tuple[Path, Sequence[str], str]  # file, labels, group


def _fsd50k_rows(folder: Path, split: str) -> tuple[tuple[str, ...], list[Row]]:
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split must be train, dev or test; got {split!r}")
    names = tuple(row[1] for row in _csv(folder / "vocabulary.csv", 3))
    if not names or len(set(names)) != len(names):
        raise AudioError(f"{folder / 'vocabulary.csv'}: must list labels, each once")
    table, kept = ("eval.csv", None) if split == "test" else ("dev.csv", {"train": "train", "dev": "val"}[split])
    audio = folder.parent / f"FSD50K.{table.removesuffix('.csv')}_audio"
    rows = []
    for row in _csv(folder / table, 3 if kept is None else 4)[1:]:
        if not re.fullmatch(r"[\w-]+", row[0]):
            raise AudioError(f"{folder / table}: {row[0]!r} is no name of a clip")
        if kept is None or row[3] == kept:
            rows.append((audio / f"{row[0]}.wav", row[1].split(","), row[0]))
    if not rows:
        raise AudioError(f"{folder / table}: holds no clips of the split {split!r}")
    return names, rows


def _csv(path: Path, columns: int) -> list[list[str]]:
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise AudioError(f"{path}: larger than {MAX_CSV_BYTES} bytes, so it is no list of clips")
        with open(path, encoding="utf-8", newline="") as handle:
            rows = [row for row in csv.reader(handle) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AudioError(f"{path}: cannot be read: {error}") from error
    for number, row in enumerate(rows, 1):
        if len(row) < columns:
            raise AudioError(f"{path}, row {number}: must have {columns} columns, has {len(row)}")
    return rows


def _corpus_rows(folder: Path, part: str, split: str) -> tuple[tuple[str, ...], list[Row]]:
    if part not in ("tags", "tags_src", "pitch"):
        raise ValueError(f"part must be tags, tags_src or pitch; got {part!r}")
    try:
        listed = json.loads((folder / "labels.json").read_text(encoding="utf-8"))[part.removesuffix("_src")]
        names = tuple(map(str, listed))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AudioError(f"{folder / 'labels.json'}: must list the labels of {part}: {error!r}") from error
    if part == "pitch":
        rows = [row for row in rows_of(folder, part=part) if split in _pitch_splits(row)]
        if not rows:
            raise AudioError(f"{folder}: split must be train, dev, test or unseen and hold clips; got {split!r}")
        return names, [(row["file"], list(map(str, row["labels"])), row["path"]) for row in rows]
    rows = rows_of(folder, part=part, split=split)
    if part == "tags_src":  # a source may carry labels that no mixture does: they are not scored
        rows = [{**row, "labels": [name for name in row["labels"] if name in names]} for row in rows]
    return names, [(row["file"], row["labels"], " | ".join(groups_of(row))) for row in rows]


def _pitch_splits(row: dict) -> set[str]:
    """Of one clip of chords: nothing where instruments of both kinds sound together."""
    programs = {int(n) for n in re.findall(r"\d+", (row.get("source") or "").rpartition("[")[2])}
    if programs and programs <= HELD_OUT_PROGRAMS:
        return {"unseen"}
    if programs & HELD_OUT_PROGRAMS:
        return set()
    return {"train"} if row.get("split") == "train" else {half_of(row["path"])}

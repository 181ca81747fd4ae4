"""The data of a comparison: a part of a corpus as codes, split into train, dev and test by piece or by voice.

Piano is split by piece, as its manifest says. Speech is split by voice: in the order of a hash of their names, the
first voice is the test, the second dev, the others train, whatever split the manifest gives their clips. The codes are
kept in `<folder>/<part>-<companding>-<rate>.npz`, which is all that a machine without the corpus needs.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from audiomodels.audio import AudioError
from audiomodels.data import Recording, Recordings, voice_sides

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Data:
    """A part of a corpus in one companding. digest: SHA-256 of codes, groups and splits."""

    part: str
    train: Recordings
    dev: Recordings
    test: Recordings
    digest: str

    @property
    def facts(self) -> dict:
        """What a result file says of the data."""
        sizes = {name: [len(getattr(self, name)), getattr(self, name).n_sample] for name in SPLITS}
        test = sorted({recording.group for recording in self.test})
        return {"hash": self.digest, "recordings_samples": sizes, "test_groups": test, "rendered": self.part == "piano"}

    def fraction(self, share: float) -> Recordings:
        """Whole training recordings in the order of a hash of their names, up to `share` of the samples; the last one
        is cut."""
        rest, chosen = round(self.train.n_sample * share), []
        for recording in sorted(self.train, key=lambda r: hashlib.sha256(f"share:{r.name}".encode()).digest()):
            if rest > 0:
                chosen.append(Recording(recording.name, recording.codes[:rest], recording.group))
                rest -= len(recording.codes)
        return like(self.train, chosen)


def like(recordings: Recordings, chosen: list[Recording]) -> Recordings:
    """Other recordings of the same kind."""
    kind = {name: getattr(recordings, name) for name in ("sample_rate", "companding", "n_class")}
    return Recordings(chosen, **kind)


def unit_of(recordings: Recordings) -> Callable[[Recording], str]:
    """What the bootstrap draws: the source group (piece); the recording where all are of one group (one voice)."""
    if len({recording.group for recording in recordings}) > 1:
        return lambda recording: recording.group
    return lambda recording: recording.name


def load(source: Path | None, part: str, companding: str, sample_rate: int, folder: Path) -> Data:
    """The data from the .npz in `folder`; where there is none, from the corpus `source`, leaving the .npz behind."""
    path = folder / f"{part}-{companding}-{sample_rate}.npz"
    if not path.is_file():
        if source is None:
            raise AudioError(f"{path}: no such file, and no --data to make it from")
        kind = {"sample_rate": sample_rate, "companding": companding, "part": part}
        _write(path, by_voice(Recordings.load(source, **kind)) if part == "speech" else by_manifest(source, kind))
    return _read(path, part, companding, sample_rate)


def by_manifest(source: Path, kind: dict) -> dict[str, Recordings]:
    """The splits that the manifest names, its `valid` divided by a fixed hash of the group."""
    return {split: Recordings.load(source, **kind, split=split) for split in SPLITS}


def by_voice(recordings: Recordings) -> dict[str, Recordings]:
    """One voice is the test and one is dev: see data.voice_sides."""
    side = voice_sides(recording.group for recording in recordings)
    return {split: like(recordings, [r for r in recordings if side[r.group] == split]) for split in SPLITS}


def _write(path: Path, splits: dict[str, Recordings]) -> None:
    rows = [(split, recording) for split in SPLITS for recording in splits[split]]
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}")
    with open(temp, "wb") as file:
        np.savez_compressed(
            file,
            codes=np.concatenate([recording.codes.numpy() for _, recording in rows]),
            offsets=np.cumsum([0] + [len(recording.codes) for _, recording in rows]),
            names=np.array([recording.name for _, recording in rows]),
            groups=np.array([recording.group for _, recording in rows]),
            splits=np.array([split for split, _ in rows]),
        )
    os.replace(temp, path)


def _read(path: Path, part: str, companding: str, sample_rate: int) -> Data:
    try:
        with np.load(path, allow_pickle=False) as pack:
            codes, offsets = pack["codes"], pack["offsets"]
            names, groups, splits = (pack[name].tolist() for name in ("names", "groups", "splits"))
    except (OSError, ValueError, KeyError) as error:
        raise AudioError(f"{path}: not the data of a comparison ({error}); remove it to make it again") from error
    digest = hashlib.sha256(codes.tobytes())
    digest.update(repr([offsets.tolist(), groups, splits, companding, sample_rate]).encode())
    codes, sides = torch.from_numpy(codes), {split: [] for split in SPLITS}
    for i, split in enumerate(splits):
        sides[split].append(Recording(names[i], codes[offsets[i] : offsets[i + 1]], groups[i]))
    kind = {"sample_rate": sample_rate, "companding": companding}
    return Data(part, **{split: Recordings(sides[split], **kind) for split in SPLITS}, digest=digest.hexdigest())

"""`audiokernels build-corpus`: a 16 kHz corpus of piano, speech, sound events and chords from Debian and PyPI packages.

    piano/      renderings of public-domain scores (music21's collection) through a sampled grand; split by piece
    speech/     real voices in ten languages; split by voice
    tags/       two seconds of one to three sound events each, with every label of them; split by recording
    tags_src/   the recordings of tags' training side, unmixed
    pitch/      one second each of one to six notes on up to three instruments; the labels are MIDI notes
    manifest.jsonl   one JSON object a line: path, part, split, seconds, group, labels, source, license, detail
    labels.json      the labels of tags and of pitch, in the order a model should have them
    notes.jsonl      for piano/: the notes that sound, [onset s, offset s, MIDI pitch, velocity]
    sources.json     recipe, seed, rate and versions of all packages, on which alone the result depends
    <part>_<split>.mulaw.npz   with --pack: 8-bit mu-law codes of a split, which Recordings.load reads

Debian packages are downloaded with `apt-get download` into a cache and unpacked there; nothing is installed. It needs
`apt-get install ffmpeg fluidsynth` and `pip install "audiokernels[corpus]"`. The licences named in the manifest are
those of the packages' copyright files: look there before you redistribute a clip. Another part is another module
<part>.py and a line in PARTS.
"""

import collections
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audiomodels._optional import require
from audiomodels.corpus.piano import build_piano
from audiomodels.corpus.pitch import build_pitch
from audiomodels.corpus.recipe import FREE, QUICK, RECIPE, SOUNDFONTS
from audiomodels.corpus.speech import build_speech
from audiomodels.corpus.tags import build_tags
from audiomodels.corpus.tools import CorpusError, Packages, save
from audiomodels.quantize import mulaw_encode

PARTS: dict[str, Callable[["Build", Any], None]] = {
    "piano": build_piano,
    "speech": build_speech,
    "tags": build_tags,  # after speech, whose voices it mixes in
    "pitch": build_pitch,
}
VERSIONED = ("music21", "numpy", "scipy", "soundfile")


@dataclass
class CorpusConfig:
    """Where the corpus goes and what is in it."""

    out: Path  # folder, which must not hold a corpus yet
    cache: Path = field(default_factory=lambda: Path.home() / ".cache" / "audio-corpus")  # downloaded packages
    parts: tuple[str, ...] = tuple(PARTS)  # what is built
    quick: bool = False  # about two minutes of each part
    free: bool = False  # speech and tags alone, without what is under the GPL: for models that are given away
    recipe: Path | None = None  # a JSON file to build instead; parts missing there are not built
    pack: bool = False  # also write 8-bit mu-law npz files
    rate: int = 16000  # Hz
    seed: int = 0  # of all random choices
    jobs: int = os.cpu_count() or 1  # processes

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts:
            raise ValueError(f"parts must be among {', '.join(PARTS)}, got {', '.join(unknown) or 'none'}")
        if sum((self.quick, self.free, self.recipe is not None)) > 1:
            raise ValueError("quick, free and recipe exclude each other")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")


class Build:
    """One corpus in the making; a part's builder reads its settings, and calls `map` and `add`."""

    def __init__(self, config: CorpusConfig, recipe: dict[str, Any]):
        self.out, self.rate, self.seed, self.fraction = config.out, config.rate, config.seed, recipe["valid_fraction"]
        self.packages = Packages(config.cache)
        self.work = config.out / ".work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.pool = ProcessPoolExecutor(config.jobs) if config.jobs > 1 else None
        self.rows: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []
        self.labels: dict[str, list[str | int]] = {}  # part: its labels

    def map(self, function: Callable[[Any], Any], jobs: list[Any]) -> Iterable[Any]:
        """function of each job, in order."""
        return map(function, jobs) if self.pool is None else self.pool.map(function, jobs, chunksize=1 + len(jobs) // 8)

    def soundfont(self, package: str) -> tuple[Path, str]:
        """(file, licence) of a soundfont."""
        name, license_ = SOUNDFONTS[package]
        return self.packages.root(package) / name, license_

    def add(self, audio: np.ndarray, *, part: str, split: str, name: str, **row: Any) -> str:
        """Write one clip; row: labels, source, license, detail, group. Returns its path."""
        path = f"{part}/{split}/{name}.flac"
        seconds = save(self.out / path, audio, self.rate)
        self.rows.append({"path": path, "part": part, "split": split, "seconds": seconds, **row})
        return path

    def finish(self, recipe: dict[str, Any]) -> None:
        """Write what stands beside the clips."""
        for name, rows in (("manifest.jsonl", self.rows), ("notes.jsonl", self.notes)):
            (self.out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if self.labels:
            (self.out / "labels.json").write_text(json.dumps(self.labels, indent=1) + "\n")
        pypi = {}
        for name in VERSIONED:
            try:
                pypi[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue  # its part was not asked for
        facts = {"recipe": recipe["name"], "seed": self.seed, "rate": self.rate, "debian": self.packages.used}
        (self.out / "sources.json").write_text(json.dumps({**facts, "pypi": pypi}, indent=1) + "\n")
        self.close()

    def close(self) -> None:
        """End the processes, remove what lies between."""
        shutil.rmtree(self.work, ignore_errors=True)
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def pack(self) -> None:
        """8-bit mu-law codes of each part and split, in one compressed array with an index."""
        groups = collections.defaultdict(list)
        for row in self.rows:
            groups[row["part"], row["split"]].append(row)
        for (part, split), rows in sorted(groups.items()):
            clips = [
                require("soundfile", "corpus").read(str(self.out / row["path"]), dtype="float32")[0] for row in rows
            ]
            codes = [mulaw_encode(torch.from_numpy(clip)).numpy() for clip in clips]
            np.savez_compressed(
                self.out / f"{part}_{split}.mulaw.npz",
                codes=np.concatenate(codes),
                rate=self.rate,
                offsets=np.cumsum([0] + [len(c) for c in codes]),
                paths=np.array([row["path"] for row in rows]),
                labels=np.array([json.dumps(row["labels"]) for row in rows]),
            )


def build(config: CorpusConfig) -> list[dict[str, Any]]:
    """Build the corpus; returns the rows of its manifest. CorpusError says what is missing."""
    if (config.out / "manifest.jsonl").exists():
        raise CorpusError(f"{config.out}: holds a corpus already")
    recipe = QUICK if config.quick else FREE if config.free else RECIPE
    if config.recipe is not None:
        recipe = json.loads(config.recipe.read_text())
    made = Build(config, recipe)
    try:
        for part in (part for part in PARTS if part in config.parts and part in recipe):
            began = time.monotonic()
            PARTS[part](made, recipe[part])
            print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
        made.finish(recipe)
    finally:
        made.close()
    if config.pack:
        made.pack()
    return made.rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Clips and hours of each part and split."""
    seconds, clips = collections.Counter(), collections.Counter()
    for row in rows:
        seconds[row["part"], row["split"]] += row["seconds"]
        clips[row["part"], row["split"]] += 1
    return "\n".join(f"{p:9s} {s:6s} {clips[p, s]:6d} clips {seconds[p, s] / 3600:7.3f} h" for p, s in sorted(seconds))

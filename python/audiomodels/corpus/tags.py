"""The corpus's sound events: mixtures of one to three recordings, with every label of each. Split by recording.

Effects are labelled by their file names (labels.py), instruments are phrases played on a soundfont, voices come from
the corpus's own speech where that part is built. Near-duplicates (takes, velocities) are on one side together. Two
parts are written: tags, the mixtures, and tags_src, the recordings of the training side, to mix others from.
"""

import random
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from audiomodels._optional import require
from audiomodels.corpus.labels import FAMILIES, broader, labels_of
from audiomodels.corpus.tools import Note, digest, load, synthesize, trim, write_midi
from audiomodels.data import groups_of

LEAST_SECONDS, MOST_SECONDS = 0.03, 4.0  # of a recording
READ_SECONDS = 8.0  # of a file at most, before it is trimmed
HELD_OUT = 0.2  # of a label's groups
EVENTS, SHARES = (1, 2, 3), (0.5, 0.35, 0.15)  # of a mixture
PHRASE_SECONDS, PHRASE_STEP = 2.4, 2.8
SOURCE_PEAK = 0.7


@dataclass(frozen=True, eq=False)
class Sound:
    """One recording that mixtures are made of. group: what must stay on one side; side: where that is settled."""

    audio: np.ndarray
    labels: list[str]
    key: str
    group: str
    license: str
    side: str | None = None


def build_tags(build: Any, recipe: dict[str, Any]) -> None:
    """Add mixtures and their sources to the corpus."""
    rng = random.Random(f"{build.seed}:tags")
    sounds = effects(build, recipe["effects"], recipe.get("without", []))
    if "instruments" in recipe:
        sounds += phrases(build, recipe["instruments"], rng)
    sounds += voices(build, recipe.get("speech_clips", 0), rng)
    sounds = common(sounds, recipe.get("min_groups", 1))
    side = sides(sounds)
    heard = {split: mixtures(build, recipe, split, [s for s in sounds if side[s.group] == split])
             for split in recipe["clips"]}  # fmt: skip
    build.labels["tags"] = sorted(set().union(*heard.values()))
    for index, sound in enumerate(sounds):
        if side[sound.group] == "train":
            build.add(
                sound.audio * (SOURCE_PEAK / max(1e-6, float(np.abs(sound.audio).max()))),
                part="tags_src",
                split="train",
                name=f"{index:05d}",
                labels=sorted(all_labels(sound.labels)),
                source=sound.key,
                license=sound.license,
                detail={},
            )


def all_labels(labels: list[str]) -> set[str]:
    """These and the broader ones."""
    return set(labels).union(*map(broader, labels))


# --- recordings ---------------------------------------------------------------------------------------------------


def effects(build: Any, sources: list[dict[str, Any]], without: list[str]) -> list[Sound]:
    """The files of the packages whose names tell a label, without those whose licence has a text of `without` in it."""
    build.packages.fetch(source["package"] for source in sources)
    found = []
    for source in sources:
        jobs = []
        for path, key in build.packages.files(source):
            license_ = license_of(source, key)
            labels = source.get("labels") or labels_of(key, source.get("domain", "fx"))
            if labels and not any(text in license_ for text in without):
                jobs.append({"path": str(path), "key": key, "rate": build.rate, "labels": labels, "license": license_})
        for job, audio in zip(jobs, build.map(recording, jobs), strict=True):
            if audio is not None:
                (group,) = groups_of({"source": job["key"]})
                found.append(Sound(audio, job["labels"], job["key"], group, job["license"]))
    return found


def license_of(source: dict[str, Any], key: str) -> str:
    """The licence of one file: that of the first pattern in "licenses" that its path fits, or else of all."""
    path = key.partition(":")[2]
    exceptions = source.get("licenses", {})
    return next((license_ for pattern, license_ in exceptions.items() if fnmatch(path, pattern)), source["license"])


def recording(job: dict[str, Any]) -> np.ndarray | None:
    """One file without the silence at its ends; None where nothing is left."""
    try:
        audio = trim(load(Path(job["path"]), job["rate"], READ_SECONDS), job["rate"], pad=0.01)
    except (RuntimeError, ValueError) as error:  # libsndfile's errors are RuntimeErrors
        print(f"skipped {job['key']}: {str(error)[:80]}", file=sys.stderr)
        return None
    if len(audio) < LEAST_SECONDS * job["rate"]:
        return None
    return audio[: int(MOST_SECONDS * job["rate"])]


def phrases(build: Any, options: dict[str, Any], rng: random.Random) -> list[Sound]:
    """Short phrases on every instrument of a General MIDI soundfont."""
    font = options["soundfont"]
    path, license_ = build.soundfont(font)
    notes, programs, slots, start = [], [], [], 0.5
    for first, last, label in FAMILIES:
        for program in range(first, last + 1):
            for phrase in range(options["phrases"]):
                programs.append((start - 0.2, 0, program))
                notes += play(program, start, rng)
                slots.append((start, label, program, f"{font}:program {program} phrase {phrase}"))
                start += PHRASE_STEP
    midi = build.work / "phrases.mid"
    write_midi(midi, notes, programs=programs)
    audio, found = synthesize(midi, path, build.rate, gain=0.8), []
    for start, label, program, key in slots:
        begin, end = int(start * build.rate) - build.rate // 100, int((start + PHRASE_SECONDS) * build.rate)
        clip = trim(audio[begin:end], build.rate, pad=0.01)
        if len(clip):
            found.append(Sound(clip, [label], key, f"{font}:{program}", license_))
    return found


def play(program: int, start: float, rng: random.Random) -> list[Note]:
    """A phrase of 1.8 s in one key: single notes and, now and then, two at a time; a bass plays low."""
    low, high = (28, 52) if 32 <= program <= 39 else (48, 84)
    root, step = rng.randint(low, high - 8), rng.choice([0.2, 0.3, 0.45, 0.9])
    notes, now = [], start
    while now < start + 1.6:
        chord = [root + rng.choice([0, 2, 4, 5, 7, 9, 12])]
        if rng.random() < 0.3:
            chord.append(chord[0] + rng.choice([3, 4, 7]))
        notes += [(now, min(start + 1.8, now + step * 0.95), pitch, rng.randint(60, 110), 0) for pitch in chord]
        now += step
    return notes


def voices(build: Any, count: int, rng: random.Random) -> list[Sound]:
    """Up to `count` clips of the corpus's speech, on the side that their voice is on there."""
    rows = [row for row in build.rows if row["part"] == "speech"]
    rng.shuffle(rows)
    read = require("soundfile", "corpus").read
    found = []
    for row in rows[:count]:
        audio, _ = read(str(build.out / row["path"]), dtype="float32", frames=int(MOST_SECONDS * build.rate))
        side = "train" if row["split"] == "train" else "valid"
        clip = row["path"].split("/", 2)[2].removesuffix(".flac")
        found.append(Sound(audio, ["Speech"], f"voice:{clip}", row["group"], row["license"], side))
    return found


# --- labels, sides, mixtures --------------------------------------------------------------------------------------


def common(sounds: list[Sound], least: int) -> list[Sound]:
    """The sounds, where a label with fewer than `least` groups gives way to broader ones; those left without go."""
    groups = defaultdict(set)
    for sound in sounds:
        for label in sound.labels:
            groups[label].add(sound.group)
    kept = {label for label, found in groups.items() if len(found) >= least}

    def replaced(labels: list[str]) -> list[str]:
        return sorted({name for label in labels for name in ([label] if label in kept else broader(label))})

    found = [replace(sound, labels=replaced(sound.labels)) for sound in sounds]
    return [sound for sound in found if sound.labels]


def sides(sounds: list[Sound]) -> dict[str, str]:
    """group -> "train" or "valid": of each label's groups, in hashed order, the first fifth; none of fewer than three.

    A group with several labels is where the first of them puts it.
    """
    settled = {sound.group: sound.side for sound in sounds if sound.side}
    members = defaultdict(set)
    for sound in sounds:
        members[sound.labels[0]].add(sound.group)
    side: dict[str, str] = {}
    for label in sorted(members):
        order = sorted(members[label], key=lambda group: digest("split:" + group))
        held_out = 0 if len(order) < 3 else max(1, round(HELD_OUT * len(order)))
        for number, group in enumerate(order):
            side.setdefault(group, "valid" if number < held_out else "train")
    return side | settled


def mixtures(build: Any, recipe: dict[str, Any], split: str, sounds: list[Sound]) -> set[str]:
    """Add the clips of one split; returns the labels in them."""
    length = int(recipe["clip_seconds"] * build.rate)
    carriers = defaultdict(list)
    for sound in sounds:
        for label in sound.labels:
            carriers[label].append(sound)
    names, heard = sorted(carriers), set()
    rng = random.Random(f"{build.seed}:tags:{split}")
    for number in range(recipe["clips"][split] if names else 0):
        mix, used = np.zeros(length, np.float32), []
        for event in range(rng.choices(EVENTS, SHARES)[0]):
            sound = rng.choice(carriers[rng.choice(names)])
            start = rng.randint(0, max(0, len(sound.audio) - length))
            piece = sound.audio[start : start + length]
            where = rng.randint(0, length - len(piece))
            gain = 10 ** (rng.uniform(-9, 0) / 20) if event else 1.0
            mix[where : where + len(piece)] += piece / (float(np.sqrt((piece**2).mean())) + 1e-6) * gain
            used.append(sound)
        mix *= 10 ** (rng.uniform(-15, -1) / 20) / max(1e-6, float(np.abs(mix).max()))
        labels = set().union(*(all_labels(sound.labels) for sound in used))
        build.add(
            mix,
            part="tags",
            split=split,
            name=f"{number:05d}",
            labels=sorted(labels),
            source=" | ".join(sound.key for sound in used),
            license=" AND ".join(sorted({sound.license for sound in used})),
            detail={"events": len(used)},
        )
        heard |= labels
    return heard

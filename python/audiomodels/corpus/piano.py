"""The corpus's piano: public-domain scores, performed and played through a sampled grand. Its split is by piece."""

import hashlib
import logging
import random
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from audiomodels._optional import require
from audiomodels.corpus.tools import CorpusError, Note, digest, synthesize, trim, write_midi

ScoreNote = tuple[float, float, int]  # onset, end (quarter notes), MIDI pitch
Control = tuple[float, int, int, int]
LEAST_NOTES, LEAST_SECONDS = 30, 5
PEDAL = 64  # MIDI controller


def build_piano(build: Any, blocks: list[dict[str, Any]]) -> None:
    """Add pieces to the corpus until each block's minutes are reached."""
    for number, block in enumerate(blocks):
        total = 0.0
        held: dict[str, float] = {"test": 0.0, "dev": 0.0}  # seconds
        share: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # composer: seconds in all, seconds in valid
        soundfont, font_license = build.soundfont(block["soundfont"])
        jobs = [
            {
                "key": key,
                "path": path,
                "seed": f"{build.seed}:{number}",
                "rate": build.rate,
                "soundfont": str(soundfont),
                "program": block.get("program", 0),
                "max_seconds": block["max_seconds"],
                "work": str(build.work),
            }
            for key, path in candidates(block)
        ]
        for start in range(0, len(jobs), 8):
            if total >= block["minutes"] * 60:
                break
            batch = jobs[start : start + 8]
            for job, result in zip(batch, build.map(piece, batch), strict=True):
                if result is None or total >= block["minutes"] * 60:
                    continue
                audio, played, peak = result
                if len(audio) < LEAST_SECONDS * build.rate:
                    continue
                audio *= peak / max(1e-6, float(np.abs(audio).max()))
                seconds, composer = len(audio) / build.rate, job["key"].split(":", 1)[1].split("/")[0]
                every, valid = share[composer]  # whole pieces, in hashed order, until the share is reached
                held_out = valid + seconds / 2 < build.fraction * (every + seconds)
                share[composer] = [every + seconds, valid + seconds * held_out]
                split = min(held, key=held.__getitem__) if held_out else "train"  # dev and test grow alike
                if held_out:
                    held[split] += seconds
                name = re.sub(r"\W+", "_", job["key"].split(":", 1)[1].rsplit(".", 1)[0])
                path = build.add(
                    audio,
                    part="piano",
                    split=split,
                    name=name if number == 0 else f"{name}_{number}",
                    group=job["key"],
                    labels=[composer],
                    source=f"{job['key']} + {block['soundfont']}",
                    license=f"score: public-domain composition; soundfont: {font_license}",
                    detail={"program": job["program"]},
                )
                notes = [[round(a, 4), round(b, 4), pitch, velocity] for a, b, pitch, velocity, _ in played]
                build.notes.append({"path": path, "notes": notes})
                total += seconds


def candidates(block: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, path) of the scores that a block names, chorales and longer pieces in turn: a short budget varies too."""
    root = Path(require("music21", "corpus").__file__).parent / "corpus"
    rank: dict[Path, int] = {}  # pieces in the order of their patterns
    for number, pattern in enumerate(block.get("pieces", ())):
        for path in root.glob(pattern):
            rank.setdefault(path, number)
    paths = set(rank)
    low, high = block.get("bwv", (1, 0))
    for path in root.glob("bach/bwv*.mxl"):
        number = re.fullmatch(r"bwv(\d+)[\d.]*\.mxl", path.name)
        if number and low <= int(number[1]) <= high:
            paths.add(path)
    keys = sorted("music21:" + path.relative_to(root).as_posix() for path in paths)
    chorales = [key for key in keys if "/bwv" in key and not key.endswith("bwv846.mxl")]
    longer = [key for key in keys if key not in chorales]
    chorales.sort(key=lambda key: digest("order:" + key))
    longer.sort(key=lambda key: (rank[root / key.split(":", 1)[1]], digest("order:" + key)))
    order = []
    while longer or chorales:
        order += [longer.pop(0)] if longer else []
        order += [chorales.pop(0)] if chorales else []
    return [(key, str(root / key.split(":", 1)[1])) for key in order]


def piece(job: dict[str, Any]) -> tuple[np.ndarray, list[Note], float] | None:
    """One piece: score -> performance -> (audio, its notes, its peak); None for a score that cannot be used."""
    rng = random.Random(f"{job['seed']}:{job['key']}")
    try:
        notes = score_notes(job["path"])
    except Exception as error:  # music21 raises anything; a score that it cannot read is no reason to stop
        print(f"skipped {job['key']}: {str(error)[:80]}", file=sys.stderr)
        return None
    if len(notes) < LEAST_NOTES:
        return None
    played, controls = perform(notes, rng, job["max_seconds"])
    midi = Path(job["work"]) / (hashlib.sha256(job["key"].encode()).hexdigest()[:16] + ".mid")
    write_midi(midi, played, controls, [(0.0, 0, job["program"])])
    audio = trim(synthesize(midi, Path(job["soundfont"]), job["rate"]), job["rate"], pad=0.0)
    midi.unlink()
    return audio, played, rng.uniform(0.5, 0.9)


def score_notes(path: str) -> list[ScoreNote]:
    """The notes of a whole score, ties joined."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    converter, stream = require("music21.converter", "corpus"), require("music21.stream", "corpus")
    score = converter.parse(path)
    if isinstance(score, stream.Opus):
        score = score.scores[0]
    score.toSoundingPitch(inPlace=True)
    found = set()
    for element in score.stripTies(inPlace=False).flatten().notes:
        if element.duration.isGrace or not hasattr(element, "pitches"):
            continue
        start, length = float(element.offset), float(element.duration.quarterLength)
        for pitch in element.pitches:
            if length > 0 and 21 <= pitch.midi <= 108:
                found.add((start, start + length, int(pitch.midi)))
    return sorted(found)


def perform(notes: list[ScoreNote], rng: random.Random, max_seconds: float) -> tuple[list[Note], list[Control]]:
    """A performance of at most max_seconds: tempo from note density, rubato, dynamics, jitter and pedal."""
    if not notes:
        raise CorpusError("a performance needs at least one note")
    onsets = sorted({note[0] for note in notes})
    span = max(note[1] for note in notes)
    density = len(onsets) / max(span, 1.0)  # onsets a quarter note
    tempo = min(150.0, max(50.0, 60.0 * rng.uniform(2.2, 5.0) / density))
    phrase = rng.choice([8.0, 16.0])
    depth, phase = rng.uniform(0.02, 0.08), rng.uniform(0, 6.28)
    grid = np.arange(0.0, span + 8.0, 0.125)
    speed = tempo / 60.0 * (1 + depth * np.sin(2 * np.pi * grid / phrase + phase))
    speed *= 1 - 0.3 * np.clip((grid - (span - 4.0)) / 4.0, 0, 1)  # ritardando
    seconds = np.concatenate([[0.0], np.cumsum(0.125 / speed)[:-1]])

    def at(quarter: float) -> float:
        return float(np.interp(quarter, grid, seconds))

    top: dict[float, int] = {}
    for start, _, pitch in notes:
        top[start] = max(pitch, top.get(start, 0))
    loudness = rng.uniform(52, 76)
    played: list[Note] = []
    for start, end, pitch in notes:
        onset = at(start) + 0.3
        if onset > max_seconds - 2.0:
            continue
        melody = pitch == top[start]
        velocity = loudness + 12 * melody + (5 if start % 1 == 0 else 0)
        velocity += 10 * np.sin(2 * np.pi * start / (2 * phrase)) + rng.gauss(0, 3.5)
        onset = max(0.0, onset + (rng.gauss(0, 0.006) + (0.0 if melody else rng.uniform(0, 0.018))))
        offset = max(onset + 0.06, at(end) + 0.3 - rng.uniform(0.0, 0.04))
        played.append((onset, min(offset, max_seconds - 1.0), pitch, int(min(118, max(20, velocity))), 0))
    controls: list[Control] = []
    if rng.random() < 0.6:  # half-bar pedalling
        for quarter in np.arange(0.0, span, 2.0 if tempo > 70 else 1.0):
            time = at(quarter) + 0.3
            if time < max_seconds - 2.0:
                controls += [(time + 0.02, 0, PEDAL, 0), (time + 0.09, 0, PEDAL, 127)]
        controls.append((max(note[1] for note in played), 0, PEDAL, 0))
    return one_note_a_key(sorted(played)), controls


def one_note_a_key(played: list[Note]) -> list[Note]:
    """Notes in order of onset, each ended where the same key is struck again."""
    played, latest = list(played), {}
    for index, note in enumerate(played):
        before = latest.get(note[2])
        if before is not None and played[before][1] > note[0] - 0.01:
            onset, _, *rest = played[before]
            played[before] = (onset, max(onset + 0.03, note[0] - 0.01), *rest)
        latest[note[2]] = index
    return played

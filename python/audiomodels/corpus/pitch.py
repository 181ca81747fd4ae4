"""The corpus's chords: clips of one second of one to six notes, on up to three instruments. The labels are MIDI notes.

Clips are split by number; which instruments are never trained on is tag_data's to say (HELD_OUT_PROGRAMS).
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audiomodels.corpus.tools import Note, synthesize, write_midi

RANGES = {  # General MIDI program: lowest and highest note
    0: (28, 100),
    4: (36, 96),
    6: (36, 88),
    11: (53, 89),
    16: (36, 96),
    19: (36, 96),
    21: (53, 89),
    22: (60, 88),
    24: (40, 83),
    26: (40, 83),
    40: (55, 96),
    42: (36, 74),
    46: (36, 96),
    48: (36, 96),
    52: (48, 79),
    56: (55, 82),
    57: (40, 72),
    60: (41, 77),
    65: (49, 80),
    68: (58, 91),
    71: (50, 91),
    73: (60, 96),
    79: (60, 88),
}
SHEET = 200  # chords that are rendered in one go
STEP, HELD = 1.45, 1.15  # seconds from chord to chord, and that a note is held
MOST_INSTRUMENTS, MOST_NOTES = 3, 6
ALL_SOUND_OFF = 120  # MIDI controller


@dataclass(frozen=True)
class Chord:
    """One clip to be: where it starts in its sheet, its notes, the programs that play them."""

    start: float
    pitches: list[int]
    programs: list[int]


def build_pitch(build: Any, blocks: list[dict[str, Any]]) -> None:
    """Add the chords of each block; the labels are all notes that any instrument has."""
    for number, block in enumerate(blocks):
        soundfont, font_license = build.soundfont(block["soundfont"])
        for split, count in block["clips"].items():
            rng = random.Random(f"{build.seed}:pitch:{number}:{split}")
            jobs = []
            for first in range(0, count, SHEET):
                chords, midi = sheet(min(SHEET, count - first), block["programs"], rng)
                place = {"path": str(build.work / f"pitch-{number}-{split}-{first}.mid"), "rate": build.rate}
                jobs.append({**place, "chords": chords, "midi": midi, "soundfont": str(soundfont)})
            index = 0
            for job, audio in zip(jobs, build.map(render, jobs), strict=True):
                for chord in job["chords"]:
                    begin = int((chord.start + rng.uniform(0.02, 0.1)) * build.rate)
                    clip = audio[begin : begin + build.rate]
                    peak = 10 ** (rng.uniform(-15, -1) / 20)
                    build.add(
                        clip * (peak / max(1e-6, float(np.abs(clip).max()))),
                        part="pitch",
                        split=split,
                        name=f"{number}_{index:05d}",
                        labels=chord.pitches,
                        source=f"{block['soundfont']}:programs {chord.programs}",
                        license=font_license,
                        detail={},
                    )
                    index += 1
    build.labels["pitch"] = list(range(min(low for low, _ in RANGES.values()), max(h for _, h in RANGES.values()) + 1))


def sheet(count: int, programs: list[int], rng: random.Random) -> tuple[list[Chord], tuple[list, list, list]]:
    """(chords one after another, what write_midi takes to play them: notes, controls, programs)."""
    chords: list[Chord] = []
    notes: list[Note] = []
    controls, changes, now = [], [], 0.5
    for _ in range(count):
        chosen = rng.sample(programs, rng.randint(1, min(MOST_INSTRUMENTS, len(programs))))
        channels: dict[int, int] = {}  # of each pitch; the first instrument to draw it has it
        for _ in range(rng.randint(1, MOST_NOTES)):
            channel = rng.randrange(len(chosen))
            channels.setdefault(rng.randint(*RANGES.get(chosen[channel], (40, 88))), channel)
        for channel, program in enumerate(chosen):
            changes.append((now - 0.15, channel, program))
            controls.append((now - 0.2, channel, ALL_SOUND_OFF, 0))
        for pitch, channel in channels.items():
            notes.append((now + rng.uniform(0, 0.06), now + HELD, pitch, rng.randint(55, 115), channel))
        chords.append(Chord(now, sorted(channels), [chosen[c] for c in sorted(set(channels.values()))]))
        now += STEP
    return chords, (notes, controls, changes)


def render(job: dict[str, Any]) -> np.ndarray:
    """The sound of one sheet."""
    midi = Path(job["path"])
    write_midi(midi, *job["midi"])
    audio = synthesize(midi, Path(job["soundfont"]), job["rate"], gain=0.5, reverb=False)
    midi.unlink()
    return audio

"""Draws the pictures of docs/sounds.md: the bundled clips in every representation, three sines, a square wave.

python docs/sounds_picture.py     (needs audiokernels[models])
"""

import io
import math
from pathlib import Path

import torch
from audiomodels import features, plots
from audiomodels.audio import read_audio
from audiomodels.data import clips, rows_of
from PIL import Image

DOCS = Path(__file__).parent
RATE, N_FFT = 16000, 1024


def save(fig: plots.Figure, name: str, colors: int) -> None:
    """Write docs/<name>.png with a palette: a third of the size, and no difference that can be seen."""
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=fig.dpi)
    image = Image.open(buffer).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    image.save(DOCS / f"{name}.png", optimize=True)


def sheet(part: str) -> None:
    """A row for each clip of one folder, a column for each representation."""
    rows = [row for row in rows_of(clips()) if row["path"].startswith(f"{part}/")]
    fig, grid = plots.figure(10.5, 0.35 + 0.72 * len(rows), len(rows), len(plots.KINDS))
    fig.set_dpi(80)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    for y, row in enumerate(rows):
        audio, rate = read_audio(row["file"])
        for x, kind in enumerate(plots.KINDS):
            axis = plots.add(fig, grid[y, x], kind if y == 0 else "")
            plots.sound(axis, kind, audio / audio.abs().max(), rate)
            axis.set(xticks=[], yticks=[], xlabel="", ylabel="")
            axis.spines[:].set_visible(False)
            if x == 0:
                name = f"{Path(row['path']).stem.replace('_', ' ')}\n{len(audio) / rate:.1f} s"
                axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    save(fig, f"sounds_{part}", 32)


def signals() -> None:
    """Three sines, and a square wave: a piece of the wave, one column of the spectrogram, the spectrogram."""
    time = torch.arange(RATE) / RATE
    hz = (500, 1000, 2500)
    three = sum(torch.sin(2 * math.pi * f * time) for f in hz) / 3
    f0 = 250
    square = torch.where(torch.arange(RATE) % (RATE // f0) < RATE // f0 // 2, 0.9, -0.9)
    fig, grid = plots.figure(11, 5, 2, 3)
    fig.set_dpi(80)
    axis_hz = torch.arange(N_FFT // 2 + 1) * RATE / N_FFT
    for row, (name, audio) in enumerate({f"sines of {', '.join(map(str, hz))} Hz": three,
                                         f"a square wave of {f0} Hz": square}.items()):  # fmt: skip
        axis = plots.add(fig, grid[row, 0], name)
        axis.plot(1000 * time[:320], audio[:320], color=plots.BLUE, linewidth=1)
        axis.set(xlabel="ms", xlim=(0, 20), ylim=(-1.05, 1.05))
        column = features.spectrogram(audio, N_FFT, 256)[:, 30]
        axis = plots.add(fig, grid[row, 1], "magnitude of its spectrum")
        axis.plot(axis_hz, column / column.max(), color=plots.BLUE, linewidth=1)
        axis.set(xlabel="Hz", xlim=(0, 4000), ylim=(0, 1.1))
        if row:
            odd = torch.arange(1, 16, 2)
            axis.plot(odd * f0, 1 / odd, "o", color=plots.ORANGE, markersize=4, label="1/n at the odd multiples")
            axis.legend(fontsize=8, frameon=False)
        axis = plots.add(fig, grid[row, 2], "spectrogram")
        plots.sound(axis, "spectrogram", audio[: RATE // 2], RATE)
        axis.set_ylim(0, 4000 / (RATE / 2) * len(column))
    save(fig, "sounds_signals", 64)


def semitones() -> None:
    """A tone of eight harmonics, then the same seven semitones higher: what moves how, on a linear and a log axis."""
    time = torch.arange(RATE) / RATE
    tones = [
        sum(torch.sin(2 * math.pi * f * n * time) / n for n in range(1, 9)) / 3 for f in (220, 220 * 2 ** (7 / 12))
    ]
    fig, grid = plots.figure(11, 3, 1, 2)
    fig.set_dpi(80)
    columns = {
        "spectrogram: the harmonics spread": [features.spectrogram(t, N_FFT, 256)[:260, 30] for t in tones],
        "constant-Q: the same shape, 14 bins higher": [features.constant_q(t, RATE)[:, 30] for t in tones],
    }
    for place, (title, pair) in enumerate(columns.items()):
        axis = plots.add(fig, grid[0, place], title)
        for column, color, name in zip(pair, (plots.BLUE, plots.ORANGE), ("220 Hz", "7 semitones up"), strict=True):
            axis.plot(column / column.max(), color=color, linewidth=1.2, label=name)
        axis.set(xlabel="bin", xlim=(0, len(pair[0]) - 1), ylim=(0, 1.1))
        axis.legend(fontsize=8, frameon=False)
    save(fig, "sounds_semitones", 64)


if __name__ == "__main__":
    signals()
    semitones()
    for part in ("music", "speech", "effects"):
        sheet(part)

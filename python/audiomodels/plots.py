"""The panels of reports: waveform, log-mel spectrogram, loss curve, bars. Each draws into an axis that it is given.

matplotlib's Agg canvas is used without pyplot: no window system, no global state, nothing to close.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from audiomodels._optional import require

Axes = Figure = GridSpec = SubplotSpec = AxesImage = Any  # matplotlib's classes, which importing this does not import

BLUE, ORANGE, GREY = "#2a6fb0", "#d9772b", "#9aa4ad"
FLOOR_DB = -80.0  # of a spectrogram, below its loudest point


def figure(
    width: float, height: float, rows: int, columns: int, heights: Sequence[float] | None = None
) -> tuple[Figure, GridSpec]:
    """(figure, grid) of width x height inches; `add(figure, grid[row, column])` makes an axis."""
    fig = require("matplotlib.figure").Figure(figsize=(width, height), dpi=100, layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(fig)
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.05)
    return fig, fig.add_gridspec(rows, columns, height_ratios=heights)


def add(fig: Figure, place: SubplotSpec, title: str) -> Axes:
    """An axis with a title at its left and no frame on top and right."""
    axis = fig.add_subplot(place)
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return axis


def waveform(axis: Axes, audio: Tensor, sample_rate: int, *, color: str = BLUE) -> None:
    """audio (time,), full scale [-1, 1], over seconds: the envelope of each of 2,000 pieces."""
    pieces = audio.float().split(max(1, math.ceil(len(audio) / 2000)))
    seconds = [i * len(pieces[0]) / sample_rate for i in range(len(pieces))]
    low, high = ([float(f(piece)) for piece in pieces] for f in (torch.min, torch.max))
    axis.fill_between(seconds, low, high, color=color, linewidth=0.5, edgecolor=color)
    axis.set(xlim=(0, len(audio) / sample_rate), ylim=(-1, 1), xlabel="seconds", ylabel="amplitude")


def log_mel(axis: Axes, audio: Tensor, sample_rate: int, *, top_db: float | None = None) -> AxesImage:
    """Log-mel spectrogram of audio (time,) over seconds and Hz; returns the image, for a colour bar.

    top_db: the level of the brightest colour; default: the loudest point. Two spectrograms with one top_db compare.
    """
    power = mel_power(audio, sample_rate)
    db = 10 * torch.log10(power + 1e-12)
    top_db = float(db.max()) if top_db is None else top_db
    image = axis.imshow(
        db.numpy(),
        origin="lower",
        aspect="auto",
        extent=(0, len(audio) / sample_rate, 0, len(power)),
        vmin=top_db + FLOOR_DB,
        vmax=top_db,
        cmap="magma",
        interpolation="nearest",
    )
    ticks = [hz for hz in (100, 250, 500, 1000, 2000, 4000, 8000, 16000) if hz <= sample_rate / 2]
    axis.set_yticks([len(power) * _mel(hz) / _mel(sample_rate / 2) for hz in ticks], [f"{hz:,}" for hz in ticks])
    axis.set(xlabel="seconds", ylabel="Hz (mel scale)")
    return image


def mel_power(audio: Tensor, sample_rate: int, n_mel: int = 80) -> Tensor:
    """(n_mel, frames) power: |STFT|^2 of 64 ms Hann windows every 16 ms, through triangles on the HTK mel scale."""
    n_fft, hop = sample_rate * 64 // 1000, sample_rate * 16 // 1000
    audio = torch.nn.functional.pad(audio.float(), (0, max(0, n_fft - len(audio))))
    window = torch.hann_window(n_fft)
    spectrum = torch.stft(audio, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
    power = (spectrum.abs() / window.sum()).square()
    edges = torch.tensor([_hz(_mel(sample_rate / 2) * i / (n_mel + 1)) for i in range(n_mel + 2)])
    hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    rising = (hz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - hz) / (edges[2:] - edges[1:-1])[:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    # A triangle narrower than a bin may miss them all: it takes the nearest one.
    nearest = (hz - edges[1:-1, None]).abs().argmin(1)
    triangles[torch.arange(n_mel), nearest] = triangles[torch.arange(n_mel), nearest].clamp(min=0.5)
    return triangles @ power


def _mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)


def _hz(mel: float) -> float:
    return 700 * (10 ** (mel / 2595) - 1)


def loss_curve(
    axis: Axes, steps: Sequence[int], bits: Sequence[float], lines: Mapping[str, float] | None = None
) -> None:
    """Bits per sample over steps, each step thin and a running mean over it; `lines` are levels to compare with."""
    axis.plot(steps, bits, color=BLUE, alpha=0.3, linewidth=0.8)
    total, weight, means = 0.0, 0.0, []
    for value in bits:
        total, weight = 0.95 * total + value, 0.95 * weight + 1
        means.append(total / weight)
    axis.plot(steps, means, color=BLUE, linewidth=1.5, label="training (running mean)")
    for (name, value), style in zip((lines or {}).items(), ("-", "--", ":", "-."), strict=False):
        axis.axhline(value, color=ORANGE if style == "-" else GREY, linestyle=style, linewidth=1.2, label=name)
    axis.set(xlabel="step", ylabel="bits per sample", xlim=(0, max(steps, default=1)))
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)


def bars(axis: Axes, values: Mapping[str, float], unit: str, *, log: bool = False, form: str = "{:.2f}") -> None:
    """Horizontal bars, the first on top and in colour, each with its number."""
    names, numbers = list(values), list(values.values())
    axis.barh(names, numbers, color=[BLUE] + [GREY] * (len(names) - 1), height=0.6, log=log)
    axis.invert_yaxis()
    low = min(numbers) / 3 if log else 0.0
    high = max(numbers)
    axis.set_xlim(low, high * (high / low) ** 0.35 if log else high * 1.25)
    for place, number in enumerate(numbers):
        axis.annotate(form.format(number), (number, place), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=9)  # fmt: skip
    axis.set_xlabel(unit)
    axis.tick_params(axis="y", length=0, labelsize=9)


def curves(
    axis: Axes,
    series: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    unit: str,
    lines: Mapping[str, float] | None = None,
) -> None:
    """Several (x, bits) curves of each name in one colour; `lines` are levels to compare with."""
    colors = require("matplotlib").colormaps["tab20"].colors
    for (name, runs), color in zip(series.items(), colors * 3, strict=False):
        for i, (x, y) in enumerate(runs):
            axis.plot(x, y, color=color, linewidth=1.2, marker=".", markersize=3, label=name if i == 0 else None)
    for name, value in (lines or {}).items():
        axis.axhline(value, color=GREY, linestyle="--", linewidth=1.2, label=name)
    axis.set(xlabel=unit, ylabel="bits per sample")
    if series or lines:
        axis.legend(fontsize=7, frameon=False, ncols=2)

"""The panels of reports: waveform, spectrograms of every kind, loss curve, bars. Each draws into an axis it is given.

matplotlib's Agg canvas is used without pyplot: no window system, no global state, nothing to close.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiomodels import features
from audiomodels._optional import require
from audiomodels.audio import MAKER

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
    # A file's name may hold dollar signs, which would be formulas, and bytes that are no text.
    title = title.encode(errors="replace").decode()
    axis.set_title(title, loc="left", fontsize=10, parse_math=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return axis


def save(fig: Figure, path: Path) -> None:
    """Write the figure, whole or not at all, into a folder that is made if need be. A PNG says that it was made here:
    see `is_ours`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        fig.savefig(part, metadata={"Software": MAKER} if path.suffix.lower() == ".png" else None)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def is_ours(path: Path) -> bool:
    """Whether a file is a PNG that `save` wrote, which the same command may write anew."""
    with path.open("rb") as file:
        return b"Software\0" + MAKER.encode() in file.read(1024)


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
    image = levels(axis, power, len(audio) / sample_rate, top_db=top_db)
    _hz_ticks(axis, len(power), sample_rate, features.hz_to_mel)
    axis.set_ylabel("Hz (mel scale)")
    return image


def mel_power(audio: Tensor, sample_rate: int) -> Tensor:
    """(80 or fewer, frames) power in HTK mel bands, of 64 ms windows every 16 ms; a sine of amplitude 1 has 1/4."""
    n_fft, hop = sample_rate * 64 // 1000, sample_rate * 16 // 1000
    # more bands than this, at low rates, and the lowest ones fall between two bins
    power = features.mel(audio.float(), sample_rate, n_fft=n_fft, hop=hop, n_mel=min(80, n_fft // 6))
    return power / (n_fft / 2) ** 2


KINDS = ("waveform", "spectrogram", "log-frequency", "mel", "constant-Q")


def sound(axis: Axes, kind: str, audio: Tensor, sample_rate: int, *, top_db: float | None = None) -> None:
    """audio (time,) as one of KINDS, each with the axes that it is known by; frames as fine as they can be seen."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "waveform":
        return waveform(axis, audio, sample_rate)
    audio, seconds = audio.float(), len(audio) / sample_rate
    window = 2 ** round(math.log2(0.064 * sample_rate))
    hop = max(window // 16, len(audio) // 1000)
    if kind == "mel":
        power = features.mel(audio, sample_rate, n_fft=2 * window, win_length=window, hop=hop, n_mel=96)
        _hz_ticks(axis, len(power), sample_rate, features.hz_to_mel)
        axis.set_ylabel("Hz (mel scale)")
    elif kind == "spectrogram":
        power = features.spectrogram(audio, window, hop).square()
        quarters = range(0, sample_rate // 2 + 1, sample_rate // 8)
        axis.set_yticks([len(power) * 2 * hz / sample_rate for hz in quarters], [f"{hz:,}" for hz in quarters])
        axis.set_ylabel("Hz")
    else:
        if kind == "constant-Q":
            power = features.constant_q(audio, sample_rate, hop=hop).square()
        else:
            power = features.log_spectrogram(audio, sample_rate, n_fft=4 * window, hop=hop).square()
        octaves = range(0, len(power), 24)
        axis.set_yticks([i + 0.5 for i in octaves], [f"{features.LOWEST_HZ * 2 ** (i // 24):,.0f}" for i in octaves])
        axis.set_ylabel("Hz (octaves)")
    levels(axis, power, seconds, top_db=top_db)


def levels(axis: Axes, power: Tensor, seconds: float, *, top_db: float | None = None) -> AxesImage:
    """power (bins, frames) in dB, as an image of `seconds`, from top_db (default: the loudest point) down 80 dB."""
    db = 10 * torch.log10(power + 1e-12)
    top_db = float(db.max()) if top_db is None else top_db
    image = axis.imshow(
        db.numpy(),
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, len(power)),
        vmin=top_db + FLOOR_DB,
        vmax=top_db,
        cmap="magma",
        interpolation="nearest",
    )
    axis.set_xlabel("seconds")
    return image


def _hz_ticks(axis: Axes, bins: int, sample_rate: int, scale: Callable[[float], float]) -> None:
    """Ticks on an axis of `bins` rows that go evenly from 0 to half the sample rate on a scale of Hz."""
    ticks = [hz for hz in (100, 250, 500, 1000, 2000, 4000, 8000, 16000) if hz <= sample_rate / 2]
    axis.set_yticks([bins * scale(hz) / scale(sample_rate / 2) for hz in ticks], [f"{hz:,}" for hz in ticks])


def loss_curve(
    axis: Axes,
    steps: Sequence[int],
    bits: Sequence[float],
    lines: Mapping[str, float] | None = None,
    *,
    unit: str = "bits per sample",
) -> None:
    """Bits over steps, each step thin and a running mean over it; `lines` are levels to compare with."""
    axis.plot(steps, bits, color=BLUE, alpha=0.3, linewidth=0.8)
    total, weight, means = 0.0, 0.0, []
    for value in bits:
        total, weight = 0.95 * total + value, 0.95 * weight + 1
        means.append(total / weight)
    axis.plot(steps, means, color=BLUE, linewidth=1.5, label="training (running mean)")
    for (name, value), style in zip((lines or {}).items(), ("-", "--", ":", "-."), strict=False):
        axis.axhline(value, color=ORANGE if style == "-" else GREY, linestyle=style, linewidth=1.2, label=name)
    axis.set(xlabel="step", ylabel=unit, xlim=(0, max(steps, default=1)))
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
        axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.14))  # below the axis

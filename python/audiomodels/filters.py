"""The learned first layer of an AudioTransformer as a filter bank: what each row hears, and how they share the axis.

Every row is a filter of `patch` samples. Its spectrum is |FFT| zero-padded to 4,096 points, its centre the highest bin,
its bandwidth the power under the spectrum over its peak (a sinusoid that fills the patch of T seconds has 1/T Hz, a
click half the sample rate). Sorted by centre, a Fourier basis gives a straight line; Verma & Berger (arXiv 2105.00335)
show a curve that bends towards low frequencies. Such a curve says something about learning only beside controls: the
same layer before training, the principal components of the patches, the mean spectrum of the sound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from audiomodels import plots

N_FFT = 4096
KINDS = ("sinusoid", "windowed", "onset-like", "other")


@dataclass(frozen=True, eq=False)
class FilterBank:
    """Rows sorted by centre frequency."""

    weight: Tensor
    """(n_filter, patch)."""
    spectrum: Tensor
    """(n_filter, 2049) magnitudes, the peak of each row 1; bin k is k * sample_rate / 4096 Hz."""
    centre: Tensor
    """(n_filter,) Hz, rising."""
    bandwidth: Tensor
    """(n_filter,) Hz."""
    sample_rate: int

    @property
    def straightness(self) -> float:
        """R^2 of the straight line that fits the centres best over their order: 1 for a Fourier basis."""
        return r_squared(self.centre)

    @property
    def bend(self) -> float:
        """R^2 of the exponential curve that fits the centres best (those above 0)."""
        return r_squared(self.centre[self.centre > 0].log2())


def filter_bank(weight: Tensor, sample_rate: int) -> FilterBank:
    """The rows of weight (n_filter, patch <= 4096), sorted."""
    if weight.ndim != 2 or not 2 <= weight.shape[1] <= N_FFT or not len(weight):
        raise ValueError(f"weight must be (n_filter, patch), patch 2 .. {N_FFT}, got {tuple(weight.shape)}")
    spectrum = torch.fft.rfft(weight.detach().float(), N_FFT).abs()
    peak, where = spectrum.max(1)
    spectrum = spectrum / peak[:, None].clamp(min=1e-12)
    bandwidth = spectrum.square().sum(1) * (sample_rate / N_FFT)
    order = where.argsort(stable=True)
    centre = where[order] * (sample_rate / N_FFT)
    return FilterBank(weight.detach().float()[order], spectrum[order], centre, bandwidth[order], sample_rate)


def r_squared(y: Tensor) -> float:
    """Of the line that fits y over 0, 1, 2, ... best; NaN for less than three points or none that differ."""
    if len(y) < 3 or float(y.std()) == 0:
        return math.nan
    x = torch.arange(len(y), dtype=torch.float64)
    return float(torch.corrcoef(torch.stack([x, y.double()]))[0, 1].square())


def curve_distance(a: FilterBank, b: FilterBank) -> float:
    """Mean distance in Hz between two sorted curves of centres: the earth mover's between their distributions."""
    places = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    return float((torch.quantile(a.centre.double(), places) - torch.quantile(b.centre.double(), places)).abs().mean())


def distances(banks: Mapping[str, FilterBank], tasks: Mapping[str, str]) -> dict[str, list[float]]:
    """curve_distance of every pair of models, in Hz, under "one task" (another seed) or "two tasks".

    Only where the second are larger than the first does a curve say something of its task.
    """
    found: dict[str, list[float]] = {"one task": [], "two tasks": []}
    for a, b in itertools.combinations(banks, 2):
        found["one task" if tasks[a] == tasks[b] else "two tasks"].append(curve_distance(banks[a], banks[b]))
    return found


def kinds(bank: FilterBank) -> list[str]:
    """What each row looks like, one of KINDS, by its envelope (the magnitude of its analytic signal) and bandwidth.

    onset-like: a quarter of the patch holds 80 % of the energy. sinusoid: bandwidth at most 2 / T, and the envelope is
    even: (sum of squares)^2 / (length * sum of fourth powers) at least 0.75. windowed: the envelope correlates above
    0.9 with a Hann window. Rules in this order; what none takes is "other".
    """
    patch = bank.weight.shape[1]
    energy = _envelope(bank.weight).square()
    total = energy.sum(1).clamp(min=1e-20)
    sums = torch.nn.functional.pad(energy.cumsum(1), (1, 0))
    quarter = max(1, patch // 4)
    onset = (sums[:, quarter:] - sums[:, :-quarter]).amax(1) >= 0.8 * total
    even = total.square() / (patch * energy.square().sum(1).clamp(min=1e-30)) >= 0.75
    sinusoid = (bank.bandwidth <= 2 * bank.sample_rate / patch) & even
    hann = torch.hann_window(patch, periodic=False)
    envelope = energy.sqrt() - energy.sqrt().mean(1, keepdim=True)
    windowed = torch.nn.functional.cosine_similarity(envelope, hann - hann.mean()) > 0.9
    rules = zip(onset.tolist(), sinusoid.tolist(), windowed.tolist(), strict=True)
    return ["onset-like" if o else "sinusoid" if s else "windowed" if w else "other" for o, s, w in rules]


def _envelope(x: Tensor) -> Tensor:
    n = x.shape[1]
    spectrum = torch.fft.fft(x)
    spectrum[:, 1 : (n + 1) // 2] *= 2
    spectrum[:, n // 2 + 1 :] = 0
    return torch.fft.ifft(spectrum).abs()


# ------------------------------------------------------------------------------------------------------------ controls


def fourier_basis(n_filter: int, patch: int) -> Tensor:
    """(n_filter, patch): cosines and sines, in turn, of frequencies evenly spaced from 0 to half the sample rate."""
    cycles = torch.linspace(0, 0.5, n_filter, dtype=torch.float64)
    angle = 2 * math.pi * cycles[:, None] * (torch.arange(patch) - (patch - 1) / 2)
    rows = torch.where(torch.arange(n_filter)[:, None] % 2 == 0, angle.cos(), angle.sin())
    return (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-6)).float()


def patches_of(audio: Sequence[Tensor], patch: int, *, most: int = 20000) -> Tensor:
    """(n, patch) patches side by side from recordings (time,), at most `most`, evenly spread over all."""
    rows = torch.cat([recording[: len(recording) // patch * patch].unflatten(0, (-1, patch)) for recording in audio])
    if not len(rows):
        raise ValueError(f"audio must hold at least one patch of {patch} samples")
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()]


def principal_components(patches: Tensor) -> Tensor:
    """(patch, patch): the eigenvectors of the patches' covariance, the strongest first."""
    centred = patches.double() - patches.double().mean(0)
    return torch.linalg.eigh(centred.T @ centred).eigenvectors.T.flip(0).float()


def mean_spectrum(patches: Tensor) -> Tensor:
    """(2049,) root of the mean power of Hann-windowed patches, the peak 1."""
    windowed = patches * torch.hann_window(patches.shape[1])
    power = torch.fft.rfft(windowed, N_FFT).abs().square().mean(0).sqrt()
    return power / power.max().clamp(min=1e-12)


# ------------------------------------------------------------------------------------------------------------ pictures


def draw(bank: FilterBank, controls: Mapping[str, FilterBank], spectrum: Tensor, title: str) -> plots.Figure:
    """One layer: its sorted spectra as an image, its curve and bandwidths beside `controls`, single rows of each kind.

    spectrum: of the sound (mean_spectrum), drawn into the plot of the curves.
    """
    members = {kind: [i for i, found in enumerate(kinds(bank)) if found == kind] for kind in KINDS}
    shown = {kind: rows for kind, rows in members.items() if rows}
    fig, grid = plots.figure(13, 10 + 1.3 * len(shown), 2 + len(shown), 2, heights=[1.3, 1] + [0.32] * len(shown))
    nyquist, n = bank.sample_rate / 2, len(bank.centre)
    axis = plots.add(fig, grid[0, 0], f"{title}: |FFT| of its {n:,} filters, sorted by centre frequency")
    image = axis.imshow(bank.spectrum.T.numpy(), origin="lower", aspect="auto", extent=(0, n, 0, nyquist), cmap="magma",
                        vmin=0, vmax=1, interpolation="antialiased")  # fmt: skip
    axis.plot([0, n], [0, nyquist], color="white", linestyle="--", linewidth=1, label="a Fourier basis")
    axis.set(xlabel="filter", ylabel="Hz", xlim=(0, n), ylim=(0, nyquist))
    axis.legend(fontsize=8, loc="upper left")
    fig.colorbar(image, ax=axis, pad=0.01).ax.tick_params(labelsize=8)
    curves(plots.add(fig, grid[0, 1], "centre frequency, beside the controls"), {title: bank, **controls}, spectrum)
    axis = plots.add(fig, grid[1, :], "bandwidth over centre frequency, each dot a filter")
    sides = list({**controls, title: bank}.items())
    for (name, side), color in zip(sides, [*_COLORS[1 : len(sides)], _COLORS[0]], strict=True):
        axis.scatter(side.centre, side.bandwidth, s=3, color=color, alpha=0.5, linewidths=0, label=name)
    axis.axhline(bank.sample_rate / bank.weight.shape[1], color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="Hz", ylabel="bandwidth, Hz (dotted: 1 / T)", xlim=(0, nyquist), yscale="log")
    axis.legend(fontsize=8, frameon=False, markerscale=4, ncols=len(sides))
    for row, (kind, rows) in enumerate(shown.items(), 2):
        gallery(plots.add(fig, grid[row, :], f"{kind}: {len(rows):,} of {n:,} filters"), bank, rows)
    return fig


def draw_tasks(
    banks: Mapping[str, FilterBank], tasks: Mapping[str, str], controls: Mapping[str, FilterBank], spectrum: Tensor
) -> plots.Figure:
    """The curves of several models, a colour for each task, beside the controls; and how far all pairs are apart."""
    fig, grid = plots.figure(13, 5.5, 1, 2)
    names = list(dict.fromkeys(tasks[name] for name in banks))
    axis = plots.add(fig, grid[0, 0], "centre frequencies of the learned filters, a line for each model")
    curves(axis, {**banks, **controls}, spectrum)
    for line, name in zip(axis.get_lines(), [*banks, *controls], strict=False):  # the last line is Fourier's
        at = 2 * names.index(tasks[name]) if name in banks else 2 * list(controls).index(name) + 1
        line.set(color=_COLORS[at % len(_COLORS)], linewidth=1.5 if name in banks else 1.0)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    axis = plots.add(fig, grid[0, 1], "distance between two curves, each dot a pair of models")
    pairs = distances(banks, tasks)
    for name, control in controls.items():
        pairs[f"to {name}"] = [curve_distance(bank, control) for bank in banks.values()]
    for row, values in enumerate(pairs.values()):
        axis.scatter(values, [row] * len(values), s=30, color=plots.BLUE, alpha=0.6, linewidths=0)
        if values:
            axis.plot([sum(values) / len(values)] * 2, [row - 0.25, row + 0.25], color="black", linewidth=1.5)
    axis.set_yticks(range(len(pairs)), list(pairs))
    axis.set(xlabel="Hz (line: the mean)", xlim=(0, None), ylim=(len(pairs) - 0.5, -0.5))
    return fig


_COLORS = (plots.BLUE, plots.GREY, plots.ORANGE, "#4a9a5b", "#8a5bb0", "#b04a4a", "#3f3f3f", "#c9a227")


def curves(axis: plots.Axes, banks: Mapping[str, FilterBank], spectrum: Tensor | None = None) -> None:
    """Sorted centres over the share of the filters, with the Fourier line; the spectrum runs along the Hz axis."""
    nyquist = next(iter(banks.values())).sample_rate / 2
    for i, (name, bank) in enumerate(banks.items()):
        share = (torch.arange(len(bank.centre)) + 0.5) / len(bank.centre)
        label = f"{name} (line: R² {bank.straightness:.3f})"
        axis.plot(share, bank.centre, color=_COLORS[i % len(_COLORS)], linewidth=2 if i == 0 else 1.2, label=label)
    axis.plot([0, 1], [0, nyquist], color="black", linestyle="--", linewidth=0.8, label="Fourier line")
    if spectrum is not None:
        hz = torch.linspace(0, nyquist, len(spectrum))
        axis.fill_betweenx(hz, 0, 0.3 * spectrum, color="0.85", linewidth=0, label="mean spectrum of the sound")
    axis.set(xlabel="share of the filters", ylabel="centre, Hz", xlim=(0, 1), ylim=(0, nyquist))
    axis.legend(fontsize=8, frameon=False, loc="upper left")


def gallery(axis: plots.Axes, bank: FilterBank, rows: Sequence[int], columns: int = 8) -> None:
    """Up to `columns` of the given rows side by side, spread over their centres, each scaled to its own peak."""
    chosen = dict.fromkeys(rows[(2 * j + 1) * len(rows) // (2 * columns)] for j in range(columns)) if rows else []
    for column, i in enumerate(chosen):
        wave = bank.weight[i] / bank.weight[i].abs().max().clamp(min=1e-12)
        axis.plot(column + torch.linspace(0, 0.9, len(wave)), wave, color=plots.BLUE, linewidth=0.7)
        axis.text(column + 0.45, -1.2, f"{bank.centre[i]:,.0f} Hz", ha="center", va="top", fontsize=8)
    axis.set(xlim=(-0.05, columns), ylim=(-1.7, 1.1))
    axis.axis("off")

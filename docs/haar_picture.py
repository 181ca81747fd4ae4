"""Draws docs/haar.png: what haar_pool does to an embedding of a bundled recording. Needs audiokernels[models].

python docs/haar_picture.py
"""

from pathlib import Path

import matplotlib
import torch
from audiomodels.audio import read_mono
from matplotlib import pyplot as plt

from audiokernels import haar_levels, haar_pool

matplotlib.use("Agg")
CLIP = Path(__file__).parents[1] / "python/audiomodels/clips/speech/en_demo.flac"
RATE, HOP, DIM, SEQLEN = 16000, 160, 64, 256  # a step is 10 ms


def embedding() -> torch.Tensor:
    """(1, 256, 64): log spectra of 25 ms through a linear layer as it is before training."""
    samples, _ = read_mono(CLIP, sample_rate=RATE)
    samples = torch.as_tensor(samples).flatten()[: SEQLEN * HOP]
    spectra = torch.stft(samples, 400, HOP, window=torch.hann_window(400), return_complex=True).abs()
    spectra = spectra.clamp(min=1e-3).log().T[:SEQLEN]
    torch.manual_seed(0)
    x = torch.nn.functional.layer_norm(torch.nn.Linear(spectra.shape[1], DIM)(spectra - spectra.mean(0)), (DIM,))
    return x.detach()[None]


def draw(path: Path) -> None:
    """Three images of (channel, time), every level as high as another, and three channels as curves."""
    x = embedding()
    levels = haar_levels(DIM, x.shape[1])
    sides = {
        "the embedding: every channel may change every 10 ms": x,
        "haar_pool(x): means over blocks of 1, 2, 4, ... steps; the last channel is one mean": haar_pool(x),
        'haar_pool(x, mode="causal", norm="count"): means over the last 1, 2, 4, ... steps': haar_pool(
            x, mode="causal", norm="count"
        ),
    }
    members = {level: levels.count(level) for level in dict.fromkeys(levels)}
    rows = [place + i / n for place, n in enumerate(members.values()) for i in range(n)] + [len(members)]
    names = [f"{n} x {'all' if level < 0 else f'{10 << level} ms'}" for level, n in members.items()]
    time = torch.arange(x.shape[1] + 1) * HOP / RATE
    figure = plt.figure(figsize=(11, 11), layout="constrained")
    grid = figure.add_gridspec(4, 1, height_ratios=[1, 1, 1, 1.2])
    for row, (title, values) in enumerate(sides.items()):
        axis = figure.add_subplot(grid[row])
        axis.pcolormesh(time, rows, values[0].T, cmap="RdBu_r", vmin=-2, vmax=2, rasterized=True)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_yticks([place + 0.5 for place in range(len(names))], names, fontsize=8)
        axis.hlines(range(1, len(names)), 0, time[-1], color="black", linewidth=0.6)
        axis.set_xticks([])
        if row == 0:
            axis.set_ylabel("channels x block")
    axis = figure.add_subplot(grid[3])
    colors = {"embedding": "0.75", "block": "tab:red", "causal": "tab:blue"}
    for place, level in enumerate((1, 3, 5)):
        channel, shift = levels.index(level), -4.5 * place
        for (name, color), values in zip(colors.items(), sides.values(), strict=True):
            label = None if place else name
            axis.plot(time[:-1], values[0, :, channel] + shift, color=color, linewidth=1.2, label=label)
        axis.text(-0.01, shift, f"channel {channel}\n{10 << level} ms", ha="right", va="center", fontsize=8,
                  transform=axis.get_yaxis_transform())  # fmt: skip
    axis.set_xlim(0, time[-1])
    axis.set_yticks([])
    axis.set_xlabel("time, s")
    axis.legend(loc="upper right", bbox_to_anchor=(1, 1.12), ncols=3, fontsize=8, frameon=False)
    axis.set_title("three channels: block means look ahead, causal windows lag behind", fontsize=10, loc="left")
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    draw(Path(__file__).with_name("haar.png"))

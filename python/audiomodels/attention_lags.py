"""How far back a SampleTransformer looks: the attention of every layer and head by lag, over a recording.

    mass(layer, head, lag) = mean over queries i of softmax_j(q_i . k_j / sqrt(D))[i - lag],    lag = 0 .. window - 1

A query at sample i sees samples i - window + 1 .. i, and predicts sample i + 1. Only queries count that have full
windows behind them in every layer. A block of queries at a time is multiplied with the keys that it sees: memory is
O(window) a query of the block, beside the O(time) of the model's own forward pass; the cost is that of attention.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from audiomodels import plots
from audiomodels._optional import require
from audiomodels.sample_transformer import SampleTransformer
from audiomodels.transformer_block import Block, rotate

QUERIES = 256  # of a block
TAPS = [2**i for i in range(10)]  # lags that a WaveNet's layers read, beside lag 0


class Lags(NamedTuple):
    """Of every layer and head."""

    mass: Tensor  # float64 (n_layer, n_head, window), sums to 1 over lags
    entropy: Tensor  # bits (n_layer, n_head), the mean over queries; of even attention log2(window)
    sample_rate: int

    @property
    def mean(self) -> Tensor:
        """Samples (n_layer, n_head)."""
        return self.mass @ torch.arange(self.mass.shape[2], dtype=torch.float64)


@torch.no_grad()
def attention_lags(model: SampleTransformer, codes: Tensor) -> Lags:
    """The attention of `model` over codes (time,).

    Errors: ValueError for fewer codes than a query with full windows in every layer needs, and one more.
    """
    config = model.config
    first = config.n_layer * (config.window - 1)
    if codes.ndim != 1 or len(codes) <= first:
        least = f"{config.n_layer} layers with a window of {config.window} need more than {first:,}"
        raise ValueError(f"codes must be one row of samples: {least}; got shape {tuple(codes.shape)}")
    found: list[tuple[Tensor, Tensor]] = []

    def look(block: Block, inputs: tuple) -> None:
        x, _, turn, *_ = inputs
        found.append(_of_block(block, x, turn, first - (len(codes) - x.shape[1])))

    hooks = [block.register_forward_pre_hook(look) for block in model.blocks]
    mode, model.mode = model.mode, "full"
    try:
        model(codes[None].to(model.embedding.weight.device), length=len(codes) - first)
    finally:
        model.mode = mode
        for hook in hooks:
            hook.remove()
    mass, entropy = (torch.stack(part).cpu() for part in zip(*found, strict=True))
    return Lags(mass, entropy, config.sample_rate)


def _of_block(block: Block, x: Tensor, turn: tuple[Tensor, Tensor] | None, first: int) -> tuple[Tensor, Tensor]:
    """Mass (H, window) and entropy (H,) of the queries from `first` on; x (1, time, E): what the layer reads."""
    qkv = block.qkv(block.norm1(x)).unflatten(2, (3, block.n_head, -1))
    q, k, _ = (part[0].transpose(0, 1) for part in qkv.unbind(2))
    if turn is not None:
        q, k = rotate(q, *turn), rotate(k, *turn)
    window, time = block.window, x.shape[1]
    mass = torch.zeros(block.n_head, window, dtype=torch.float64, device=x.device)
    entropy = mass.new_zeros(block.n_head)
    for begin in range(first, time, QUERIES):
        end = min(begin + QUERIES, time)
        scores = q[:, begin:end] @ k[:, begin - window + 1 : end].transpose(1, 2) / math.sqrt(q.shape[2])
        heads, rows, keys = scores.shape
        band = scores.contiguous().as_strided((heads, rows, window), (rows * keys, keys + 1, 1))  # row i: keys i ..
        p = band.softmax(2).flip(2)  # by lag
        mass += p.sum(1, dtype=torch.float64)
        entropy -= torch.special.xlogy(p, p).sum((1, 2), dtype=torch.float64) / math.log(2)
    return mass / (time - first), entropy / (time - first)


def table(lags: Lags) -> str:
    """A line a head: mean lag, the lag that half of the mass lies within, entropy, and the mass on a WaveNet's taps."""
    window, ms = lags.mass.shape[2], 1000 / lags.sample_rate
    taps = [tap for tap in [0, *TAPS] if tap < window]
    lines = ["layer  head   mean lag, ms   half within, ms   entropy, bits   on lags 0, 1, 2, 4, ..."]
    for layer, head in itertools.product(*map(range, lags.entropy.shape)):
        mass, mean, entropy = lags.mass[layer, head], lags.mean[layer, head] * ms, lags.entropy[layer, head]
        half, on_taps = int((mass.cumsum(0) < 0.5).sum()) * ms, mass[taps].sum()
        lines.append(f"{layer:5} {head:5} {mean:14.2f} {half:17.2f} {entropy:15.2f} {on_taps:26.1%}")
    even = f"{(window - 1) / 2 * ms:.2f} ms, {math.log2(window):.2f} bits, {len(taps) / window:.1%} on those lags"
    return "\n".join([*lines, f"even attention: mean lag {even}"])


def picture(lags: Lags, title: str) -> plots.Figure:
    """A panel a layer: each head's mass per octave of lag, beside even attention's, a WaveNet's taps marked."""
    n_layer, n_head, window = lags.mass.shape
    columns = min(2, n_layer)
    rows = -(-n_layer // columns)
    fig, grid = plots.figure(6.5 * columns, 0.6 + 2.9 * rows, rows, columns)
    starts = _bins(window)
    sides = [0.25, *(start - 0.5 for start in starts[1:])]  # lag 0 is drawn as an octave of its own
    octaves = torch.tensor(sides).double().log2().diff()

    def density(mass: Tensor) -> Tensor:
        return mass.cumsum(0)[[start - 1 for start in starts[1:]]].diff(prepend=mass.new_zeros(1)) / octaves

    even, colors = density(torch.full((window,), 1 / window).double()), require("matplotlib").colormaps["tab10"].colors
    for layer in range(n_layer):
        name = f"{title}: layer 0" if layer == 0 else f"layer {layer}"
        axis = plots.add(fig, grid[layer // columns, layer % columns], name)
        for tap in (tap for tap in TAPS if tap < window):
            axis.axvline(tap, color="0.85", linewidth=0.8, zorder=0)
        axis.stairs(even, sides, color="black", linestyle="--", linewidth=1, label="even attention")
        for head in range(n_head):
            label = f"head {head}: {lags.entropy[layer, head]:.1f} bits"
            axis.stairs(density(lags.mass[layer, head]), sides, color=colors[head % 10], linewidth=1.3, label=label)
        axis.set(xscale="log", xlim=(sides[0], sides[-1]), xlabel="lag, samples (grey lines: a WaveNet's taps)",
                 ylabel="mass per octave")  # fmt: skip
        ticks = [0.35] + [10**i for i in range(len(str(window - 1)))]
        axis.set_xticks(ticks, ["0", *(f"{tick:,}" for tick in ticks[1:])])
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, frameon=False, ncols=1 + n_head // 6)
    return fig


def _bins(window: int) -> list[int]:
    """Where bins of lags begin, and the end: single lags at first, then quarters of an octave about powers of two."""
    starts = {round(2 ** (i / 4 + 1 / 8) + 0.5) for i in range(4 * window.bit_length())}
    return [0, 1, *sorted(start for start in starts if 1 < start < window), window]

"""Draws docs/speed.png from benchmarks/results: each family of kernels beside its peer. Needs audiokernels[models].

python docs/speed_picture.py [CSV]
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from audiomodels import plots

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/intel-xeon-processor-2-50ghz.csv"


@dataclass(frozen=True)
class Bar:
    """How many times as fast as the peer of its panel; what was aimed at; what the machine allows."""

    name: str
    times: float
    goal: float | None = None
    limit: float | None = None


def rows_of(path: Path) -> dict[tuple, dict[str, str]]:
    """The rows of one thread by (benchmark, case, side, dtype)."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["threads"] == "1"]
    return {(row["benchmark"], row["case"], row["side"], row["dtype"]): row for row in rows}


def number(text: str) -> float | None:
    return float(text) if text else None


def generation(rows: dict) -> list[Bar]:
    """Samples per second over those of eager PyTorch on ring buffers."""
    bars = []
    for batch in (1, 16):
        for dtype in ("float32", "bfloat16", "int8"):
            row = rows["wavenet_generate", f"batch {batch}", "wavenet_generate", dtype]
            bars.append(Bar(f"WaveNet, batch {batch}, {dtype}", float(row["ratio"]), number(row["goal"])))
    for layers, heads in ((3, 4), (8, 8)):
        for dtype in ("float32", "float32, bfloat16 cache", "bfloat16", "int8"):
            case = f"{layers} layers, {heads} heads, batch 1"
            row = rows["transformer_generate", case, "transformer_generate", dtype]
            limit = rows["transformer_generate", case, "limit: pack and cache read once a sample", dtype]
            name = f"transformer, {layers} layers, {dtype}"
            bars.append(Bar(name, float(row["ratio"]), number(row["goal"]), float(limit["ratio"])))
    return bars


def attention(rows: dict) -> list[Bar]:
    """Rate over that of scaled_dot_product_attention."""
    bars = []
    cases = [(f"headdim {d}, 4096 positions, 1 heads", f"headdim {d}") for d in (16, 32, 64)]
    cases.append(("headdim 16, 16384 positions, 1 heads, window 1024", "window 1,024 of 16,384"))
    for dtype in ("float32", "bfloat16"):
        for case, name in cases:
            for what, short in (("forward", "forward"), ("forward + backward", "both ways")):
                row = rows.get(("causal_attention", f"{case}, {what}", "causal_attention", dtype))
                if row:
                    bars.append(Bar(f"{name}, {dtype}, {short}", float(row["ratio"]), number(row["goal"])))
    return bars


def haar(rows: dict) -> list[Bar]:
    """Rate over that of torch.compile of the loop; the limit is that of copying the tensor."""
    bars = []
    for dtype in ("float32", "bfloat16"):
        for mode in ("block", "causal"):
            for what, short in (("forward", "forward"), ("forward + backward", "both ways")):
                case = f"32x4096x256, {mode}, dyadic, {what}"
                ours, peer = (rows["haar_pool", case, side, dtype] for side in ("haar_pool", "torch.compile"))
                times, limit = float(ours["ratio"]) / float(peer["ratio"]), 1 / float(peer["ratio"])
                bars.append(Bar(f"{mode}, {dtype}, {short}", times, 5.0, limit))
    return bars


def draw(path: Path, source: Path) -> None:
    """Three panels of bars."""
    rows = rows_of(source)
    any_row = next(iter(rows.values()))
    panels = {
        "generation: times eager PyTorch on ring buffers": generation(rows),
        "causal_attention: times torch's SDPA": attention(rows),
        "haar_pool: times torch.compile": haar(rows),
    }
    figure, grid = plots.figure(14, 5.2, 1, 3)
    for place, (title, bars) in enumerate(panels.items()):
        axis = plots.add(figure, grid[0, place], title)
        places = range(len(bars))
        axis.barh(places, [bar.times for bar in bars], height=0.7, color=plots.BLUE)
        for y, bar in zip(places, bars, strict=True):
            axis.text(0, y, f" {bar.times:.1f}", va="center", fontsize=8, color="white")
            for value, color in ((bar.goal, plots.ORANGE), (bar.limit, "black")):
                if value is not None:
                    axis.plot([value, value], [y - 0.42, y + 0.42], color=color, linewidth=2)
        axis.axvline(1, color=plots.GREY, linewidth=1)
        axis.set_yticks(places, [bar.name.replace("float32", "fp32").replace("bfloat16", "bf16") for bar in bars])
        axis.invert_yaxis()
        axis.margins(x=0.08)
    marks = "orange: aimed at; black: the limit, reading the weights and the cache once a sample, copying the tensor"
    machine = f"one core, {any_row['device']}, {any_row['isa']}, torch {any_row['torch']}"
    figure.suptitle(f"Medians on {machine}; {marks}", fontsize=9)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    draw(ROOT / "docs/speed.png", Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)

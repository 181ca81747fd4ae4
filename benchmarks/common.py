"""Shared by the benchmarks: correct first, then time; the sides alternate within one run; the limit in the same table.

A benchmark checks its sides against each other (`gate`), times them with `interleave`, turns each timing into a Row and
hands the rows to `finish`, which prints the table and writes CSV and picture. Needs torch and numpy; matplotlib only
for --png.

Clocks: one thread on the CPU is timed by its CPU time (what other programs take does not count), several threads and
the GPU by wall time. Every row says which. Figures are medians over the rounds, with quartiles; a ratio is the median
of the ratios taken within each round, where both sides met the same machine.

`python benchmarks/common.py [--device cuda]` prints the name under which results of this machine are filed.
"""

import argparse
import csv
import ctypes
import datetime
import importlib
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from audiokernels._library import C

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


# ---- timing


@dataclass(frozen=True)
class Clock:
    """`now` in seconds; `settle` waits until the work that was asked for is done."""

    name: str
    now: Callable[[], float]
    settle: Callable[[], object] = lambda: None


def clock_of(device: str, threads: int = 1) -> Clock:
    if device == "cuda":
        return Clock("wall", time.perf_counter, torch.cuda.synchronize)
    return Clock("cpu", time.thread_time) if threads == 1 else Clock("wall", time.perf_counter)


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one number a round."""

    seconds: tuple[float, ...]
    clock: str

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def times_as_fast_as(self, other: "Timing") -> float:
        """Median over the rounds of other's time / this one's."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def interleave(
    sides: Mapping[str, Callable[[], object]], clock: Clock, *, rounds: int = 9, seconds: float = 0.1
) -> dict[str, Timing]:
    """Time the sides in turn, A B A B ...: `rounds` times each, calls repeated until a turn lasts about `seconds`."""
    calls = {name: _calls_lasting(call, clock, seconds) for name, call in sides.items()}
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            turns[name].append(_time(call, calls[name], clock) / calls[name])
    return {name: Timing(tuple(times), clock.name) for name, times in turns.items()}


def _time(call: Callable[[], object], n: int, clock: Clock) -> float:
    clock.settle()
    start = clock.now()
    for _ in range(n):
        call()
    clock.settle()
    return clock.now() - start


def _calls_lasting(call: Callable[[], object], clock: Clock, seconds: float) -> int:
    """How many calls last `seconds`, found by doubling (the first call, which may set things up, is not counted)."""
    _time(call, 1, clock)
    n = 1
    while True:
        took = _time(call, n, clock)
        if took >= seconds / 4 or n >= 1 << 20:
            return max(1, round(n * seconds / max(took, 1e-9)))
        n *= 2


_passed: list[tuple[float, str]] = []  # of this run: (share of what was allowed, what)


def gate(what: str, error: float, bound: float) -> None:
    """Correct first: end the benchmark if `error` (NaN included) is not within `bound`."""
    if not error <= bound:
        raise SystemExit(f"not timed, because wrong: {what}: error {error:.3g}, allowed {bound:.3g}")
    _passed.append((error / bound, what))


def off_edge(codes: torch.Tensor, other: torch.Tensor, logits: torch.Tensor, uniforms: torch.Tensor) -> float:
    """How far from the CDF's edges two generations part: the largest |u - edge| at a row's first difference.

    Codes that part at a number within rounding of an edge agree; after that their histories differ.
    """
    farthest = 0.0
    cdf = torch.softmax(logits.double(), 2).cumsum(2)
    for row in range(codes.shape[0]):
        different = (codes[row].long() != other[row].long()).nonzero()
        if len(different):
            t = int(different[0])
            low, high = sorted((int(codes[row, t]), int(other[row, t])))
            edges = cdf[row, t, low:high]
            farthest = max(farthest, float((uniforms[row, t].double() - edges).abs().max()))
    return farthest


def optional(module: str) -> ModuleType | None:
    """A peer, or a part of audiomodels; None, and said, where it or what it imports is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"not timed, because not importable: {module}: {error}")
        return None


def keep_freed_memory(keep: bool) -> None:
    """On Linux: whether malloc keeps large blocks that were freed for the next result, or gives them back at once."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1 if keep else 1 << 17)  # M_TRIM_THRESHOLD


# ---- limits: what the machine can do at most


def read_rate(n_bytes: int, clock: Clock, device: str = "cpu") -> float:
    """Bytes a second at which `n_bytes` are read again and again: the fastest of three of torch's reductions."""
    x = torch.ones(max(1, n_bytes // 4), device=device)
    calls = {"dot": lambda: torch.dot(x, x), "sum": lambda: torch.sum(x), "amax": lambda: torch.amax(x)}
    times = interleave(calls, clock, rounds=9, seconds=0.02)
    return 4 * x.numel() / min(timing.median for timing in times.values())


def copy_rate(clock: Clock, device: str = "cpu", n_bytes: int = 0) -> float:
    """Bytes a second, read and written together, of a copy far larger than the caches."""
    n_bytes = n_bytes or (1 << 30 if device == "cuda" else 1 << 27)
    source = torch.ones(n_bytes // 8, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, clock, rounds=5, seconds=0.02)["copy"]
    return 8 * source.numel() / timing.median


def mm_rate(clock: Clock, device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 0) -> float:
    """FLOP a second of torch.mm on square matrices of random numbers."""
    size = size or (8192 if device == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = interleave({"mm": lambda: torch.mm(a, b)}, clock, rounds=5, seconds=0.05)["mm"]
    return 2 * size**3 / timing.median


# ---- rows


@dataclass
class Row:
    """One line of the table. `median`, `low` and `high` (quartiles) are in `unit`."""

    case: str
    side: str
    unit: str
    median: float
    low: float | None = None
    high: float | None = None
    dtype: str = ""
    batch: int | None = None
    threads: int = 1
    clock: str = ""
    rounds: int | None = None
    ratio: float | None = None
    ratio_to: str = ""
    floor: float | None = None
    goal: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Where `ratio` stands: at the goal, between floor and goal, or below both."""
        if self.ratio is None or self.goal is None:
            return ""
        if self.ratio >= self.goal:
            return "goal met"
        return "floor met" if self.floor is not None and self.ratio >= self.floor else "MISSED"


def rate_row(case: str, side: str, timing: Timing, work: float, unit: str, **columns) -> Row:
    """A row in `unit` = work / second, for `work` done in a call."""
    low, high = timing.quartiles
    return Row(case, side, unit, work / timing.median, work / high, work / low, clock=timing.clock,
               rounds=len(timing.seconds), **columns)  # fmt: skip


def time_row(case: str, side: str, timing: Timing, unit: str = "us", **columns) -> Row:
    """A row in units of time a call."""
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    low, high = timing.quartiles
    return Row(case, side, unit, scale * timing.median, scale * low, scale * high, clock=timing.clock,
               rounds=len(timing.seconds), **columns)  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """The rows as text, one block a case."""
    head = ("", "dtype", "batch", "threads", "median", "quartiles", "unit", "clock", "ratio", "floor/goal", "", "")
    lines, cases = [], {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    for case, members in cases.items():
        cells = [head] + [_cells(row) for row in members]
        used = [i for i in range(len(head)) if any(line[i] for line in cells[1:])]
        widths = {i: max(len(line[i]) for line in cells) for i in used}
        lines += ["", case, "-" * len(case)]
        for line in cells:
            parts = [line[i].rjust(widths[i]) if i in (4, 8) else line[i].ljust(widths[i]) for i in used]
            lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    spread = f"{_short(row.low)}..{_short(row.high)}" if row.low is not None else ""
    ratio = f"{row.ratio:.3g}x {row.ratio_to}" if row.ratio is not None else ""
    target = "/".join(f"{x:g}x" for x in dict.fromkeys((row.floor, row.goal)) if x is not None)
    batch = "" if row.batch is None else str(row.batch)
    return (row.side, row.dtype, batch, str(row.threads), _short(row.median), spread, row.unit, row.clock, ratio,
            target, row.verdict, row.note)  # fmt: skip


def _short(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 999.5 else f"{x:.3g}"


# ---- where it ran


def device_name(device: str = "cpu") -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return model[1].strip() if model else platform.processor() or platform.machine()


def device_slug(device: str = "cpu") -> str:
    """The device's name as a file name: benchmarks/results/<slug>.csv."""
    words = re.sub(r"\((r|tm)\)", "", device_name(device).lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def commit() -> str:
    """The commit, with "+changes" where kernels, packages or benchmarks differ from it; outside of git, $COMMIT."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        if found.returncode:
            return os.environ.get("COMMIT", "unknown")
        watched = ["csrc", "audiokernels", "python", "benchmarks/*.py", "CMakeLists.txt"]
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *watched], cwd=ROOT, capture_output=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() + ("+changes" if changes.returncode else "")


def facts(device: str) -> dict[str, str]:
    """The columns that are the same for every row of a run."""
    return {
        "device": device_name(device),
        "isa": "none (reference)" if C is None else C.isa(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


COLUMNS = ["benchmark", *(field.name for field in fields(Row)), "device", "isa", "torch", "commit", "date"]


def write_csv(path: Path, benchmark: str, rows: Sequence[Row], where: Mapping[str, str]) -> None:
    """Replace the rows of `benchmark` in the file, and leave those of other benchmarks as they are."""
    kept = []
    if path.is_file():
        with path.open(newline="") as file:
            kept = [line for line in csv.DictReader(file) if line["benchmark"] != benchmark]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        for row in rows:
            cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({"benchmark": benchmark, **cells, **where})


def write_bars(path: Path, title: str, rows: Sequence[Row]) -> None:
    """A picture: one panel a case and unit, one bar a row: blue where there is an aim (floor or goal), else grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.case, row.unit), []).append(row)
    columns = min(3, -(-len(panels) // 4))
    lines = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(2 + 5.5 * columns, 1 + lines * (0.6 + 0.22 * most)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    ours = {row.side for row in rows if row.goal is not None or row.floor is not None}
    for axis, ((case, unit), members) in zip(axes.flat, panels.items(), strict=False):
        names = [_bar_name(row, members) for row in members]
        medians = np.array([row.median for row in members])
        low = np.array([row.median if row.low is None else row.low for row in members])
        high = np.array([row.median if row.high is None else row.high for row in members])
        places = np.arange(len(members))
        colours = ["#6db3f2" if row.side in ours else "silver" for row in members]
        spread = np.abs(np.stack([medians - low, high - medians]))
        axis.barh(places, medians, xerr=spread, height=0.75, color=colours, error_kw={"elinewidth": 0.8})
        for place, row in zip(places, members, strict=True):
            if row.ratio is not None:
                axis.text(0, place, f" {row.ratio:.2g} x {row.ratio_to}", va="center", fontsize=6)
        axis.set_yticks(places, names, fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.invert_yaxis()
        axis.set_title(f"{case} ({unit})" if unit else case, fontsize=8, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bar_name(row: Row, members: Sequence[Row]) -> str:
    """The side and dtype, and what else tells the bars of a panel apart."""
    counts = {name: {getattr(other, name) for other in members} for name in ("batch", "threads")}
    told = [f"{name} {value}" for name, values in counts.items() if len(values) > 1 and (value := getattr(row, name))]
    return ", ".join([" ".join(filter(None, (row.side, row.dtype))), *told])


# ---- the command line of every benchmark


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--quick", action="store_true", help="few and short rounds: shows that it runs, not how fast")
    result.add_argument("--csv", type=Path, metavar="FILE", help="add the rows (auto: benchmarks/results/<device>.csv)")
    result.add_argument("--png", type=Path, metavar="FILE", help="draw the rows as bars")
    result.add_argument("--instruction-set", metavar="NAME", help="of the CPU kernels, instead of the best one")
    return result


def begin(arguments: argparse.Namespace) -> Clock:
    """Apply the common arguments; the clock of one thread."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    if arguments.instruction_set:
        if C is None:
            raise SystemExit("--instruction-set: nothing is compiled in this installation")
        try:
            C.set_isa(arguments.instruction_set)
        except ValueError as error:
            raise SystemExit(f"--instruction-set: {error}") from None
    torch.set_num_threads(1)
    return clock_of(arguments.device)


def finish(benchmark: str, rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Print the table; write the files that were asked for."""
    where = facts(arguments.device)
    if _passed:
        share, what = max(_passed)
        print(f"correct before timed: {len(_passed)} checks; nearest to its bound, at {share:.2g} of it: {what}")
    print(table(rows))
    print("\n" + ", ".join(f"{name}: {value}" for name, value in where.items()))
    if hasattr(os, "getloadavg"):
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if arguments.quick:
        print("--quick: these figures show that it runs, not how fast it is")
    if arguments.csv:
        path = arguments.csv
        if str(path) == "auto":
            path = RESULTS / f"{device_slug(arguments.device)}.csv"
        write_csv(path, benchmark, rows, where)
        print(f"wrote {path}")
    if arguments.png:
        write_bars(arguments.png, f"{benchmark}, {where['device']}, {where['isa']}, torch {where['torch']}", rows)
        print(f"wrote {arguments.png}")


if __name__ == "__main__":
    choice = argparse.ArgumentParser(description="Print the file name of this machine's results.")
    choice.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    print(device_slug(choice.parse_args().device))

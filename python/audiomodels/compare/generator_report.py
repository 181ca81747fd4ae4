"""The tables of a comparison, and what they allow to be said: generators.json, generators.md, generators.png.

"A is better than B" is said only where both beat LPC-64, both have at least three seeds and equal targets, the interval
of the paired difference over pieces excludes 0, and the last two checkpoints of both agree with it on dev. Everything
else is "not separated", or why nothing can be said.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from audiomodels import plots
from audiomodels.compare import bootstrap
from audiomodels.compare.bootstrap import TOP1, TOP5, Estimate, Units
from audiomodels.compare.generator_rows import Protocol
from audiomodels.compare.report import SEEDS_FOR_AN_ORDER, SMOKE, form, replace_text

FLOOR = "lpc64"
# (row, the row that the paper, or the control, puts behind it, what that would say)
ORDERS = (
    ("wavenet30", "wavenet10", "paper: more WaveNet layers are better"),
    ("transformer-small", "wavenet10", "paper: the small transformer beats the small WaveNet"),
    ("transformer-small", "wavenet30", "paper: the small transformer beats the large WaveNet"),
    ("transformer-context", "transformer-small", "paper: conditioning on a wider context helps"),
    ("transformer-medium", "transformer-small", "paper: more layers are better"),
    ("transformer-large", "transformer-medium", "paper: more layers are better"),
    ("transformer-context", "transformer-wide", "control: conditioning helps beyond its parameters"),
    ("transformer-context", "transformer-long", "control: conditioning helps beyond its context"),
    ("transformer-context", "transformer-shuffled", "control: it is the context that helps"),
    ("transformer-large", "wavenet30-matched", "equal parameters: the transformer beats the WaveNet"),
    ("transformer-small", "samplernn", "the small transformer beats SampleRNN"),
)
TRIVIAL = {
    "repeat": "repeat the last code +-2",
    "linear": "linear extrapolation +-2",
    "unigram": "unigram",
    "bigram": "bigram",
    FLOOR: "LPC-64, adaptive residual histogram",
}


@dataclass(frozen=True)
class Line:
    """All seeds of one row on one kind of data."""

    name: str
    title: str
    runs: list[dict]
    test: Units  # mean over the seeds
    bits: Estimate
    undertrained: bool


@dataclass(frozen=True)
class Verdict:
    """What can be said of a pair of rows; difference: bits of the first minus bits of the second, less is better."""

    first: str
    second: str
    claim: str
    difference: Estimate | None
    says: str


def write_all(out: Path, found: dict[str, Any], protocol: Protocol) -> None:
    """found: "rows", "trivial" (lists of results) and "speed" (row -> result), as generators.py leaves them."""
    kinds = list(dict.fromkeys((t["part"], t["companding"]) for t in [*found["trivial"], *found["rows"]]))
    tables = {kind: lines_of(found, *kind) for kind in kinds}
    verdicts = {kind: list(orders(table, protocol)) for kind, table in tables.items()}
    estimates = {
        f"{part} {companding}": {
            "rows": {line.name: {**asdict(line.bits), "undertrained": line.undertrained} for line in tables[kind]},
            "orders": [asdict(verdict) for verdict in verdicts[kind]],
        }
        for kind in kinds
        for part, companding in [kind]
    }
    rows = [{**run, "bits": asdict(bootstrap.bits(run["test"]))} for run in found["rows"]]
    replace_text(out / "generators.json", json.dumps({"command": "compare-generators", "protocol": asdict(protocol),
        "estimates": estimates, **found, "rows": rows}, indent=1, allow_nan=False) + "\n")  # fmt: skip
    parts = [head(protocol)]
    for kind in kinds:
        parts += [table_of(kind, tables[kind], found, protocol), *said(verdicts[kind], protocol)]
    replace_text(out / "generators.md", "\n".join([*parts, speeds(found["speed"]), ""]))
    picture(out / "generators.png", tables, found, protocol)


def lines_of(found: dict[str, Any], part: str, companding: str) -> list[Line]:
    """The rows of one kind of data, in the order of their first appearance in the table of rows."""
    floor = floor_bits(found, part, companding)
    runs: dict[str, list[dict]] = {}
    for run in found["rows"]:
        if (run["part"], run["companding"]) == (part, companding):
            runs.setdefault(run["row"], []).append(run)
    lines = []
    for name in sorted(runs, key=place):
        test = bootstrap.mean([run["test"] for run in runs[name]])
        bits = bootstrap.bits(test)
        undertrained = floor is None or not bits.value < floor
        lines.append(Line(name, runs[name][0]["title"], runs[name], test, bits, undertrained))
    return lines


def place(name: str) -> tuple[int, str]:
    """Where a row stands in the table."""
    order = ("wavenet10", "wavenet30", "transformer-small", "transformer-context", "transformer-medium",
             "transformer-large", "transformer-wide", "transformer-long", "transformer-shuffled", "wavenet30-matched",
             "samplernn")  # fmt: skip
    return (order.index(name) if name in order else len(order), name)


def floor_bits(found: dict[str, Any], part: str, companding: str) -> float | None:
    """Bits of LPC-64 there."""
    for record in found["trivial"]:
        if (record["part"], record["companding"]) == (part, companding):
            return bootstrap.bits(record["test"][FLOOR]).value
    return None


# --- what may be said ---------------------------------------------------------------------------------------------


def orders(lines: list[Line], protocol: Protocol) -> Iterator[Verdict]:
    """A verdict for each pair of ORDERS whose rows are there; none where the protocol only tests plumbing."""
    known = {line.name: line for line in lines}
    for first, second, claim in ORDERS if protocol.claims else ():
        if first in known and second in known:
            yield verdict(known[first], known[second], claim)


def verdict(a: Line, b: Line, claim: str) -> Verdict:
    """What the runs of two rows allow to be said of their order."""
    seeds = sorted({run["seed"] for run in a.runs} & {run["seed"] for run in b.runs})
    low = [line.title for line in (a, b) if line.undertrained]
    difference, says = None, ""
    if seeds:
        test = [bootstrap.mean([run["test"] for run in line.runs if run["seed"] in seeds]) for line in (a, b)]
        difference = bootstrap.difference(*test)
    if len({run["targets"] for run in [*a.runs, *b.runs]}) > 1:
        says = "no order: their targets are not equal"
    elif low:
        says = f"no order: undertrained ({', '.join(low)})"
    elif len(seeds) < SEEDS_FOR_AN_ORDER:
        says = f"no order yet: {len(seeds)} of {SEEDS_FOR_AN_ORDER} seeds"
    elif not difference.excludes_zero:
        says = f"not separated; a difference below {difference.half_width:.3f} bits could not have been seen"
    elif not settled(a, b, seeds, difference.value):
        says = "no order yet: the last two checkpoints disagree"
    else:
        better, worse = (a, b) if difference.value < 0 else (b, a)
        says = f"{better.title} is better than {worse.title}"
    return Verdict(a.name, b.name, claim, difference, says)


def settled(a: Line, b: Line, seeds: list[int], difference: float) -> bool:
    """Whether the mean over seeds on dev has the sign of `difference` at both of the last two checkpoints."""
    for back in (-1, -2):
        means = []
        for line in (a, b):
            curves = [run["curve"] for run in line.runs if run["seed"] in seeds]
            if any(len(curve) < 2 for curve in curves):
                return False
            means.append(sum(curve[back]["bits"] for curve in curves) / len(curves))
        if not (means[0] - means[1]) * difference > 0:
            return False
    return True


# --- text ---------------------------------------------------------------------------------------------------------


def head(protocol: Protocol) -> str:
    """What is common to all tables."""
    return f"""# Generators: next-sample prediction

Protocol "{protocol.name}", {protocol.sample_rate:,} Hz, 256 classes. Written by `audiokernels compare-generators`; what
the columns mean stands in docs/comparison.md. Bits per sample of the test split, mean over seeds, with the 95 %
interval of a bootstrap over pieces (piano) or utterances (speech); every target has at least {protocol.sight:,} real
samples before it. Piano is rendered: scores played through a sampled grand.
{"" if protocol.claims else SMOKE}"""


def table_of(kind: tuple[str, str], lines: list[Line], found: dict[str, Any], protocol: Protocol) -> str:
    """The table of one kind of data."""
    part, companding = kind
    length, sights = protocol.position_length, protocol.position_sights
    at = " | ".join(f"at {sight}-{sight + length}" for sight in sights)
    trivial = next((t["test"] for t in found["trivial"] if (t["part"], t["companding"]) == kind), {})
    units = len(next(iter([*(line.test for line in lines), *trivial.values()])))
    what = "piano (rendered)" if part == "piano" else part
    text = [f"## {what}, {'mu-law' if companding == 'mulaw' else companding} 8 bit", ""]
    if units < 6:
        text += [
            f"The test has {units} {'piece' if units == 1 else 'pieces'}: an interval over so few is too narrow.",
            "",
        ]
    text += [
        f"| row | parameters | bits | seeds: bits | top-1 | top-5 | {at} | targets | training s | |",
        f"|---|---|---|---|---|---|{'---|' * len(sights)}---|---|---|",
    ]
    for name, title in TRIVIAL.items():
        if name in trivial:
            test, empty = trivial[name], " |" * len(sights)
            known = all(sums[0] is not None for sums in test.values())
            bits = form(bootstrap.bits(test)) if known else "-"
            text.append(f"| {title} | | {bits} | | {hits(test, TOP1)} | {hits(test, TOP5)} |{empty} | | |")
    for line in lines:
        run = line.runs[0]
        seeds = ", ".join(f"{bootstrap.bits(r['test']).value:.3f}" for r in line.runs)
        where = " | ".join(_mean_text([r["positions"][i] for r in line.runs]) for i in range(len(sights)))
        seconds = sum(r["training_seconds"] for r in line.runs) / len(line.runs)
        targets = "/".join(f"{t / 1e6:.3g} M" for t in sorted({r["targets"] for r in line.runs}))
        mark = "undertrained" if line.undertrained else ""
        text.append(
            f"| {line.title} | {run['parameters']:,} | {form(line.bits)} | {seeds} | {hits(line.test, TOP1)} | "
            f"{hits(line.test, TOP5)} | {where} | {targets} | {seconds:,.0f} | {mark} |"
        )
    return "\n".join([*text, ""])


def said(verdicts: list[Verdict], protocol: Protocol) -> list[str]:
    """The verdicts as a table."""
    if not verdicts:
        return []
    text = ["| question | first minus second, bits | |", "|---|---|---|"]
    for v in verdicts:
        text.append(f"| {v.claim} ({v.first}, {v.second}) | {form(v.difference, sign=True)} | {v.says} |")
    return ["\n".join([*text, ""])]


def speeds(found: dict[str, dict]) -> str:
    """Time and memory of the rows."""
    if not found:
        return ""
    first = next(iter(found.values()))
    text = [
        "## Time and memory",
        "",
        f"Each row alone, {first['device']}, {first['threads']} thread(s). A step is {first['step_targets']:,} targets,"
        " forward and backward; kept: what its forward pass keeps for the backward pass.",
        "",
        "| row | ms a step | MB kept | ms a generated sample, batch 1 |",
        "|---|---|---|---|",
    ]
    for name in sorted(found, key=place):
        r = found[name]
        text.append(f"| {name} | {r['step_ms']:,.0f} | {r['kept_bytes'] / 1e6:,.1f} | {r['sample_ms']:.3f} |")
    return "\n".join(text)


def hits(units: Units, column: int) -> str:
    """An accuracy in per cent with its interval."""
    e = bootstrap.accuracy(units, column)
    return f"{e.value:.1%} [{e.low:.1%}, {e.high:.1%}]"


def _mean_text(values: list[float | None]) -> str:
    return "-" if None in values else f"{sum(values) / len(values):.3f}"


# --- picture ------------------------------------------------------------------------------------------------------


def picture(path: Path, tables: dict[tuple, list[Line]], found: dict[str, Any], protocol: Protocol) -> None:
    """Bits on dev over targets and over seconds, a row of panels for each kind of data."""
    fig, grid = plots.figure(13, 5.4 * max(1, len(tables)), max(1, len(tables)), 2)
    for row, ((part, companding), lines) in enumerate(tables.items()):
        what = f"{part}{' (rendered)' if part == 'piano' else ''}, {companding}"
        floor = floor_bits(found, part, companding)
        for column, (axis_of, unit, scale) in enumerate(
            (("targets", "million targets", 1e6), ("seconds", "training seconds", 1.0))
        ):
            axis = plots.add(fig, grid[row, column], f"{what}: bits per sample on dev")
            curves = {line.title: [_points(run, axis_of, scale) for run in line.runs] for line in lines}
            plots.curves(axis, curves, unit, lines={} if floor is None else {"LPC-64 (test)": floor})
    plots.save(fig, path)


def _points(run: dict, axis: str, scale: float) -> tuple[list[float], list[float]]:
    return [point[axis] / scale for point in run["curve"]], [point["bits"] for point in run["curve"]]

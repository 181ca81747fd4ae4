"""The tables of compare-representations, and what they allow to be said: representations.json, .md and .png.

Sources and voices are scored by accuracy, tags by macro mAP over labels with at least ten positive test sounds. A score
is a mean over seeds; its 95 % interval comes from drawing groups of near-duplicates (of tags: source groups; of voices:
utterances) again with replacement, the same draws for every row. "A is better than B" is said only where both have the
same three seeds or more, the interval of the paired difference excludes 0, and dev agrees at the last two checkpoints.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audiomodels import plots
from audiomodels.compare.bootstrap import Estimate
from audiomodels.compare.report import SEEDS_FOR_AN_ORDER, SMOKE, form, plain, replace_text
from audiomodels.compare.representation_data import Task
from audiomodels.compare.tagger_report import estimate, group_weights, map_values
from audiomodels.probe import ProbeScore

TITLES = {"sources": "(a) leaf label of a recording, accuracy", "tags": "(b) labels of a mixture, macro mAP",
          "voices": "(c) whose voice it is, accuracy"}  # fmt: skip
SHOTS = (None, 5)  # that orders are told of; None: all labels
# (row, the row that the talk, or the control, puts behind it, what that would say)
ORDERS = (
    ("vgg", "code-lm", "talk: supervised beats the code LM"),
    ("code-lm", "simclr", "talk: the code LM beats SimCLR"),
    ("vgg", "simclr", "supervised beats SimCLR"),
    ("code-lm", "bag", "the order of the codes matters: the LM beats a bag of them"),
    ("code-lm", "random-lm", "control: the code LM has learned something"),
    ("simclr", "random-vgg", "control: SimCLR has learned something"),
    ("code-lm", "code-lm-0.125", "the code LM's gap shrinks from 1/8 of the sound to all of it"),
    ("simclr", "simclr-0.125", "SimCLR's gap shrinks from 1/8 of the sound to all of it"),
    ("code-lm-x2", "code-lm-x0.5", "a wider code LM is better"),
    ("code-lm-k1024", "code-lm-k16", "more codes are better"),
)
# what a sweep varies, in the row's config: in words, and the kinds of rows that it is varied for
SWEEPS = {"n_code": ("the number of codes", ("code_lm",)),
          "share": ("the share of the sound that is learned from", ("code_lm", "simclr")),
          "width": ("the width of the language model, in multiples", ("code_lm",))}  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """Rows that differ in one setting, over the seeds that all of them have."""

    key: str  # of SWEEPS
    rows: dict[str, dict[float, str]]  # by kind: the setting's value -> the row's name
    seeds: list[int]
    estimates: dict[tuple[str, str], Estimate | None]  # by (task, row), all labels


def values_of(task: Task, score: ProbeScore) -> np.ndarray:
    """What a run keeps of a score: of one label a sound, (sounds,) the share of the draws that hit; of several,
    (1 + resamples,) the mAP of all test sounds and of each resample."""
    if task.single:
        hits = score.found.argmax(2) == task.test.labels.int().argmax(1)
        return hits.double().mean(0).numpy()
    return np.mean([map_values(found.double().numpy(), task.test) for found in score.found], axis=0)


def values(runs: list[dict], row: str, task: str, shots: int | None, seeds: list[int]) -> np.ndarray:
    """(1 + resamples,): the score of a row over these seeds, of all test sounds and of each resample."""
    mine = [next(r for r in runs if r["row"] == row and r["seed"] == seed)["found"] for seed in seeds]
    found = [run[f"{task}:{shots}"] for run in mine]
    if task == "tags":
        return np.mean(found, axis=0)
    weights = group_weights([group for run in mine for group in run[f"{task}:groups"].tolist()])
    return (weights @ np.concatenate(found)) / weights.sum(1)


def seeds_of(runs: list[dict], *names: str) -> list[int]:
    """The seeds that all of these rows have."""
    return sorted(set.intersection(*({run["seed"] for run in runs if run["row"] == name} for name in names)))


def write_all(out: Path, runs: list[dict], protocol: dict[str, Any]) -> None:
    """runs: results with what they "found", in the order of the table. Rows of a sweep have tables of their own."""
    usual = {"n_code": protocol["n_code"], "share": 1.0, "width": 1.0}
    sweeps = [found for key in SWEEPS if (found := sweep_of(runs, key, usual))]
    varied = [run for run in runs if any(run["config"][key] not in (0, value) for key, value in usual.items())]
    names = [name for name in dict.fromkeys(run["row"] for run in runs) if name not in {run["row"] for run in varied}]
    shots = protocol["shots"]
    tables = {
        task: {row: [estimate(values(runs, row, task, count, seeds_of(runs, row))) for count in shots] for row in names}
        for task in TITLES
    }
    verdicts = said(runs) if protocol["claims"] else []
    text = [head(protocol, runs)]
    text += [table_of(task, table, runs, shots) for task, table in tables.items()]
    text += [order_table(verdicts), *(sweep_table(sweep, runs) for sweep in sweeps), noise_table(runs)]
    unscored = [{key: value for key, value in run.items() if key != "found"} for run in runs]
    estimates = {
        task: {row: {str(s): plain(e) for s, e in zip(shots, found, strict=True)} for row, found in table.items()}
        for task, table in tables.items()
    }
    content = {"command": "compare-representations", "protocol": protocol, "estimates": estimates, "orders": verdicts,
               "sweeps": {sweep.key: plain_sweep(sweep) for sweep in sweeps}, "runs": unscored}  # fmt: skip
    replace_text(out / "representations.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    replace_text(out / "representations.md", "\n".join(part for part in text if part))
    picture(out / "representations.png", tables, runs, shots, sweeps)


def said(runs: list[dict]) -> list[dict]:
    """A verdict for each pair of ORDERS whose rows are there, for each task and number of labels."""
    names, verdicts = {run["row"] for run in runs}, []
    for first, second, claim in ORDERS:
        if not {first, second} <= names or not (seeds := seeds_of(runs, first, second)):
            continue
        for task in TITLES:
            for shots in SHOTS:
                difference = estimate(
                    values(runs, first, task, shots, seeds) - values(runs, second, task, shots, seeds)
                )
                says = verdict(runs, (first, second), task, seeds, difference)
                verdicts.append({"first": first, "second": second, "claim": claim, "task": task, "shots": shots,
                                 "difference": plain(difference), "says": says})  # fmt: skip
    return verdicts


def verdict(runs: list[dict], pair: tuple[str, str], task: str, seeds: list[int], difference: Estimate | None) -> str:
    """What may be said of the rows of a pair."""
    if len(seeds) < SEEDS_FOR_AN_ORDER:
        return f"no order yet: {len(seeds)} seeds of both, {SEEDS_FOR_AN_ORDER} are needed"
    if difference is None or not difference.excludes_zero:
        width = "nothing" if difference is None else f"a difference below {difference.half_width:.3f}"
        return f"not separated; {width} could not have been seen"
    sides = [[run for run in runs if run["row"] == row and run["seed"] in seeds] for row in pair]
    before, now = (
        [np.mean([figure(run) for run in side]) for side in sides]
        for figure in (lambda run: run["dev_before"][task], lambda run: run["tasks"][task][-1]["dev"])
    )
    sign = np.sign(difference.value)
    if not (sign * (before[0] - before[1]) > 0 and sign * (now[0] - now[1]) > 0):
        return "no order yet: the last two checkpoints disagree on dev"
    return f"{sides[0 if sign > 0 else 1][0]['title']} is better"


def head(protocol: dict[str, Any], runs: list[dict]) -> str:
    """What is common to all tables."""
    steps = sorted({run["steps"] for run in runs})
    clips = " or ".join(f"{count * protocol['batch']:,}" for count in steps)
    return f"""# Representations

Protocol "{protocol["name"]}": each trained row has seen {clips} one-second crops.
Written by `audiokernels compare-representations`. The rows learn from the same sound without labels; the supervised VGG
learns each task's labels, all of them, before the probe reads its features. Then one probe for all: logistic regression
on mean and deviation over time, standardised; of a bag of codes a small MLP. Labels per class: {
        ", ".join("all" if count is None else str(count) for count in protocol["shots"])
    }; few labels are drawn
{protocol["draws"]} times. Seed s holds out fold s of the sources. Intervals: 95 %, paired bootstrap over groups.
{"" if protocol["claims"] else SMOKE}"""


def table_of(task: str, table: dict[str, list[Estimate | None]], runs: list[dict], shots: list[int | None]) -> str:
    """The table of one task."""
    titles = ["row", *("all labels" if s is None else f"{s} a class" for s in shots), "parameters", "lr", "seeds"]
    text = [f"## {TITLES[task]}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row, found in table.items():
        mine = [run for run in runs if run["row"] == row]
        lr = "-" if mine[0]["lr"] is None else f"{mine[0]['lr']:g}"
        seeds = ", ".join(str(run["seed"]) for run in mine)
        figures = " | ".join(form(one) for one in found)
        text.append(f"| {mine[0]['title']} | {figures} | {mine[0]['parameters']:,} | {lr} | {seeds} |")
    return "\n".join([*text, ""])


def order_table(verdicts: list[dict]) -> str:
    """The verdicts as a table; many are read at once, so that one in twenty intervals misses by chance."""
    if not verdicts:
        return ""
    text = ["## What may be said", "", "| question | task | labels | first minus second | |", "|---|---|---|---|---|"]
    for v in verdicts:
        difference = None if v["difference"] is None else Estimate(**v["difference"])
        count = "all" if v["shots"] is None else v["shots"]
        question = f"{v['claim']} ({v['first']}, {v['second']})"
        text.append(f"| {question} | {v['task']} | {count} | {form(difference, sign=True)} | {v['says']} |")
    return "\n".join([*text, ""])


def sweep_of(runs: list[dict], key: str, usual: dict[str, float]) -> Sweep | None:
    """What was found of a sweep; None where nothing was varied, or no seed has all of its rows.

    usual: what the settings are in rows that do not vary them. With less sound the supervised VGG, which has learned
    from all of it, stands beside.
    """
    rows: dict[str, dict[float, str]] = {}
    for run in runs:
        config = run["config"]
        others = (config[other] in (0, value) for other, value in usual.items() if other != key)
        if config["kind"] in SWEEPS[key][1] and all(others):
            rows.setdefault(config["kind"], {})[config[key]] = run["row"]
    rows = {kind: dict(sorted(mine.items())) for kind, mine in rows.items() if len(mine) > 1}
    if key == "share" and rows and any(run["row"] == "vgg" for run in runs):
        rows["vgg"] = {1.0: "vgg"}
    names = [row for mine in rows.values() for row in mine.values()]
    if not names or not (seeds := seeds_of(runs, *names)):
        return None
    found = {(task, row): estimate(values(runs, row, task, None, seeds)) for task in TITLES for row in names}
    return Sweep(key, rows, seeds, found)


def sweep_table(sweep: Sweep, runs: list[dict]) -> str:
    """Its rows, all labels."""
    title = SWEEPS[sweep.key][0]
    text = [
        f"## Sweep over {title}, all labels, seeds {', '.join(map(str, sweep.seeds))}",
        "",
        f"| row | {title.removeprefix('the ')} | {' | '.join(TITLES.values())} |",
        "|---" * (2 + len(TITLES)) + "|",
    ]
    for mine in sweep.rows.values():
        for value, row in mine.items():
            name = next(run["title"] for run in runs if run["row"] == row)
            cells = [form(sweep.estimates[task, row]) for task in TITLES]
            text.append(f"| {name} | {value:g} | {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def plain_sweep(sweep: Sweep) -> dict[str, Any]:
    """As JSON holds it: by row, its estimates by task."""
    names = [row for mine in sweep.rows.values() for row in mine.values()]
    return {"seeds": sweep.seeds, "rows": {row: {task: plain(sweep.estimates[task, row]) for task in TITLES}
                                           for row in names}}  # fmt: skip


def noise_table(runs: list[dict]) -> str:
    """Sources under noise in the test sounds alone, over the seeds that all rows have where it was tried: score, share
    of the codes that are others."""
    tried = [run for run in runs if run["noise"]]
    names = list(dict.fromkeys(run["row"] for run in tried))
    if not tried or not (seeds := seeds_of(tried, *names)):
        return ""
    levels = list(tried[0]["noise"])
    columns = [f"{what} at {level} dB" for level in levels for what in ("accuracy", "codes changed")]
    titles = ["row", "accuracy, clean", *columns]
    text = [
        f"## Noise in the test sounds of (a), all labels, seeds {', '.join(map(str, seeds))}",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for row in names:
        mine = [run for run in tried if run["row"] == row and run["seed"] in seeds]
        cells = [_mean([run["tasks"]["sources"][-1]["test"] for run in mine])]
        cells += [_mean([run["noise"][level][key] for run in mine]) for level in levels for key in ("test", "changed")]
        text.append(f"| {mine[0]['title']} | {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def picture(
    path: Path, tables: dict[str, dict], runs: list[dict], shots: list[int | None], sweeps: list[Sweep]
) -> None:
    """A panel for each task: the score over the number of labels, a line for each row with its intervals; below,
    one for each sweep: the scores of all tasks over what it varies."""
    fig, grid = plots.figure(6 * len(tables), 10 if sweeps else 5, 1 + bool(sweeps), len(tables))
    for column, (task, table) in enumerate(tables.items()):
        axis = plots.add(fig, grid[0, column], TITLES[task])
        for place, (row, found) in enumerate(table.items()):
            title = next(run["title"] for run in runs if run["row"] == row)
            at = [i + 0.03 * (place - len(table) / 2) for i in range(len(found))]
            _line(axis, at, found, label=title, color=f"C{place % 10}")
        axis.set_xticks(range(len(shots)), ["all" if s is None else str(s) for s in shots])
        axis.set(xlabel="labels a class", ylim=(0, None))
        if column == 0:
            axis.legend(fontsize=8, frameon=False, loc="upper left")
    for column, sweep in enumerate(sweeps):
        title = SWEEPS[sweep.key][0].removeprefix("the ")
        axis = plots.add(fig, grid[1, column], f"all labels, seeds {', '.join(map(str, sweep.seeds))}")
        for place, mine in enumerate(sweep.rows.values()):
            for color, task in enumerate(TITLES):
                name = next(run["title"] for run in runs if run["row"] == mine[max(mine)]).partition(",")[0]
                _line(axis, [value * (1 + 0.01 * place) for value in mine],
                      [sweep.estimates[task, row] for row in mine.values()], label=f"{TITLES[task][:3]} {name}",
                      color=f"C{color}", linestyle=("-", "--", ":")[place], marker=("o", "s", "^")[place])  # fmt: skip
        axis.set_xscale("log", base=2)
        values = sorted({value for mine in sweep.rows.values() for value in mine})
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.set(xlabel=title, ylim=(0, 1.2), yticks=[i / 5 for i in range(6)])
        axis.legend(fontsize=8, frameon=False, loc="upper left", ncols=len(sweep.rows))
    plots.save(fig, path)


def _line(axis: plots.Axes, at: list[float], found: list[Estimate | None], **style: Any) -> None:
    """Values with their intervals, those that are known."""
    known = [(x, e) for x, e in zip(at, found, strict=True) if e is not None]
    bars = [[e.value - e.low for _, e in known], [e.high - e.value for _, e in known]]
    axis.errorbar([x for x, _ in known], [e.value for _, e in known], bars, linewidth=1.2, elinewidth=0.8, **style)


def _mean(found: list[float | None]) -> str:
    return "-" if None in found else f"{np.mean(found):.3f}"

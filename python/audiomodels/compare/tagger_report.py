"""The tables of compare-taggers, and what they allow to be said: taggers.json, taggers.md, taggers.png.

The figure of tags is mAP over the labels with at least ten positive test clips (over all labels stands beside it), that
of pitch frame AP, on instruments that were heard in training and on others. Its interval comes from drawing source
groups again with replacement, the same draws for every row, after averaging over the seeds. A resample that repeats a
label's few positive clips flatters its average precision, by more than the interval is wide where labels are rare: the
resamples are moved so that their mean is the figure. "A is better than B" is said only where both have at least three
seeds, the interval of the paired difference excludes 0, and the last two checkpoints on dev agree.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audiomodels import plots
from audiomodels.compare.bootstrap import LEVEL, Estimate, draws
from audiomodels.compare.report import SEEDS_FOR_AN_ORDER, SMOKE, form, plain, replace_text
from audiomodels.tag_data import TagClips
from audiomodels.tagging import frame_ap, mean_average_precision, note_f1

RESAMPLES = 1000  # of the 10,000 draws: a resample costs an average precision for each label
LEAST = 10  # positive test clips of a label that counts
TESTS = {"tags": ("test",), "pitch": ("test", "unseen")}
FIGURES = {"tags": "mean_ap", "pitch": "frame_ap"}  # on dev: of the curves
# (row, the row that the talk, or the control, puts behind it, what that would say)
ORDERS = (
    ("large-haar", "large", "talk: Haar pooling helps, at no parameters"),
    ("large-pool", "large", "talk: average pooling helps"),
    ("large-both", "large-pool", "both are better than pooling alone"),
    ("large", "small", "paper: more layers are better"),
    ("small", "vgg", "paper: a small transformer beats the VGG-like net"),
    ("small", "crnn", "paper: a small transformer beats the CRNN"),
    ("large-haar", "large-haar-last", "control: at every layer, not only the last"),
    ("large-haar", "large-haar-shuffled", "control: the order of the levels matters"),
)


def resampled(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision of scores (clips,) against labels (clips,) for every row of weights (resamples, clips).

    As scikit-learn's with sample_weight, for scores without ties; NaN where no positive clip has weight.
    """
    order = np.argsort(-scores, kind="stable")
    weights, hits = weights[:, order], weights[:, order] * labels[order]
    with np.errstate(invalid="ignore"):
        precision = np.cumsum(hits, 1) / np.maximum(np.cumsum(weights, 1), 1e-12)
        return (precision * hits).sum(1) / hits.sum(1)


def group_weights(groups: Sequence[str]) -> np.ndarray:
    """(1 + RESAMPLES, clips): ones, then how often each clip's group is in each resample.

    A mixture of several groups, "a | b", belongs to each in equal parts: two mixtures of one recording vary together.
    """
    members = [group.split(" | ") for group in groups]
    names = {name: index for index, name in enumerate(sorted({name for clip in members for name in clip}))}
    drawn = draws(len(names))[:RESAMPLES]
    weights = np.stack([drawn[:, [names[name] for name in clip]].mean(1) for clip in members], axis=1)
    return np.vstack([np.ones(len(groups)), weights])


def map_values(scores: np.ndarray, clips: TagClips, least: int = LEAST) -> np.ndarray:
    """(1 + RESAMPLES,): mAP over the labels with at least `least` positives in all, of all clips and each resample."""
    labels, weights = clips.labels.numpy(), group_weights(clips.groups)
    kept = [k for k in range(labels.shape[1]) if labels[:, k].sum() >= least]
    if not kept:
        return np.full(1 + RESAMPLES, np.nan)
    return np.nanmean([resampled(scores[:, k], labels[:, k], weights) for k in kept], axis=0)


def frame_values(scores: np.ndarray, clips: TagClips) -> np.ndarray:
    """(1 + RESAMPLES,): frame AP, likewise."""
    pairs, labels = scores.ravel(), clips.labels.numpy().ravel()
    parts = np.array_split(group_weights(clips.groups), 20)  # a weight for each pair would be hundreds of MiB
    return np.concatenate([resampled(pairs, labels, np.repeat(part, scores.shape[1], axis=1)) for part in parts])


def note_values(scores: np.ndarray, clips: TagClips) -> np.ndarray:
    """(1 + RESAMPLES,): note F1 at 0.5, likewise."""
    weights, found, played = group_weights(clips.groups), scores >= 0.5, clips.labels.numpy()
    return 2 * (weights @ (found & played).sum(1)) / np.maximum(weights @ (found.sum(1) + played.sum(1)), 1e-12)


def estimate(values: np.ndarray) -> Estimate | None:
    """The first value with the interval of the others, their mean moved onto it; None where it is NaN."""
    if np.isnan(values[0]):
        return None
    resamples = values[1:] - np.nanmean(values[1:]) + values[0]
    low, high = np.nanquantile(resamples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values[0]), float(low), float(high))


def columns(task: str, split: str) -> dict[str, Any]:
    """The figures of a test split, the one that orders are told by first."""
    if task == "tags":
        return {f"mAP, labels with {LEAST}+ clips": map_values, "mAP, all labels": lambda s, c: map_values(s, c, 1)}
    told = "seen" if split == "test" else "unseen"
    return {f"frame AP, {told} instruments": frame_values, f"note F1, {told}": note_values}


def write_all(
    out: Path,
    runs: list[dict],
    tests: Mapping[str, Mapping[str, TagClips]],
    titles: dict[str, str],
    protocol: dict,
    speeds: dict[str, dict],
) -> None:
    """Write taggers.json, .md and .png.

    runs: results with their test "probabilities"; tests: task -> split -> clips; titles: of all rows, those that
    were not run too; speeds: row -> "flops" of a crop, "crops_per_second" of training.
    """
    tables, text = {}, [head(protocol)]
    for task, splits in tests.items():
        mine = [run for run in runs if run["task"] == task]
        values: dict[str, dict[str, dict[int, np.ndarray]]] = {}  # row -> column -> seed -> (1 + RESAMPLES,)
        for run in mine:
            for split, clips in splits.items():
                for name, figure in columns(task, split).items():
                    found = figure(run["probabilities"][split], clips)
                    values.setdefault(run["row"], {}).setdefault(name, {})[run["seed"]] = found
        verdicts = said(mine, values, task) if protocol["claims"] else []
        tables[task] = {
            "rows": {row: {n: plain(of_seeds(v)) for n, v in table.items()} for row, table in values.items()},
            "orders": verdicts,
        }
        text += [table_of(task, mine, values, titles, splits), order_table(verdicts)]
    text.append(speed_table(runs, speeds))
    unscored = [{key: value for key, value in run.items() if key != "probabilities"} for run in runs]
    content = {
        "command": "compare-taggers",
        "protocol": protocol,
        "estimates": tables,
        "speeds": speeds,
        "runs": unscored,
        "titles": titles,
    }
    replace_text(out / "taggers.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    replace_text(out / "taggers.md", "\n".join(text))
    picture(out / "taggers.png", runs)


def of_seeds(values: dict[int, np.ndarray]) -> Estimate | None:
    """The mean over seeds."""
    return estimate(np.mean(list(values.values()), axis=0)) if values else None


def said(runs: list[dict], values: dict[str, dict], task: str) -> list[dict]:
    """A verdict for each pair of ORDERS whose rows are there, by the first column; differences are of common seeds."""
    verdicts = []
    for first, second, claim in ORDERS:
        if first not in values or second not in values:
            continue
        one, other = (next(iter(values[name].values())) for name in (first, second))
        difference = of_seeds({seed: one[seed] - other[seed] for seed in one if seed in other})
        sides = [[run for run in runs if run["row"] == name] for name in (first, second)]
        seeds = [sorted(run["seed"] for run in side) for side in sides]
        sign = 0 if difference is None else np.sign(difference.value)
        if seeds[0] != seeds[1] or len(seeds[0]) < SEEDS_FOR_AN_ORDER:
            says = f"no order yet: seeds {seeds[0]} and {seeds[1]}; both need the same {SEEDS_FOR_AN_ORDER}"
        elif difference is None or not difference.excludes_zero:
            width = "nothing" if difference is None else f"a difference below {difference.half_width:.3f}"
            says = f"not separated; {width} could not have been seen"
        elif not all(sign * (_dev(sides[0], task, back) - _dev(sides[1], task, back)) > 0 for back in (-1, -2)):
            says = "no order yet: the last two checkpoints disagree"
        else:
            says = f"{sides[0 if sign > 0 else 1][0]['title']} is better"
        verdicts.append(
            {"first": first, "second": second, "claim": claim, "difference": plain(difference), "says": says}
        )
    return verdicts


def _dev(side: list[dict], task: str, back: int) -> float:
    """Mean over seeds of the figure on dev at one of the last checkpoints; NaN where there are fewer."""
    found = [run["curve"][back][FIGURES[task]] if len(run["curve"]) >= -back else None for run in side]
    return float("nan") if None in found else sum(found) / len(found)


def head(protocol: dict) -> str:
    """What is common to all tables."""
    name, steps, batch, precision = (protocol[key] for key in ("name", "steps", "batch", "precision"))
    return f"""# Taggers

Protocol "{name}": {steps:,} steps of {batch} one-second crops, {steps * batch / 3600:,.1f} hours of sound, {precision}.
Written by `audiokernels compare-taggers`. Test scores are means over one-second crops and over seeds, with the 95 %
interval of a paired bootstrap over source groups. Instruments are rendered from a sound font.
{"" if protocol["claims"] else SMOKE}"""


def table_of(
    task: str, runs: list[dict], values: dict[str, dict], titles: dict[str, str], tests: Mapping[str, TagClips]
) -> str:
    """The table of one task."""
    names = [name for split in tests for name in columns(task, split)]
    sizes = [f"{split} {len(clips)} clips of {len(set(clips.groups))} groups" for split, clips in tests.items()]
    cells = ["row", *names, "lr", "seeds"]
    text = [f"## {task}: {', '.join(sizes)}", "", f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
    text.append(f"| chance: how often each label is set | {' | '.join(chance(task, tests))} | | |")
    for row, table in values.items():
        mine = [run for run in runs if run["row"] == row]
        figures = " | ".join(form(of_seeds(table[name])) for name in names)
        seeds = ", ".join(str(run["seed"]) for run in mine)
        text.append(f"| {mine[0]['title']} | {figures} | {mine[0]['lr']:g} | {seeds} |")
    absent = [title for row, title in titles.items() if row not in values]
    text += [f"| {title} | {' | '.join(['not run'] * len(names))} | | |" for title in absent]
    return "\n".join([*text, ""])


def speed_table(runs: list[dict], speeds: dict[str, dict]) -> str:
    """What a row costs."""
    text = ["## Cost", "", "| row | parameters | MFLOPs of a crop, forward | crops/s, training |", "|---|---|---|---|"]
    for row, speed in speeds.items():
        one = next(run for run in runs if run["row"] == row)
        text.append(f"| {one['title']} | {one['parameters']:,} | {speed['flops'] / 1e6:,.1f} | "
                    f"{speed['crops_per_second']:,.0f} |")  # fmt: skip
    told = next(iter(speeds.values()), {}).get("clock", "")
    return "\n".join([*text, "", f"Crops a second: forward and backward, measured in turn, {told}.", ""])


def chance(task: str, tests: Mapping[str, TagClips]) -> list[str]:
    """Every column of a table where all clips get the same probabilities: how often each label is set."""
    figures = []
    for clips in tests.values():
        scores = clips.labels.double().mean(0).expand(clips.labels.shape)
        if task == "tags":
            figures += [mean_average_precision(scores, clips.labels, least=least)[0] for least in (LEAST, 1)]
        else:
            figures += [frame_ap(scores, clips.labels), note_f1(scores, clips.labels)]
    return ["-" if value != value else f"{value:.3f}" for value in figures]


def order_table(verdicts: list[dict]) -> str:
    """The verdicts as a table."""
    if not verdicts:
        return ""
    text = ["| question | first minus second | |", "|---|---|---|"]
    for v in verdicts:
        difference = None if v["difference"] is None else Estimate(**v["difference"])
        text.append(f"| {v['claim']} ({v['first']}, {v['second']}) | {form(difference, sign=True)} | {v['says']} |")
    return "\n".join([*text, ""])


def picture(path: Path, runs: list[dict]) -> None:
    """The figure on dev over training, a panel for each task, a line for each run; a row has one colour in all."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    titles = list(dict.fromkeys(run["title"] for run in runs))
    fig, grid = plots.figure(7 * len(tasks), 6, 1, len(tasks))
    for column, task in enumerate(tasks):
        axis = plots.add(fig, grid[0, column], f"{task}: {'mAP' if task == 'tags' else 'frame AP'} on dev")
        mine = [run for run in runs if run["task"] == task]
        for run in mine:
            place = titles.index(run["title"])
            label = run["title"] if run is next(r for r in mine if r["title"] == run["title"]) else None
            seen = [point["step"] * run["protocol"]["batch"] / 1000 for point in run["curve"]]
            figures = [float("nan") if p[FIGURES[task]] is None else p[FIGURES[task]] for p in run["curve"]]
            axis.plot(seen, figures, color=f"C{place}", linewidth=1.2, alpha=0.8, label=label)
        axis.set(xlabel="thousand crops seen", ylim=(0, None))
        axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.12))  # below the axis
    plots.save(fig, path)

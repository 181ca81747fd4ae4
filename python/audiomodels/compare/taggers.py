"""`audiokernels compare-taggers`: train every tagger of the comparison the same way, on tags and on pitch; score it.

A run is one row, one task, one seed. Runs are made seed by seed by train.fit, each in a folder of its own below
OUT/runs, so that a stopped command goes on where it was. A finished run is its result.json, the probabilities of the
test clips (test.npz) and its model. At the end, or where the command is stopped, the tables are written from all runs
that are there (after each run that would cost more than the run): taggers.json, .md and .png. Intervals come from a
paired bootstrap over source groups, as in compare-generators; tagger_report.py says what may be claimed.
"""

import hashlib
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from audiomodels import checkpoint
from audiomodels.audio_transformer import AudioTransformer, AudioTransformerConfig
from audiomodels.cnn import CNN, CNNConfig
from audiomodels.compare import tagger_report
from audiomodels.compare.runs import (
    RESULT,
    check_corpus,
    choose_learning_rate,
    device_name,
    environment,
    is_done,
    read,
    write,
)
from audiomodels.tag_data import TagClips, training_data
from audiomodels.tagger import Tagger, TaggerConfig
from audiomodels.tagging import Tagging, TagScores, score_clips, tag_scores
from audiomodels.train import TrainConfig, device_of, fit


@dataclass(frozen=True)
class Protocol:
    """How long rows train, and how large they are."""

    name: str
    steps: int  # of a row
    batch: int  # one-second crops a step
    sizes: dict[str, int]  # of the transformers, beside what their rows say
    skipped: tuple[str, ...] = ()  # rows too slow here: the table says "not run"
    precision: str = "fp32"
    checkpoints: int = 10  # evaluations on dev, evenly spread; 10 % of the steps choose the learning rate
    most_clips: int = 1_000_000  # of dev and test
    claims: bool = True  # whether an order may be printed at all


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("smoke", 4, 4, {"n_filter": 64, "n_embd": 16, "n_hidden": 16, "n_head": 2},
                 ("resnet18", "densenet121"), checkpoints=2, most_clips=20, claims=False),
        Protocol("compact", 2400, 16, {}, ("resnet18", "densenet121"), checkpoints=5),
        Protocol("h100", 20_000, 256, {}, precision="bf16"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One tagger of the table."""

    name: str
    title: str
    family: str  # rows of a family share the learning rate, chosen on its first row
    config: TaggerConfig

    def build(self, names: tuple[str, ...]) -> Tagger:
        """The model for these labels, freshly initialised from torch's global generator."""
        kind = CNN if isinstance(self.config, CNNConfig) else AudioTransformer
        return kind(replace(self.config, n_class=len(names), labels=names))


def rows(protocol: Protocol) -> dict[str, Row]:
    """Every row by name, in the order of the table."""
    large = AudioTransformerConfig(n_layer=6, **protocol.sizes)
    variants = {
        "small": ("transformer, 3 layers", replace(large, n_layer=3)),
        "large": ("transformer, 6 layers", large),
        "large-pool": ("6 layers + average pooling", replace(large, pool_every=2)),
        "large-haar": ("6 layers + Haar after every layer", replace(large, haar="every")),
        "large-both": ("6 layers + both", replace(large, haar="every", pool_every=2)),
        "large-haar-last": ("control: Haar after the last layer alone", replace(large, haar="last")),
        "large-haar-shuffled": ("control: Haar, levels given to channels at random", replace(large, haar="shuffled")),
    }
    kinds = {"vgg": "VGG-like", "crnn": "CRNN", "resnet18": "ResNet-18", "densenet121": "DenseNet-121"}
    table = [Row(kind, title, "cnn", CNNConfig(kind=kind)) for kind, title in kinds.items()]
    table += [Row(name, title, "transformer", config) for name, (title, config) in variants.items()]
    return {row.name: row for row in table}


@dataclass
class CompareTaggersConfig:
    """What to compare, and how long. The same command again goes on where it was stopped."""

    data: Path  # corpus folder, as build-corpus writes
    out: Path = Path("runs/compare-taggers")  # runs and tables go here
    protocol: Literal["smoke", "compact", "h100"] = "compact"  # a test of plumbing; two CPU cores; one GPU
    tasks: tuple[Literal["tags", "pitch"], ...] = ("tags", "pitch")  # sound events; notes of chords
    seeds: tuple[int, ...] = (0, 1, 2)  # each row is trained once with each
    rows: tuple[str, ...] = ()  # names of rows; default: all that the protocol does not leave out
    steps: int | None = None  # of each row, instead of the protocol's
    budget_hours: float | None = None  # begin no run after this time
    device: str = "auto"  # a GPU where there is one
    report_only: bool = False  # write the tables from the runs that are there
    progress: bool = True

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.tasks or not self.seeds:
            raise ValueError("tasks and seeds must name at least one each")
        if unknown := set(self.rows) - set(rows(PROTOCOLS[self.protocol])):
            known = ", ".join(rows(PROTOCOLS[self.protocol]))
            raise ValueError(f"rows must be among {known}; got {', '.join(sorted(unknown))}")


class TaggerComparison:
    """The runs of one command."""

    def __init__(self, config: CompareTaggersConfig) -> None:
        self.config, protocol = config, PROTOCOLS[config.protocol]
        steps = protocol.steps if config.steps is None else config.steps
        self.protocol = replace(protocol, steps=max(1, round(steps / protocol.checkpoints)) * protocol.checkpoints)
        self.device = device_of(config.device)
        self.began, self.held = time.monotonic(), {}

    def run(self) -> None:
        """Make every run that is missing; write the tables."""
        check_corpus(self.config.data)
        with checkpoint.lock(self.config.out):
            try:
                for seed in () if self.config.report_only else self.config.seeds:
                    for task in self.config.tasks:
                        for row in self.rows().values():
                            if self.late():
                                print("the time is up; the same command goes on from here")
                                return
                            self.one(row, task, seed)
            finally:
                self.report()

    def late(self) -> bool:
        hours = self.config.budget_hours
        return hours is not None and time.monotonic() - self.began > 3600 * hours

    def rows(self) -> dict[str, Row]:
        """The rows asked for."""
        table = rows(self.protocol)
        chosen = self.config.rows or [name for name in table if name not in self.protocol.skipped]
        return {name: table[name] for name in table if name in chosen}

    def load(self, task: str, split: str) -> TagClips:
        """A split, read once; at most protocol.most_clips of it."""
        if (task, split) not in self.held:
            clips = TagClips.load(self.config.data, split=split, part=task)
            self.held[task, split] = clips.only(range(min(len(clips), self.protocol.most_clips)))
        return self.held[task, split]

    def folder(self, task: str) -> Path:
        return self.config.out / "runs" / f"{self.protocol.name}-{task}"

    def one(self, row: Row, task: str, seed: int) -> None:
        """Train and score one row, unless that was done before."""
        out = self.folder(task) / row.name / f"seed{seed}"
        asked = {"config": _plain(row.config), "steps": self.protocol.steps}
        if is_done(out, asked):
            return
        lr = self.learning_rate(row.family, task)
        print(f"{task}: {row.title}, seed {seed}, lr {lr:g}", flush=True)
        model, curve, seconds, digest = self.train(row, task, out / "training", seed, lr, self.protocol.steps)
        tests = {split: self.load(task, split) for split in tagger_report.TESTS[task]}
        probabilities = {split: score_clips(model, clips) for split, clips in tests.items()}
        out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out / "test.npz", **{split: p.numpy() for split, p in probabilities.items()})
        model.save_pretrained(out / "model")
        write(out / RESULT, {
            "row": row.name, "title": row.title, "family": row.family, "task": task, "seed": seed, **asked, "lr": lr,
            "crops_seen": self.protocol.steps * self.protocol.batch, "curve": curve, "training_seconds": seconds,
            "parameters": sum(p.numel() for p in model.parameters()),
            "test": {split: _plain(tag_scores(p, tests[split].labels)) for split, p in probabilities.items()},
            "data": {"train": digest, **{split: digest_of(clips) for split, clips in tests.items()}},
            **environment(self.device, self.protocol),
        })  # fmt: skip
        shutil.rmtree(out / "training")

    def train(
        self, row: Row, task: str, out: Path, seed: int, lr: float, steps: int
    ) -> tuple[Tagger, list[dict], float, str]:
        """(model, its curve on dev, seconds of training alone, hash of the training clips)."""
        protocol = self.protocol
        rate = row.config.sample_rate
        if (task, "training") not in self.held:
            self.held[task, "training"] = training_data(self.config.data, task, rate)
        kind, clips, dev = self.held[task, "training"]
        dev = dev.only(range(min(len(dev), protocol.most_clips)))
        config = TrainConfig(
            out=str(out), steps=steps, batch=protocol.batch, length=rate, context=0, lr=lr, seed=seed, keep=1,
            warmup=min(100, steps // 10), precision=protocol.precision, device=self.device, tensorboard=False,
            save_every=max(1, steps // protocol.checkpoints), eval_every=max(1, steps // protocol.checkpoints),
            eval_targets=len(dev), progress=self.config.progress,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = row.build(dev.names)
        crops = kind(clips, batch=protocol.batch, seed=seed)
        history = fit(model, crops, config, valid=dev, task=Tagging())
        seconds = sum(protocol.batch * rate / speed for speed in history.samples_per_second)
        points = zip(history.valid_step, history.valid, strict=True)
        curve = [{"step": step, **_plain(scores)} for step, scores in points]
        return checkpoint.unwrap(model), curve, seconds, digest_of(clips)

    def learning_rate(self, family: str, task: str) -> float:
        """The best mAP on dev for the family's first row, at a tenth of the steps."""
        row = next(row for row in rows(self.protocol).values() if row.family == family)

        def mean_ap(lr: float, out: Path) -> float:
            _, curve, _, _ = self.train(row, task, out, 0, lr, max(1, self.protocol.steps // 10))
            return curve[-1]["mean_ap"] or 0.0

        return choose_learning_rate(self.folder(task), row, self.protocol.steps, mean_ap, max, f"{task}: ")

    def speeds(self, names: list[str], labels: tuple[str, ...]) -> dict[str, dict]:
        """For each row FLOPs of a crop forward, and crops a second of training: the median of five, rows in turn.

        On one thread of a CPU in its CPU time, so that other programs do not count. Measured again, for all rows
        together, where OUT/speeds.json lacks one.
        """
        path = self.config.out / "speeds.json"
        known = read(path) if path.is_file() else {}
        if set(known) == set(names):
            return known
        alone = self.device == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        rate = next(iter(rows(self.protocol).values())).config.sample_rate
        audio, targets = torch.randn(self.protocol.batch, rate), torch.zeros(self.protocol.batch, len(labels))
        models = {name: rows(self.protocol)[name].build(labels).to(self.device) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for name in [*names] * 6:  # the first warms up
            began = clock()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.protocol.precision == "bf16"):
                loss = models[name].loss(models[name](audio.to(self.device)), targets)
            loss.backward()
            if self.device != "cpu":
                torch.cuda.synchronize()
            times[name].append(clock() - began)
        found = {}
        for name, model in models.items():
            # the counter knows the products that attention is made of, but not the CPU's fused op
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
                model.eval()(torch.zeros(1, rate, device=self.device))
            found[name] = {
                "flops": counter.get_total_flops(),
                "crops_per_second": self.protocol.batch / sorted(times[name][1:])[2],
                "clock": f"{device_name(self.device)}, " + ("one thread's CPU time" if alone else "wall time"),
            }
        write(path, found)
        return found

    def report(self) -> None:
        """Write taggers.json, .md and .png from all results below OUT/runs."""
        runs = []
        for path in sorted((self.config.out / "runs").glob(f"{self.protocol.name}-*/*/seed*/{RESULT}")):
            with np.load(path.with_name("test.npz"), allow_pickle=False) as found:
                runs.append(read(path) | {"probabilities": {split: found[split] for split in found.files}})
        if runs:
            order = list(rows(self.protocol))
            runs.sort(key=lambda run: (run["task"] != "tags", order.index(run["row"]), run["seed"]))
            tasks = dict.fromkeys(run["task"] for run in runs)
            tests = {task: {s: self.load(task, s) for s in tagger_report.TESTS[task]} for task in tasks}
            titles = {name: row.title for name, row in rows(self.protocol).items()}
            shown = [name for name in order if name in {run["row"] for run in runs}]
            speeds = self.speeds(shown, next(iter(tests[next(iter(tasks))].values())).names)
            tagger_report.write_all(self.config.out, runs, tests, titles, asdict(self.protocol), speeds)


def digest_of(clips: TagClips) -> str:
    """SHA-256 of audio and labels."""
    digest = hashlib.sha256(clips.labels.numpy().tobytes())
    for audio in clips.audio:
        digest.update(audio.numpy().tobytes())
    return digest.hexdigest()


def _plain(value: TaggerConfig | TagScores) -> dict[str, Any]:
    """A dataclass as JSON holds it; NaN, which JSON has not, is None."""
    return {k: None if v != v else list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}

"""`audiokernels compare-representations`: learn representations of sound, and read labels off them, all the same way.

A run is one row and one seed: the row's encoder is trained by train.fit on the sound of representation_data.unlabelled
(the supervised VGG on each task's labels instead), then the same probe reads the labels of three tasks off it, from 1,
5, 10 and all labels a class. Seed s holds out fold s of the sources. What several rows need, the codes, is made once.
Runs go seed by seed, each into a folder of its own below OUT/runs, so that a stopped command goes on where it was; a
finished run is its result.json with found.npz. After each the tables are written again: representations.json, .md and
.png; representation_report.py says what may be claimed.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiomodels import checkpoint, patch_codes
from audiomodels.cnn import CNN, CNNConfig
from audiomodels.code_lm import CodeLM, CodeLMConfig, code_recordings
from audiomodels.codebook import name_of
from audiomodels.compare import representation_report as report
from audiomodels.compare.representation_data import Task, noisy, tasks, unlabelled
from audiomodels.compare.runs import RESULT, check_corpus, choose_learning_rate, environment, is_done, read, write
from audiomodels.compare.taggers import digest_of
from audiomodels.data import Crops, Recordings
from audiomodels.encoders import CodeLMEncoder, Coder, Encoder, VGGEncoder
from audiomodels.patch_codes import PatchCodes, PatchCodesConfig
from audiomodels.probe import ProbeScore, Split, features_of, linear_probe, mlp
from audiomodels.simclr import SimCLR, SimCLRConfig, Views, contrast
from audiomodels.tag_data import TagClips, TagCrops
from audiomodels.tagging import Tagging
from audiomodels.train import Objective, TrainConfig, device_of, fit

RATE = 16000
NOISES = (30.0, 20.0, 10.0)  # decibels below the sound
SHARES = (0.125, 0.25, 0.5)  # of the sound, in the sweep over data


@dataclass(frozen=True)
class Protocol:
    """How long rows train, how large they are, what is probed."""

    name: str
    steps: int  # of a row
    batch: int  # one-second crops a step
    n_mel: int = 96  # of the VGG's spectrogram; it has the same parameters with any
    lm: dict[str, int] = field(default_factory=lambda: {"n_layer": 4, "n_head": 4, "n_embd": 64, "window": 64})
    coder: dict[str, int] = field(default_factory=lambda: {"hidden": 64, "patch_frames": 1})
    n_code: int = 256
    most: int = 1_000_000  # sounds of a split
    least: int = 12  # recordings of a leaf label
    shots: tuple[int | None, ...] = (1, 5, 10, None)
    draws: int = 5  # of the labels
    claims: bool = True  # whether an order may be printed at all


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("smoke", 2, 2, 40, {"n_layer": 1, "n_head": 1, "n_embd": 8, "window": 8},
                 {"hidden": 8, "patch_frames": 1}, 4, 10, 1, (1, None), 1, False),
        Protocol("compact", 400, 32, 40, most=400, draws=3),
        Protocol("h100", 20_000, 128),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One representation of the table."""

    name: str
    title: str
    kind: Literal["vgg", "code_lm", "simclr", "bag", "random_vgg", "random_lm"]
    n_code: int = 0  # of rows with codes
    share: float = 1.0  # of the sound that is learned from
    width: float = 1.0  # of the language model, in multiples

    @property
    def family(self) -> str:
        """Rows of a family share the learning rate; "" for what is not trained."""
        return self.kind if self.kind in ("vgg", "code_lm", "simclr") else ""


def rows(protocol: Protocol, sweep: str = "none") -> dict[str, Row]:
    """Every row by name, in the order of the table."""
    k = protocol.n_code
    table = [
        Row("vgg", "supervised VGG", "vgg"),
        Row("code-lm", "code LM", "code_lm", k),
        Row("simclr", "SimCLR (VGG)", "simclr"),
        Row("bag", "bag of codes + MLP", "bag", k),
        Row("random-vgg", "control: VGG, random", "random_vgg"),
        Row("random-lm", "control: code LM, random", "random_lm", k),
    ]
    if sweep == "codes":
        sizes = [n for n in (16, 64, 256, 1024) if n != k]
        table += [Row(f"code-lm-k{n}", f"code LM, {n} codes", "code_lm", n) for n in sizes]
    if sweep == "data":
        for share in SHARES:
            part = f"1/{round(1 / share)} of the sound"
            table.append(Row(f"code-lm-{share:g}", f"code LM, {part}", "code_lm", k, share))
            table.append(Row(f"simclr-{share:g}", f"SimCLR, {part}", "simclr", 0, share))
    if sweep == "size":
        for width in (0.5, 2.0):
            table.append(Row(f"code-lm-x{width:g}", f"code LM, {width:g} times as wide", "code_lm", k, 1.0, width))
    return {row.name: row for row in table}


@dataclass
class CompareRepresentationsConfig:
    """What to compare, and how long. The same command again goes on where it was stopped."""

    data: Path  # corpus folder with tags and tags_src, as build-corpus writes
    speech: Path | None = None  # corpus folder with speech, where it is another one
    out: Path = Path("runs/compare-representations")  # runs and tables go here
    protocol: Literal["smoke", "compact", "h100"] = "compact"  # a test of plumbing; two CPU cores; one GPU
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # seed s holds out fold s % 5 of the sources
    rows: tuple[str, ...] = ()  # names of rows; default: all
    sweep: Literal["none", "codes", "data", "size"] = "none"  # add rows: codes also tries noise
    steps: int | None = None  # of each row, instead of the protocol's
    budget_hours: float | None = None  # begin no run after this time
    device: str = "auto"  # a GPU where there is one
    report_only: bool = False  # write the tables from the runs that are there
    progress: bool = True

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.seeds:
            raise ValueError("seeds must name at least one")
        table = rows(PROTOCOLS[self.protocol], self.sweep)
        if unknown := set(self.rows) - set(table):
            raise ValueError(f"rows must be among {', '.join(table)}; got {', '.join(sorted(unknown))}")


class BagOfCodes:
    """An Encoder whose row is the one-hot code of a patch: its mean over time is the histogram of the codes."""

    def __init__(self, coder: Coder):
        self.coder, self.sample_rate, self.hop, self.dim = coder, coder.sample_rate, coder.hop, len(coder.codebook)

    def embed(self, audio: Tensor) -> Tensor:
        """(batch, codes, n_code)."""
        return F.one_hot(self.coder.encode(audio).long(), self.dim).float()


class RepresentationComparison:
    """The runs of one command."""

    def __init__(self, config: CompareRepresentationsConfig) -> None:
        self.config, protocol = config, PROTOCOLS[config.protocol]
        self.protocol = replace(protocol, steps=config.steps or protocol.steps)
        self.device = device_of(config.device)
        self.began, self.folds = time.monotonic(), {}

    def run(self) -> None:
        """Make every run that is missing; write the tables after each."""
        check_corpus(self.config.data)
        check_corpus(self.config.speech)
        with checkpoint.lock(self.config.out):
            try:
                for seed in () if self.config.report_only else self.config.seeds:
                    for row in self.rows().values():
                        hours = self.config.budget_hours
                        if hours is not None and time.monotonic() - self.began > 3600 * hours:
                            print("the time is up; the same command goes on from here")
                            return
                        self.one(row, seed)
            finally:
                self.report()

    def rows(self) -> dict[str, Row]:
        """The rows asked for."""
        table = rows(self.protocol, self.config.sweep)
        return {name: table[name] for name in table if name in (self.config.rows or table)}

    @property
    def folder(self) -> Path:
        return self.config.out / "runs" / self.protocol.name

    def tasks(self, seed: int) -> dict[str, Task]:
        """The tasks with the fold of a seed held out; the last ones asked for are kept."""
        if seed not in self.folds:
            speech = self.config.speech or self.config.data
            options = {"least": self.protocol.least}
            self.folds = {seed: tasks(self.config.data, speech, seed, self.protocol.most, **options)}
        return self.folds[seed]

    def one(self, row: Row, seed: int) -> None:
        """Train and probe one row, unless that was done before."""
        out = self.folder / row.name / f"seed{seed}"
        sizes = {"lm": self.protocol.lm, "coder": self.protocol.coder}
        asked = {"config": asdict(row), "steps": self.protocol.steps, **sizes}
        if is_done(out, asked):
            return
        lr = self.learning_rate(row) if row.family else None
        print(f"{row.title}, seed {seed}" + (f", lr {lr:g}" if lr else ""), flush=True)
        began, before, found, scores = time.perf_counter(), {}, {}, {}
        for name, task in self.tasks(seed).items():
            # one encoder for all tasks, but for the supervised one
            if row.kind == "vgg" or not scores:
                work = out / "training" / (name if row.kind == "vgg" else "all")
                encoder = self.encoder(row, seed, task, lr, work, self.protocol.steps, before)
                learned = time.perf_counter() - began
            probed = self.probe(encoder, row, task, self.protocol.shots)
            scores[name] = [plain(score) for score in probed]
            found |= {f"{name}:{score.shots}": report.values_of(task, score) for score in probed}
            found[f"{name}:groups"] = np.array(task.test.groups)
            before.setdefault(name, probed[-1].dev)  # what is not trained has been the same before
        noise = self.noise(encoder, row, self.tasks(seed)["sources"]) if self.config.sweep == "codes" else {}
        out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out / "found.npz", **found)
        write(out / RESULT, {
            "row": row.name, "title": row.title, "seed": seed, **asked, "lr": lr, "noise": noise,
            "clips_seen": self.protocol.steps * self.protocol.batch if row.family else 0,
            "parameters": parameters_of(encoder), "tasks": scores, "dev_before": before,
            "learning_seconds": learned, "seconds": time.perf_counter() - began,
            "data": {name: {split: digest_of(getattr(task, split)) for split in ("train", "dev", "test")}
                     for name, task in self.tasks(seed).items()},
            **environment(self.device, self.protocol),
        })  # fmt: skip
        shutil.rmtree(out / "training", ignore_errors=True)
        self.report()

    def encoder(
        self, row: Row, seed: int, task: Task, lr: float | None, out: Path, steps: int, before: dict | None = None
    ) -> Encoder:
        """The row's encoder. `before` is given the dev scores at nine tenths of the steps, by task.

        task: whose labels a supervised row learns.
        """
        sound = None if row.kind == "vgg" else unlabelled(self.tasks(seed), row.share)
        coder = self.coder(row, seed, sound) if row.n_code else None
        torch.manual_seed(seed)
        if row.kind == "bag":
            return BagOfCodes(coder)
        if row.kind in ("code_lm", "random_lm"):
            model: nn.Module = CodeLM(self.lm_config(row, coder))
            wrap: Callable[[nn.Module], Encoder] = lambda model: CodeLMEncoder(coder, model)  # noqa: E731
        elif row.kind == "simclr":
            model, wrap = SimCLR(SimCLRConfig(n_mel=self.protocol.n_mel)), lambda model: model
        else:
            names = task.train.names if row.kind == "vgg" else ("none",)
            model = CNN(CNNConfig(n_class=len(names), labels=names, n_mel=self.protocol.n_mel))
            wrap = VGGEncoder
        if row.family:
            self.train(row, model, wrap, sound, task, self.run_of(out, lr, steps, seed), coder, before)
        return wrap(checkpoint.unwrap(model).cpu().eval())

    def train(
        self, row: Row, model: nn.Module, wrap: Callable, sound: Recordings | None, task: Task, run: TrainConfig,
        coder: Coder | None, before: dict | None,
    ) -> None:  # fmt: skip
        """Train `model` as rows of its kind are trained."""
        path = Path(run.out) / "before.json"  # for a run that is stopped after nine tenths

        def on_step(step: int, bits: float) -> None:
            if before is not None and step == round(0.9 * run.steps):
                own = checkpoint.unwrap(model).eval()
                mine = [task] if row.kind == "vgg" else list(next(iter(self.folds.values())).values())
                dev = [self.probe(wrap(own), row, replace(other, test=other.dev), (None,))[0].dev for other in mine]
                write(path, {other.name: score for other, score in zip(mine, dev, strict=True)})
                model.train()

        if row.kind == "vgg":
            fit(model, TagCrops(task.train, batch=run.batch, seed=run.seed), run, task=Tagging(), on_step=on_step)
        elif row.kind == "simclr":
            crops = Crops(sound, batch=run.batch, length=RATE, context=0, seed=run.seed)
            views = Views(crops.audio, model.cnn.log_mel, frames=64, seed=run.seed)
            fit(model, views, run, task=Objective(contrast), on_step=on_step)
        else:
            streams, run = code_recordings(sound, coder), replace(run, length=RATE // coder.hop)
            crops = Crops(streams, batch=run.batch, length=run.length, context=0, seed=run.seed)
            fit(model, crops, run, on_step=on_step)
        if before is not None and path.is_file():
            before |= read(path)

    def coder(self, row: Row, seed: int, sound: Recordings) -> PatchCodes:
        """The codes of a row, learned once for all rows of the seed that share them; one autoencoder for any number."""
        folder = self.folder / "codes" / f"k{row.n_code}-{row.share:g}" / f"seed{seed}"
        if not (folder / "config.json").is_file():
            torch.manual_seed(seed)
            model = PatchCodes(PatchCodesConfig(n_code=row.n_code, sample_rate=RATE, **self.protocol.coder))
            if row.n_code == self.protocol.n_code:
                out = folder.parents[1] / f"autoencoder-{row.share:g}" / f"seed{seed}"
                patch_codes.learn(model, sound, self.run_of(out, 2e-3, self.protocol.steps, seed))
            else:
                learned = self.coder(replace(row, n_code=self.protocol.n_code), seed, sound)
                for part in ("encoder", "decoder"):
                    getattr(model, part).load_state_dict(getattr(learned, part).state_dict())
                model.fit_codes(sound, seed=seed)
            model.cpu().eval().save_pretrained(folder)
        return PatchCodes.from_pretrained(folder)

    def lm_config(self, row: Row, coder: Coder) -> CodeLMConfig:
        """The sizes of a row's language model, and the codes that it speaks."""
        sizes = dict(self.protocol.lm)
        sizes["n_embd"] = round(row.width * sizes["n_embd"])
        return CodeLMConfig(
            n_class=row.n_code, codebook=name_of(coder.codebook), sample_rate=RATE, hop=coder.hop, **sizes
        )

    def run_of(self, out: Path, lr: float, steps: int, seed: int) -> TrainConfig:
        """A training of one-second crops."""
        return TrainConfig(
            out=str(out), steps=steps, batch=self.protocol.batch, length=RATE, context=0, lr=lr, seed=seed, keep=1,
            warmup=min(100, steps // 10), save_every=max(1, steps // 10), device=self.device, tensorboard=False,
            progress=self.config.progress,
        )  # fmt: skip

    def probe(self, encoder: Encoder, row: Row, task: Task, shots: tuple[int | None, ...]) -> list[ProbeScore]:
        """What the probe reads of a task."""
        train, dev = (split_of(encoder, clips, task.single) for clips in (task.train, task.dev))
        test = dev if task.test is task.dev else split_of(encoder, task.test, task.single)
        return self.read(row, (train, dev, test), shots)

    def read(self, row: Row, splits: tuple[Split, Split, Split], shots: tuple[int | None, ...]) -> list[ProbeScore]:
        """The probe of a row, on features that are there."""
        classifier = mlp if row.kind == "bag" else None
        return linear_probe(*splits, shots=shots, draws=self.protocol.draws, classifier=classifier)

    def noise(self, encoder: Encoder, row: Row, task: Task) -> dict[str, Any]:
        """Under noise in the test sounds alone: the probe's score, and the share of the codes that are others."""
        train, dev = (split_of(encoder, clips, task.single) for clips in (task.train, task.dev))
        found, clean = {}, codes_of(encoder, task.test)
        for decibels in NOISES:
            test = noisy(task.test, decibels)
            changed = None if clean is None else float((codes_of(encoder, test) != clean).float().mean())
            score = self.read(row, (train, dev, split_of(encoder, test, task.single)), (None,))[0].test
            found[f"{decibels:g}"] = {"test": score, "changed": changed}
        return found

    def learning_rate(self, row: Row) -> float:
        """The best on dev of the sources for the family's first row, at a tenth of the steps."""
        first, steps = next(r for r in rows(self.protocol).values() if r.family == row.family), self.protocol.steps
        seed = self.config.seeds[0]

        def accuracy(lr: float, out: Path) -> float:
            task = self.tasks(seed)["sources"]
            encoder = self.encoder(first, seed, task, lr, out, max(1, steps // 10))
            return self.probe(encoder, first, replace(task, test=task.dev), (None,))[0].dev

        return choose_learning_rate(self.folder, first, steps, accuracy, max)

    def report(self) -> None:
        """Write representations.json, .md and .png from all results below OUT/runs."""
        runs = []
        for path in sorted(self.folder.glob(f"*/seed*/{RESULT}")):
            with np.load(path.with_name("found.npz"), allow_pickle=False) as found:
                runs.append(read(path) | {"found": {name: found[name] for name in found.files}})
        if runs:
            table = {name: row for sweep in ("none", "codes", "data", "size")
                     for name, row in rows(self.protocol, sweep).items()}  # fmt: skip
            runs.sort(key=lambda run: (list(table).index(run["row"]), run["seed"]))
            report.write_all(self.config.out, runs, asdict(self.protocol))


def split_of(encoder: Encoder, clips: TagClips, single: bool) -> Split:
    """Features and labels of some clips, as the probe takes them."""
    features = features_of(encoder, (clips[i][0] for i in range(len(clips))))
    return Split(features, clips.labels.int().argmax(1) if single else clips.labels)


def codes_of(encoder: Encoder, clips: TagClips) -> Tensor | None:
    """All codes of some clips, one after another; None where the encoder reads none."""
    coder = getattr(encoder, "coder", None)
    return None if coder is None else torch.cat([coder.encode(clips[i][0][None])[0] for i in range(len(clips))])


def parameters_of(encoder: Encoder) -> int:
    """Numbers that sound goes through until it is a row: for codes the autoencoder's way down and the codebook too."""
    if isinstance(encoder, SimCLR):
        return sum(p.numel() for p in encoder.cnn.parameters())
    model = getattr(encoder, "cnn", None) or getattr(encoder, "model", None)
    count = 0 if model is None else sum(p.numel() for p in model.parameters())
    coder = getattr(encoder, "coder", None)
    if coder is None:
        return count
    return count + coder.codebook.numel() + sum(p.numel() for p in coder.encoder.parameters())


def plain(score: ProbeScore) -> dict[str, Any]:
    """A score as JSON holds it."""
    return {"shots": score.shots, "test": score.test, "spread": score.spread, "dev": score.dev,
            "strengths": list(score.strengths)}  # fmt: skip

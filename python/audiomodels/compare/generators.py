"""`audiokernels compare-generators`: train every row of the comparison, score it, and say what may be claimed.

A run is one row, one seed, one part of the corpus, one companding. Runs are made seed by seed, each in a folder of its
own below OUT/runs, by train.fit, so that a command that was stopped goes on where it was, to the bit. A finished run is
its result.json. After each the tables are written again: generators.json, generators.md, generators.png.
"""

import json
import logging
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from audiomodels import checkpoint
from audiomodels.compare import generator_report, generator_rows
from audiomodels.compare.bootstrap import Units
from audiomodels.compare.generator_data import Data, load
from audiomodels.compare.generator_rows import PROTOCOLS, Row
from audiomodels.compare.runs import RESULT, check_corpus, choose_learning_rate, environment, is_done, read, write
from audiomodels.compare.score import measured, model_units, position_bits, total, trivial_units
from audiomodels.data import Crops
from audiomodels.train import History, Scores, TrainConfig, TrainingError, cross_entropy, device_of, fit, predict

logger = logging.getLogger(__name__)


@dataclass
class CompareConfig:
    """What to compare, and how long. The same command again goes on where it was stopped."""

    data: Path | None = None  # corpus folder, as build-corpus writes; not needed where OUT/data holds its codes
    out: Path = Path("runs/compare")  # runs and the codes of the data go here
    results: Path | None = None  # folder of generators.json, .md and .png; default: OUT
    protocol: Literal["smoke", "compact", "h100"] = "compact"  # sizes: a test of plumbing; a CPU; one H100
    parts: tuple[str, ...] = ("piano", "speech")  # of the corpus
    compandings: tuple[str, ...] = ("mulaw", "linear")  # of the 8-bit codes
    seeds: tuple[int, ...] = (0, 1, 2)  # each row is trained once with each
    rows: tuple[str, ...] = ()  # names of rows; default: all of the table
    sweep: Literal["none", "data", "size"] = "none"  # add rows on 1/8 .. 1/2 of the data, or of other widths
    targets: int | None = None  # of each row, instead of the protocol's
    calibrate: bool = False  # choose the targets so that all rows of one seed fit --budget-hours, from 5 s of each
    budget_hours: float | None = None  # stop after this time
    threads: int = 0  # of torch; 0: its default
    device: str = "auto"  # a GPU where there is one
    report_only: bool = False  # write the tables from the runs that are there
    progress: bool = True

    def __post_init__(self) -> None:
        if self.targets is not None and self.targets < 1:
            raise ValueError(f"targets must be at least 1, got {self.targets}")
        if self.calibrate and self.budget_hours is None:
            raise ValueError("calibrate needs a budget of hours")
        if not self.parts or not self.compandings or not self.seeds:
            raise ValueError("parts, compandings and seeds must name at least one each")


class OutOfTime(Exception):
    """The budget is spent; what was begun is saved."""


class Comparison:
    """The runs of one command."""

    def __init__(self, config: CompareConfig) -> None:
        self.config, self.protocol = config, PROTOCOLS[config.protocol]
        hours = config.budget_hours
        self.deadline = None if hours is None else time.monotonic() + 3600 * hours
        self.loaded: tuple = (None, None)
        self.device = device_of(config.device)
        if config.targets is not None:
            self.protocol = replace(self.protocol, targets=config.targets)

    def run(self) -> None:
        """Make every run that is missing; write the tables after each."""
        check_corpus(self.config.data)
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        with checkpoint.lock(self.config.out):
            try:
                if not self.config.report_only:
                    self.runs()
            except OutOfTime:
                print("the time is up; the same command goes on from here")
            finally:
                self.report()

    def runs(self) -> None:
        """Every run that is missing, seed by seed, so that all rows are there for one seed before the next begins."""
        kinds = [(part, companding) for part in self.config.parts for companding in self.config.compandings]
        if self.config.calibrate:
            self.calibrate(kinds)
        for seed in self.config.seeds:
            for part, companding in kinds:
                self.trivial(part, companding)
                for row in self.rows(companding).values():
                    self.speed(row)
                    if self.one(row, part, companding, seed):
                        self.report()

    def rows(self, companding: str) -> dict[str, Row]:
        """The rows asked for."""
        table = generator_rows.rows(self.protocol, companding)
        known = {**table, **generator_rows.data_sweep(table), **generator_rows.size_sweep(table)}
        chosen = list(self.config.rows) or list(table)
        sweeps = {"none": {}, "data": generator_rows.data_sweep(table), "size": generator_rows.size_sweep(table)}
        chosen += [name for name in sweeps[self.config.sweep] if name not in chosen]
        for name in chosen:
            if name not in known:
                raise ValueError(f"rows must be among {', '.join(known)}; got {name!r}")
        return {name: known[name] for name in chosen}

    def load(self, part: str, companding: str) -> Data:
        """The data, of which one kind is held in memory."""
        if self.loaded[0] != (part, companding):
            config = self.config
            data = load(config.data, part, companding, self.protocol.sample_rate, config.out / "data")
            self.loaded = ((part, companding), data)
        return self.loaded[1]

    def folder(self, part: str, companding: str) -> Path:
        """Where the runs on one kind of data go."""
        return self.config.out / "runs" / f"{self.protocol.name}-{part}-{companding}"

    # --- one run ------------------------------------------------------------------------------------------------------

    def one(self, row: Row, part: str, companding: str, seed: int) -> bool:
        """Train and score one row; False if that was done before."""
        out = self.folder(part, companding) / row.name / f"seed{seed}"
        asked = {"config": described(row), "targets": self.targets}
        if is_done(out, asked):
            return False
        data, protocol = self.load(part, companding), self.protocol
        lr = self.learning_rate(row.family, part, companding)
        print(f"{part} {companding}: {row.title}, seed {seed}, lr {lr:g}", flush=True)
        model, history, curve, seconds = self.train(row, data, out / "training", seed, lr, self.steps)
        began = time.monotonic()
        test = self.test(model, data)
        positions = position_bits(
            model,
            data.test,
            protocol.position_sights,
            length=protocol.position_length,
            windows=protocol.position_windows,
        )
        record = {
            "row": row.name,
            "title": row.title,
            "family": row.family,
            "part": part,
            "companding": companding,
            "seed": seed,
            **asked,
            "steps": self.steps,
            "lr": lr,
            "context": row.context(protocol),
            "parameters": sum(p.numel() for p in model.parameters()),
            "skipped_steps": len(history.skipped),
            "training_seconds": seconds,
            "test_seconds": time.monotonic() - began,
            "curve": curve,
            "positions": positions,
            "test": test,
            "data": data.facts,
            **environment(self.device, self.protocol),
        }
        checkpoint.unwrap(model).save_pretrained(out / "model")
        write(out / RESULT, record)
        shutil.rmtree(out / "training")
        return True

    def test(self, model: nn.Module, data: Data) -> Units:
        """Sums by unit on the test split."""
        return model_units(model, data.test, sight=self.protocol.sight, max_targets=self.protocol.test_targets)

    @property
    def steps(self) -> int:
        """Steps of a row, a multiple of the number of checkpoints."""
        n = self.protocol.checkpoints
        return max(1, round(self.protocol.targets / (self.protocol.batch * self.protocol.length * n))) * n

    @property
    def targets(self) -> int:
        """Targets of a row: the steps are whole."""
        return self.steps * self.protocol.batch * self.protocol.length

    def train(
        self, row: Row, data: Data, out: Path, seed: int, lr: float, steps: int
    ) -> tuple[nn.Module, History, list[dict], float]:
        """Train a row for `steps`: model, history, its curve on dev, seconds of training (evaluation not counted)."""
        protocol, path = self.protocol, out / "curve.json"
        every = max(1, steps // protocol.checkpoints)
        config = TrainConfig(
            out=str(out),
            steps=steps,
            batch=protocol.batch,
            length=protocol.length,
            context=row.context(protocol),
            lr=lr,
            warmup=min(100, steps // 10),
            seed=seed,
            precision=protocol.precision,
            device=self.device,
            save_every=every,
            eval_every=every,
            keep=1,
            tensorboard=False,
            progress=self.config.progress,
        )
        points: dict[int, dict] = {point["step"]: point for point in read(path)} if path.is_file() else {}

        def valid(model: nn.Module, step: int) -> Scores:
            units = model_units(model, data.dev, sight=protocol.sight, max_targets=protocol.dev_targets)
            scores = total(units)
            points[step] = {
                "step": step,
                "targets": step * config.batch * config.length,
                "bits": scores.bits,
                "dev": units,
            }
            write(path, [points[s] for s in sorted(points) if s <= step])
            return scores

        torch.manual_seed(seed)
        model = self.compiled(row.build().to(self.device))
        crops = Crops(
            data.fraction(row.share), batch=config.batch, length=config.length, context=config.context, seed=seed
        )
        history = self.until_deadline(lambda on_step: fit(model, crops, config, valid=valid, on_step=on_step))
        clock, at = 0.0, {}
        for step, speed in zip(history.step, history.samples_per_second, strict=True):
            clock += config.batch * config.length / speed
            at[step] = clock
        curve = [{**points[s], "seconds": at.get(s, clock)} for s in sorted(points) if s <= steps]
        return model, history, curve, clock

    def compiled(self, model: nn.Module) -> nn.Module:
        """The model as the protocol trains it."""
        return torch.compile(model) if self.protocol.compiled and self.device != "cpu" else model

    def until_deadline(self, training: Callable[[Callable[[int, float], None]], History]) -> History:
        """Run training(on_step); once the budget is spent it is asked to stop, saves, and OutOfTime is raised."""
        self.check_time()
        asked = False

        def on_step(step: int, bits: float) -> None:
            nonlocal asked
            if not asked and self.deadline is not None and time.monotonic() > self.deadline:
                asked = True
                signal.raise_signal(signal.SIGTERM)  # fit finishes a step and saves

        try:
            return training(on_step)
        except SystemExit:
            if not asked:
                raise
            raise OutOfTime from None

    def check_time(self) -> None:
        """Raise OutOfTime once the budget is spent."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime

    # --- what surrounds the runs --------------------------------------------------------------------------------------

    def learning_rate(self, family: str, part: str, companding: str) -> float:
        """The best for the family's first row, on dev, at a tenth of the targets."""
        row = next(row for row in generator_rows.rows(self.protocol, companding).values() if row.family == family)

        def bits(lr: float, out: Path) -> float | None:
            data = self.load(part, companding)
            try:
                _, _, curve, _ = self.train(row, data, out, 0, lr, max(1, self.steps // 10))
            except TrainingError as error:
                print(f"learning rate {lr:g}: {error}")
                return None
            return curve[-1]["bits"]

        where = f"{part} {companding}: "
        return choose_learning_rate(self.folder(part, companding), row, self.targets, bits, min, where)

    def trivial(self, part: str, companding: str) -> None:
        """Score the trivial predictors, once."""
        path = self.folder(part, companding) / "trivial.json"
        if path.is_file():
            return
        data, protocol = self.load(part, companding), self.protocol
        print(f"{part} {companding}: trivial predictors", flush=True)
        units = trivial_units(data.train, data.test, sight=protocol.sight, max_targets=protocol.test_targets)
        record = {"part": part, "companding": companding, "test": units, "data": data.facts}
        write(path, record | environment(self.device, self.protocol))

    def speed(self, row: Row) -> None:
        """Time and memory of a row, alone, once; nothing else of this command runs meanwhile."""
        path = self.config.out / "runs" / f"{self.protocol.name}-speed" / f"{row.name}.json"
        if not path.is_file():
            self.check_time()
            record = {"row": row.name, "config": described(row), **self.speeds(row)}
            write(path, record | environment(self.device, self.protocol))

    def speeds(self, row: Row) -> dict[str, float]:
        """Median ms of a training step and of a generated sample (batch 1), bytes kept for a backward pass."""
        protocol = self.protocol
        torch.manual_seed(0)
        model = row.build().to(self.device)
        training, n_class = self.compiled(model), model.config.n_class
        codes = torch.randint(
            0, n_class, (protocol.batch, row.context(protocol) + protocol.length + 1), device=self.device
        )
        targets = codes[:, -protocol.length :]

        def forward() -> torch.Tensor:
            with torch.autocast(self.device, torch.bfloat16, enabled=protocol.precision == "bf16"):
                logits = predict(training, codes[:, :-1], targets, {})
            return cross_entropy(model, logits.float(), targets)

        def generating(n: int) -> float:
            return self.median_ms(lambda: model.generate(n), 3)

        kept = measured(model, forward)
        step = self.median_ms(lambda: forward().backward(), 3)
        n = 50
        while generating(n) < 50 and n < 1 << 20:
            n *= 2
        return {
            "step_ms": step,
            "kept_bytes": kept,
            "step_targets": protocol.batch * protocol.length,
            "sample_ms": (generating(3 * n) - generating(n)) / (2 * n),  # the difference leaves out packing the weights
        }

    def median_ms(self, call: Callable[[], Any], rounds: int) -> float:
        """Median time of a call, in ms."""
        times = []
        for _ in range(1 + rounds):  # the first warms up
            began = time.perf_counter()
            call()
            self.wait()
            times.append(1000 * (time.perf_counter() - began))
        return sorted(times[1:])[rounds // 2]

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def calibrate(self, kinds: list[tuple[str, str]]) -> None:
        """Set the targets so that one seed of all rows, with the choice of learning rates, takes 85 % of the budget.

        The plan is kept, so that the command that goes on aims at the same.
        """
        path = self.config.out / "runs" / f"{self.protocol.name}-plan.json"
        if not path.is_file():
            seconds = 0.0  # for one target of every run
            for _, companding in kinds:
                table = self.rows(companding)
                for row in table.values():
                    per_target = self.seconds_per_target(row)
                    first = row.name == next(r.name for r in table.values() if r.family == row.family)
                    seconds += per_target * (1.3 if first else 1.0)
            targets = int(0.85 * 3600 * self.config.budget_hours / seconds)
            write(path, {"targets": targets})
        self.protocol = replace(self.protocol, targets=read(path)["targets"])
        print(f"{self.targets:,} targets a row")

    def seconds_per_target(self, row: Row, seconds: float = 5.0) -> float:
        """Training time of a target, from `seconds` of training on random codes; compiling comes before them."""
        protocol = self.protocol
        model = self.compiled(row.build().to(self.device))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
        shape = protocol.batch, row.context(protocol) + protocol.length + 1
        codes = torch.randint(0, 256, shape, device=self.device)
        targets = codes[:, -protocol.length :]

        def step() -> float:
            with torch.autocast(self.device, torch.bfloat16, enabled=protocol.precision == "bf16"):
                logits = predict(model, codes[:, :-1], targets, {})
            cross_entropy(model, logits.float(), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter()

        step()
        self.wait()
        began, steps = time.perf_counter(), 0
        while step() - began < seconds:
            steps += 1
        self.wait()
        return (time.perf_counter() - began) / (max(1, steps) * targets.numel())

    def report(self) -> None:
        """Write generators.json, generators.md and generators.png from all results below OUT/runs."""
        found = self.config.out / "runs"
        name = self.protocol.name
        runs = [read(path) for path in sorted(found.glob(f"{name}-*/*/seed*/{RESULT}"))]
        trivial = [read(path) for path in sorted(found.glob(f"{name}-*/trivial.json"))]
        speed = {record["row"]: record for record in map(read, sorted(found.glob(f"{name}-speed/*.json")))}
        if runs or trivial:
            place = self.config.results or self.config.out
            generator_report.write_all(place, {"rows": runs, "trivial": trivial, "speed": speed}, self.protocol)


def described(row: Row) -> dict[str, Any]:
    """A row's settings as JSON holds them."""
    return json.loads(json.dumps({**asdict(row.config), "shuffled": row.shuffled, "share": row.share}))


def reproduce(
    results: Path, row: str, seed: int, part: str, companding: str, *, data: Path | None, out: Path, device: str
) -> tuple[Any, Any]:
    """Train a recorded run again: (recorded, new) sums by piece on the test. ValueError where data or code differ."""
    recorded = read(results)
    runs = [run for run in recorded["rows"] if (run["row"], run["seed"]) == (row, seed)]
    runs = [run for run in runs if (run["part"], run["companding"]) == (part, companding)]
    if not runs:
        known = sorted({f"{run['row']} {run['seed']} {run['part']} {run['companding']}" for run in recorded["rows"]})
        asked = f"{row} {seed} {part} {companding}"
        raise ValueError(f"{results}: row, seed, part and companding must be one of {known}, got {asked}")
    (run,) = runs
    options = {"protocol": recorded["protocol"]["name"], "targets": run["targets"], "device": device}
    comparison = Comparison(CompareConfig(data=data, out=out, seeds=(seed,), rows=(row,), **options))
    torch.set_num_threads(run["threads"])
    found, model = comparison.load(part, companding), comparison.rows(companding)[row]
    if found.digest != run["data"]["hash"]:
        raise ValueError(f"data must be that of the recorded run, {run['data']['hash']}; got {found.digest}")
    if described(model) != run["config"]:
        raise ValueError(f"the row's config is another one now: {described(model)}; it was {run['config']}")
    trained, *_ = comparison.train(model, found, out / "training", seed, run["lr"], run["steps"])
    return run["test"], comparison.test(trained, found)

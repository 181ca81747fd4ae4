"""One training loop and one yardstick for every model of this project.

A generator is `model(codes (batch, time)) -> logits (batch, time, n_class)`, logits[:, t] predicting codes[:, t + 1].
One whose prediction is not a single softmax (WaveRNN) takes `targets` too and says how its logits are read: `log_prob`,
`ranked`.
`fit` minimises the cross-entropy of the last `length` codes of each crop with AdamW; `evaluate` gives bits per sample,
top-1 and top-5 accuracy over the same target positions whatever the model. A model that does something else is trained
by the same loop with a task of its own: `NextCode` shows the members of one, tagging.Tagging is another.

Crops are a pure function of (seed, step), so the state of a run is weights, optimizer, RNG and the step: a run that was
killed and started again ends in the same bits. One process needs torch alone. Under `torchrun` or `accelerate launch`
accelerate places the model (DDP, FSDP2) and rank r trains on rows r::world of the same global batch; a model that is
sharded already (torch.distributed.fsdp.fully_shard) is taken as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import math
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from audiomodels import checkpoint
from audiomodels._optional import require

__all__ = [
    "History",
    "NextCode",
    "Objective",
    "Scores",
    "TrainConfig",
    "TrainingError",
    "evaluate",
    "fit",
    "target_blocks",
]

BLOCK = 4096  # targets in one window of evaluate()
BAD_STEPS = 5  # steps in a row without a finite loss, after which training stops
logger = logging.getLogger(__name__)


class TrainingError(Exception):
    """Training cannot go on; the message says why and which checkpoint is good."""


@dataclass(frozen=True)
class Scores:
    """Next-sample prediction: bits per sample (NaN: the predictor has no distribution), accuracies in [0, 1]."""

    bits: float
    top1: float
    top5: float
    n_target: int


@dataclass
class TrainConfig:
    """What `fit` needs to know. Errors: ValueError that names the field, the rule and what came."""

    out: str
    """Folder of checkpoints and logs; a run that is there is resumed."""
    steps: int = 1000
    """Of the optimizer, those of a resumed run among them."""
    batch: int = 8
    """Crops per step, over all processes."""
    length: int = 1600
    """Targets per crop: samples or codes that are predicted and scored."""
    context: int = 1024
    """Codes before the first target; they are seen and not scored."""
    lr: float = 1e-3
    """Learning rate of AdamW after the warm-up."""
    warmup: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    """cosine: to 0 at the last step; plateau: halved when `patience` evaluations in a row bring no better bits."""
    patience: int = 3
    """Evaluations, of the schedule plateau."""
    weight_decay: float = 0.0
    """On matrices; vectors (biases, norms) are not decayed."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0: no limit."""
    seed: int = 0
    """Of weights and crops."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights and optimizer stay in fp32."""
    device: str = "auto"
    """auto: a GPU where there is one."""
    save_every: int = 500
    """Steps between checkpoints; 0: at the end only."""
    keep: int = 3
    """Checkpoints kept."""
    eval_every: int = 500
    """Steps between evaluations on the validation recordings, where given; 0: at the end only."""
    eval_targets: int = 65536
    """Most targets of an evaluation, spread evenly over the validation recordings."""
    tensorboard: bool = True
    """TensorBoard logs beside log.jsonl, where it is installed."""
    progress: bool = True
    """Show a bar."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("length", 1), ("context", 0), ("warmup", 0), ("patience", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("weight_decay", "grad_clip", "save_every", "eval_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {self.seed}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.keep < 1 or self.eval_targets < 1:
            raise ValueError(f"keep and eval_targets must be at least 1, got {self.keep} and {self.eval_targets}")
        for name, allowed in (("schedule", ("cosine", "plateau", "constant")), ("precision", ("fp32", "bf16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")


@dataclass
class History:
    """What a run did, from its first step on, also where it was resumed."""

    step: list[int] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    """Training loss of each step, in bits (nats / ln 2): per sample for a generator, as its loss says for others."""
    lr: list[float] = field(default_factory=list)
    samples_per_second: list[float] = field(default_factory=list)
    """Targets trained on per second, over all processes."""
    valid_step: list[int] = field(default_factory=list)
    valid: list[Any] = field(default_factory=list)
    """Of the task's class: Scores for a generator."""
    skipped: list[int] = field(default_factory=list)
    """Steps whose loss or gradient was not finite."""

    @property
    def throughput(self) -> float:
        """Median of samples_per_second."""
        return statistics.median(self.samples_per_second) if self.samples_per_second else math.nan


# --- evaluation ---------------------------------------------------------------------------------------------------


def target_blocks(recordings: Any, max_targets: int | None = None, *, first: int = 0) -> list[tuple[int, int, int]]:
    """The scored positions: (recording, start, stop) blocks, the same for every model and predictor.

    All samples of all recordings from their sample `first` on, or, above `max_targets`, that many in whole blocks
    spread evenly over them.
    """
    blocks = [
        (i, start, min(start + BLOCK, len(recording.codes)))
        for i, recording in enumerate(recordings)
        for start in range(first, len(recording.codes), BLOCK)
    ]
    total = sum(stop - start for _, start, stop in blocks)
    if max_targets is None or total <= max_targets:
        return blocks
    count = min(len(blocks), math.ceil(max_targets / BLOCK))
    chosen = []
    for i in range(count):
        index, start, stop = blocks[(2 * i + 1) * len(blocks) // (2 * count)]
        stop = min(stop, start + max_targets)
        max_targets -= stop - start
        chosen.append((index, start, stop))
    return [block for block in chosen if block[2] > block[1]]


class Tally:
    """Sum of scores; `add` takes the log-probabilities of targets (natural log) and their ranks (0 = best)."""

    def __init__(self) -> None:
        self.nats, self.top1, self.top5, self.count = 0.0, 0, 0, 0

    def add(self, log_probability: Tensor, rank: Tensor) -> None:
        self.nats -= float(log_probability.double().sum())
        self.top1 += int((rank == 0).sum())
        self.top5 += int((rank < 5).sum())
        self.count += rank.numel()

    def scores(self) -> Scores:
        if self.count == 0:
            raise ValueError("recordings must hold at least one sample to score")
        bits = self.nats / self.count / math.log(2)
        return Scores(bits, self.top1 / self.count, self.top5 / self.count, self.count)


def ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """How many classes score (..., n_class) puts before its target (...,); of equals the lower class comes first.

    A target whose score is NaN ranks last, so that a broken model does not look perfect.
    """
    mine = scores.gather(-1, targets[..., None])
    later = torch.arange(scores.shape[-1], device=scores.device) > targets[..., None]
    return scores.shape[-1] - 1 - ((scores < mine) | ((scores == mine) & later)).sum(-1)


def evaluate(
    model: nn.Module, recordings: Any, *, context: int, batch: int = 8, max_targets: int | None = None
) -> Scores:
    """Bits per sample, top-1 and top-5 of `model` on `recordings` (data.Recordings), in the precision of its weights.

    Every target is preceded by at least `context` samples of its recording; before a recording there is n_class // 2.
    batch: windows of BLOCK targets at a time. A model whose config has n_label is given the recordings' labels.
    """
    tally = Tally()
    for log_p, rank in score_blocks(model, recordings, target_blocks(recordings, max_targets), context, batch):
        tally.add(log_p, rank)
    return tally.scores()


@torch.no_grad()
def score_blocks(
    model: nn.Module, recordings: Any, blocks: list[tuple[int, int, int]], context: int, batch: int = 8
) -> Iterator[tuple[Tensor, Tensor]]:
    """(log-probabilities, ranks) of the targets of each (recording, start, stop) block; see `evaluate`."""
    if context < 0 or batch < 1:
        raise ValueError(f"context must be at least 0 and batch at least 1, got {context} and {batch}")
    device = device_of_model(model)
    labels = recordings.labels if getattr(getattr(model, "config", None), "n_label", 0) else None
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(blocks), batch):
            part = blocks[first : first + batch]
            sizes = [stop - start for _, start, stop in part]
            rows = torch.full((len(part), context + 1 + max(sizes)), recordings.n_class // 2)
            scored = torch.zeros(len(part), max(sizes), dtype=torch.bool)
            for row, mask, (index, start, stop) in zip(rows, scored, part, strict=True):
                begin = max(0, start - context - 1)
                row[context + 1 - (start - begin) :][: stop - begin] = recordings[index].codes[begin:stop].long()
                mask[: stop - start] = True
            extra = {} if labels is None else {"label": labels[[index for index, _, _ in part]].to(device)}
            rows, scored = rows.to(device), scored.to(device)
            targets = rows[:, context + 1 :]
            logits, targets = predict(model, rows[:, :-1], targets, extra)[scored].float(), targets[scored]
            log_p = log_prob(model, logits, targets).split(sizes)
            yield from zip(log_p, ranks(*ranked(model, logits, targets)).split(sizes), strict=True)
    finally:
        model.train(was_training)


def predict(model: nn.Module, codes: Tensor, targets: Tensor, extra: dict[str, Tensor]) -> Tensor:
    """Logits (batch, n, ...) of `targets`, the codes (batch, n) that follow the last n of `codes`.

    A forward that takes `length=` need not compute the others; one that takes `targets=` needs them for its prediction.
    """
    takes, n = inspect.signature(checkpoint.unwrap(model).forward).parameters, targets.shape[1]
    if "targets" in takes:
        return model(codes, targets=targets, **extra)
    return model(codes, length=n, **extra) if "length" in takes else model(codes, **extra)[:, codes.shape[1] - n :]


def log_prob(model: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """Natural log-probabilities (...,) of targets (...,) under the logits (..., n) of `model`."""
    own = getattr(checkpoint.unwrap(model), "log_prob", None)
    if own is not None:
        return own(logits, targets)
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def cross_entropy(model: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log_prob."""
    if hasattr(checkpoint.unwrap(model), "log_prob"):
        return -log_prob(model, logits, targets).mean()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # one kernel


def ranked(model: nn.Module, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (..., n) and targets (...,) whose ranks are the top-1 and top-5 of `model`."""
    own = getattr(checkpoint.unwrap(model), "ranked", None)
    return (logits, targets) if own is None else own(logits, targets)


# --- training -----------------------------------------------------------------------------------------------------


class NextCode:
    """The task of a generator. Another task has the same members: `fit` asks it what a batch is, what to minimise, and
    how to score a model on validation data."""

    scores = Scores
    """A dataclass of floats; lower `bits` are better."""

    def batch(self, drawn: Any, config: TrainConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(inputs, targets, further inputs) of what `crops` gave: tensors whose rows are the global batch's."""
        codes, extra = drawn if isinstance(drawn, tuple) else (drawn, {})
        expected = (config.batch, config.context + config.length + 1)
        if tuple(codes.shape) != expected:
            raise ValueError(f"crops must give codes of shape {expected}, got {tuple(codes.shape)}")
        return codes[:, :-1], codes[:, -config.length :], extra

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Mean loss of some rows, in nats; called under autocast where that is asked for."""
        inputs, targets = inputs.long(), targets.long()
        return cross_entropy(model, predict(model, inputs, targets, extra).float(), targets)

    def evaluate(self, model: nn.Module, valid: Any, config: TrainConfig) -> Scores:
        """Scores of `model` on what fit was given as `valid`."""
        options = {"context": config.context, "batch": config.batch, "max_targets": config.eval_targets}
        return evaluate(model, valid, **options)


class Objective:
    """The task of a model with a loss of its own and nothing to score: crops(step) gives a tensor of `config.batch`
    rows, or a pair of them, for instance two views; `minimise(model, rows, others)` is a scalar, and others are rows
    again where there is no pair."""

    scores = Scores

    def __init__(self, minimise: Callable[[nn.Module, Tensor, Tensor], Tensor]):
        self.minimise = minimise

    def batch(self, drawn: Any, config: TrainConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(rows, others, nothing more)."""
        rows, others = drawn if isinstance(drawn, tuple) else (drawn, drawn)
        if not len(rows) == len(others) == config.batch:
            raise ValueError(f"crops must give {config.batch} rows, got {len(rows)} and {len(others)}")
        return rows, others, {}

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """What is minimised; `model` is called as a whole, as DDP asks."""
        return self.minimise(model, inputs, targets)


def fit(
    model: nn.Module,
    crops: Callable[[int], Any],
    config: TrainConfig,
    *,
    valid: Any = None,
    on_step: Callable[[int, float], None] | None = None,
    task: Any = None,
) -> History:
    """Train `model` in place until `config.steps`, resuming what is in `config.out`; returns the History of all steps.

    crops(step): codes (batch, context + length + 1), integers, or (codes, {"condition": ..., "label": ...}), tensors of
    as many rows that go to the model's forward; a pure function of the step, as data.Crops. Where crops, or the object
    whose method it is, has `data`, a text, a run that is resumed with another one is told so. valid: data.Recordings
    for `evaluate`. on_step(steps, bits per sample) runs at the end of each step. With a `task` other than NextCode,
    crops(step) and valid are what that task takes.
    The global RNGs are seeded or restored. SIGTERM and Ctrl-C finish the step, save, and exit with 143 and 130.
    A step whose loss or gradient is not finite is skipped, and weights that are not finite are restored from the last
    checkpoint; TrainingError after BAD_STEPS such steps in a row. CheckpointError if `out` cannot be written or read.
    """
    if config.schedule == "plateau" and valid is None:
        raise ValueError("schedule 'plateau' needs valid recordings")
    stop = _Stop()
    run = _Run(model, crops, config, stop, task or NextCode())
    with contextlib.ExitStack() as stack:
        if run.rank == 0:
            stack.enter_context(checkpoint.lock(config.out))
            checkpoint.clean(config.out)
        stack.enter_context(stop)
        run.start()
        log = stack.enter_context(_Log(config, run.step, run.rank, run.task.scores))
        bar = stack.enter_context(_bar(config, run.step, run.rank))
        while run.step < config.steps:
            bits, speed = run.train_step()
            log.train(run.step, bits, run.lr(run.step - 1), speed)
            if valid is not None and run.due(config.eval_every):
                log.valid(run.step, run.validate(valid))
            if run.due(config.save_every) or run.stopping:
                run.save()
            bar.set_postfix_str(f"{bits:.3f} bits, {speed:.0f} samples/s", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(run.step, bits)
            if run.stopping:
                bar.close()  # it leaves the line
                logger.warning("stopped by a signal, saved step %d in %s", run.step, config.out)
                raise SystemExit(128 + (stop.signal or signal.SIGTERM))
    return log.history


def data_of(crops: Callable[[int], Any]) -> str | None:
    """The sounds that `crops` draws from, in words: its `data`; of a method, such as Crops(...).audio, its object's."""
    return getattr(getattr(crops, "__self__", crops), "data", None)


def changed(crops: Callable[[int], Any], change: Callable[[Any], Any]) -> Callable[[int], Any]:
    """step -> change(crops(step)), with the `data` of crops."""

    def drawn(step: int) -> Any:
        return change(crops(step))

    drawn.data = data_of(crops)
    return drawn


class _Run:
    """Model, optimizer and position of one training run; every rank has one."""

    def __init__(
        self, model: nn.Module, crops: Callable[[int], Any], config: TrainConfig, stop: _Stop, task: Any
    ) -> None:
        self.crops, self.config, self.stop, self.task = crops, config, stop, task
        self.data = data_of(crops)
        self.model, self.optimizer, self.device = _place(model, config)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if checkpoint.distributed() else (0, 1)
        if config.batch % self.world:
            raise ValueError(f"batch must be a multiple of the {self.world} processes, got {config.batch}")
        self.step = 0
        self.stopping = False
        self.plateau: dict[str, Any] = {"scale": 1.0, "best": None, "waited": 0}
        self.bad = 0  # steps in a row without a finite loss

    def start(self) -> None:
        """Resume from the newest checkpoint, or seed a fresh run."""
        path = checkpoint.on_rank0(lambda: checkpoint.latest(self.config.out))
        self.model.train()
        if path is None:
            random.seed(self.config.seed + self.rank)
            np.random.seed((self.config.seed + self.rank) % 2**32)
            torch.manual_seed((self.config.seed + self.rank) % 2**64)
            return
        self.step, state = checkpoint.load(path, model=self.model, optimizer=self.optimizer, rng=True)
        try:
            before, self.plateau, self.bad = state["config"], state["plateau"], state["bad"]
            changed = {k: f"{before.get(k)} -> {v}" for k, v in _recipe(self.config).items() if before.get(k) != v}
            if state.get("data") not in (None, self.data):
                changed["data"] = f"{state['data']} -> {self.data}"
        except (KeyError, AttributeError) as error:
            raise checkpoint.CheckpointError(f"{path}: not written by fit: {error!r}") from error
        if changed and self.rank == 0:
            logger.warning("%s: resumed with other settings: %s", path, changed)

    def lr(self, step: int) -> float:
        """Learning rate of the step after `step` steps."""
        config = self.config
        if step < config.warmup:
            return config.lr * self.plateau["scale"] * (step + 1) / config.warmup
        if config.schedule == "cosine":
            done = (step - config.warmup) / max(1, config.steps - config.warmup)
            return config.lr * 0.5 * (1 + math.cos(math.pi * done))
        return config.lr * self.plateau["scale"]

    def due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def train_step(self) -> tuple[float, float]:
        """One step on the next crops: (bits per sample, NaN if the step was skipped; targets per second)."""
        began = time.perf_counter()
        inputs, targets, extra = self.batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = self.task.loss(self.model, inputs, targets, extra)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        asked = torch.tensor(float(self.stop.signal != 0), device=self.device)
        sums = torch.stack([loss.detach(), norm, asked])
        if self.world > 1:  # every rank must come to the same decisions
            dist.all_reduce(sums)
        loss_sum, norm_sum, stops = sums.tolist()
        self.stopping = stops > 0
        finite = math.isfinite(loss_sum) and math.isfinite(norm_sum)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.bad = 0 if finite else self.bad + 1
        if not finite:
            self.skipped()
        speed = self.config.batch * self.config.length / (time.perf_counter() - began)
        return loss_sum / self.world / math.log(2) if finite else math.nan, speed

    def batch(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """This rank's rows of the step's batch: inputs, targets, further inputs."""
        inputs, targets, extra = self.task.batch(self.crops(self.step), self.config)

        def mine(rows: Tensor) -> Tensor:
            return rows[self.rank :: self.world].to(self.device)

        return mine(inputs), mine(targets), {name: mine(value) for name, value in extra.items()}

    def skipped(self) -> None:
        """Report a step that was not finite; give up after BAD_STEPS of them."""
        if self.rank == 0:
            logger.warning("step %d: loss or gradient is not finite; step skipped", self.step)
        if self.bad >= BAD_STEPS:
            raise TrainingError(
                f"loss or gradient was not finite in {BAD_STEPS} steps in a row, up to step {self.step}; "
                f"{self.good()}; try an lr below {self.config.lr}, or look at the data"
            )
        self.heal()

    def heal(self) -> None:
        """Put back the last checkpoint's weights and optimizer if ours are not finite."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        broken = not all(map(_finite, [*self.model.parameters(), *self.model.buffers(), *state]))
        if self.world > 1:
            flag = torch.tensor(float(broken), device=self.device)
            dist.all_reduce(flag)
            broken = flag.item() > 0
        if not broken:
            return
        path = checkpoint.on_rank0(lambda: checkpoint.latest(self.config.out))
        if path is None:
            raise TrainingError(f"the weights are not finite at step {self.step}; {self.good()}")
        checkpoint.load(path, model=self.model, optimizer=self.optimizer)
        if self.rank == 0:
            logger.warning("step %d: the weights were not finite; those of %s are restored", self.step, path)

    def good(self) -> str:
        path = checkpoint.latest(self.config.out)
        return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"

    def validate(self, valid: Any) -> Any:
        """Score the model, and lower the learning rate of the plateau schedule where that is due."""
        model = checkpoint.unwrap(self.model)
        scores = valid(model, self.step) if callable(valid) else self.task.evaluate(model, valid, self.config)
        plateau = self.plateau
        if plateau["best"] is None or scores.bits < plateau["best"]:
            plateau.update(best=scores.bits if math.isfinite(scores.bits) else None, waited=0)
        else:
            plateau["waited"] += 1
        if self.config.schedule == "plateau" and plateau["waited"] >= self.config.patience:
            plateau.update(scale=plateau["scale"] * 0.5, waited=0)
        return scores

    def save(self) -> None:
        self.heal()
        state = {"config": _recipe(self.config), "data": self.data, "plateau": self.plateau, "bad": self.bad}
        checkpoint.save(
            self.config.out,
            step=self.step,
            model=self.model,
            optimizer=self.optimizer,
            state=state,
            keep=self.config.keep,
        )


def _place(model: nn.Module, config: TrainConfig) -> tuple[nn.Module, torch.optim.Optimizer, torch.device]:
    """Model and AdamW where they train: this process's device, or accelerate's choice under torchrun."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]

    def adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)

    if any(hasattr(p, "device_mesh") for p in parameters):  # sharded by the caller
        return model, adamw(), parameters[0].device
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        cpu = config.device == "cpu" or not torch.cuda.is_available()
        accelerator = require("accelerate", "train").Accelerator(cpu=cpu, mixed_precision="no")
        model, optimizer = accelerator.prepare(model, adamw())
        return model, optimizer.optimizer, accelerator.device
    device = torch.device(device_of(config.device))
    return model.to(device), adamw(), device


def device_of_model(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    return next((t.device for tensors in (model.parameters(), model.buffers()) for t in tensors), torch.device("cpu"))


def device_of(name: str) -> str:
    """The device that an option names; "auto" is a GPU where there is one. ValueError where torch cannot use it."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        why = str(error).partition("\n")[0]
        raise ValueError(f"device must be auto, cpu or another that torch can use here, got {name!r}: {why}") from None
    return name


def _finite(tensor: Tensor) -> bool:
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _recipe(config: TrainConfig) -> dict[str, Any]:
    """The settings that change what is learned."""
    elsewhere = {"out", "device", "save_every", "keep", "eval_targets", "tensorboard", "progress"}
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in elsewhere}


# --- around the loop ----------------------------------------------------------------------------------------------


class _Stop:
    """SIGTERM and Ctrl-C ask the loop to stop after its step; the third one interrupts at once."""

    def __init__(self) -> None:
        self.signal, self.asked, self.before = 0, 0, {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: object) -> None:
        self.signal = self.signal or number
        self.asked += 1
        if self.asked > 2:  # torchrun passes a Ctrl-C on that its processes have seen already
            raise KeyboardInterrupt


class _Log:
    """log.jsonl, TensorBoard's files and the History, without what a killed run did after its last checkpoint."""

    def __init__(self, config: TrainConfig, step: int, rank: int, scores: type) -> None:
        self.history, self.scores = History(), scores
        self.path = Path(config.out) / "log.jsonl"
        self.file = self.board = None
        if rank:
            return
        with self.errors():
            kept = [line for line in self.lines() if self.remember(line, step)]
            temp = self.path.with_name(f"{checkpoint.TEMP}{self.path.name}")
            temp.write_text("".join(kept))
            os.replace(temp, self.path)
            self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed by __exit__)
            if config.tensorboard:
                with contextlib.suppress(ImportError):
                    writer = require("torch.utils.tensorboard", "train").SummaryWriter
                    self.board = writer(str(self.path.with_name("tensorboard")), purge_step=step + 1)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise checkpoint.CheckpointError(f"{self.path}: cannot be written: {error}") from error

    def lines(self) -> list[str]:
        return self.path.read_text(errors="replace").splitlines(keepends=True) if self.path.is_file() else []

    def remember(self, line: str, step: int) -> bool:
        """Add one line of an earlier log to the History; False if it is later than `step`, or not ours."""
        try:
            record = json.loads(line)
            if record["step"] > step:
                return False
            if "valid_bits" in record:
                logged = {field.name: record[_logged(field.name)] for field in dataclasses.fields(self.scores)}
                logged = {name: math.nan if value is None else value for name, value in logged.items()}
                self.history.valid.append(self.scores(**logged))
                self.history.valid_step.append(record["step"])
            elif record["bits"] is None:
                self.history.skipped.append(record["step"])
            else:
                bits, lr, speed = record["bits"], record["lr"], record["samples_per_second"]
                for values, value in zip(self.columns(), (record["step"], bits, lr, speed), strict=True):
                    values.append(value)
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def columns(self) -> tuple[list, list, list, list]:
        return self.history.step, self.history.bits, self.history.lr, self.history.samples_per_second

    def train(self, step: int, bits: float, lr: float, samples_per_second: float) -> None:
        self.add({"step": step, "bits": bits, "lr": lr, "samples_per_second": samples_per_second})

    def valid(self, step: int, scores: Any) -> None:
        self.add({"step": step} | {_logged(name): value for name, value in dataclasses.asdict(scores).items()})

    def add(self, record: dict[str, float]) -> None:
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no NaN
        line = json.dumps(record) + "\n"
        self.remember(line, record["step"])
        with self.errors():
            if self.file is not None:
                self.file.write(line)
            if self.board is not None:
                for name, value in record.items():
                    if name != "step" and value is not None:
                        self.board.add_scalar(name, value, record["step"])


def _logged(name: str) -> str:
    """The name in the log of a field of a task's scores."""
    return name if name.startswith("n_") else f"valid_{name}"


def _bar(config: TrainConfig, step: int, rank: int) -> Any:
    tqdm = require("tqdm", "models").tqdm
    return tqdm(total=config.steps, initial=step, desc="train", unit="step", disable=not config.progress or rank > 0)

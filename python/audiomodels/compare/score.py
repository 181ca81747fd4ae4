"""How any model codes -> logits is scored: on the same targets, by piece, by position; whether it is causal."""

import math
from collections.abc import Callable, Iterable
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn

from audiomodels.compare import predictors
from audiomodels.compare.bootstrap import Units
from audiomodels.compare.generator_data import unit_of
from audiomodels.train import Scores, Tally, device_of_model, score_blocks, target_blocks

Block = tuple[int, int, int]  # recording, first target, end


def sums_by_unit(recordings: Any, blocks: list[Block], pairs: Iterable[tuple[Tensor, Tensor]]) -> Units:
    """Sums of nats, top-1 hits, top-5 hits and targets of each unit, from (log-probabilities, ranks) of each block."""
    unit, tallies = unit_of(recordings), {}
    for (index, _, _), (log_p, rank) in zip(blocks, pairs, strict=True):
        tallies.setdefault(unit(recordings[index]), Tally()).add(log_p, rank)
    return {name: [_or_none(t.nats), t.top1, t.top5, t.count] for name, t in tallies.items()}


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def model_units(model: nn.Module, recordings: Any, *, sight: int, max_targets: int) -> Units:
    """Sums by unit of `model`, each target preceded by at least `sight` real samples, of which it sees the last."""
    blocks = seen_blocks(recordings, sight, max_targets)
    return sums_by_unit(recordings, blocks, score_blocks(model, recordings, blocks, sight, even_batch(len(blocks))))


def trivial_units(train: Any, test: Any, *, sight: int, max_targets: int) -> dict[str, Units]:
    """Sums by unit of every trivial predictor, counted on train, on the targets of `model_units`."""
    blocks = seen_blocks(test, sight, max_targets)
    rows = predictors.fitted(train, test)
    return {name: sums_by_unit(test, blocks, starmap(row, blocks)) for name, row in rows.items()}


def seen_blocks(recordings: Any, sight: int, max_targets: int) -> list[Block]:
    """train.target_blocks from sample `sight` of each recording on."""
    blocks = target_blocks(recordings, max_targets, first=sight)
    if not blocks:
        raise ValueError(f"recordings must hold targets after their first {sight} samples; got none in {recordings}")
    return blocks


def total(units: Units) -> Scores:
    """The scores of all units together."""
    rows = [(math.nan if nats is None else nats, *rest) for nats, *rest in units.values()]
    nats, top1, top5, count = (sum(column) for column in zip(*rows, strict=True))
    return Scores(nats / count / math.log(2), top1 / count, top5 / count, int(count))


def position_bits(
    model: nn.Module, recordings: Any, sights: tuple[int, ...], *, length: int, windows: int
) -> list[float | None]:
    """Bits of one set of targets where the model sees `sight` samples before the first of a window's `length`.

    With sights 0, 1600, 8000 and length 1600: bits at positions 0-1.6k, 1.6-3.2k and 8-9.6k of what is seen. None where
    no recording is long enough.
    """
    starts = [
        (i, start, start + length)
        for i, recording in enumerate(recordings)
        for start in range(max(sights), len(recording.codes) - length + 1, length)
    ]
    count = min(windows, len(starts))
    blocks = [starts[(2 * i + 1) * len(starts) // (2 * count)] for i in range(count)]
    found: list[float | None] = []
    for sight in sights:
        tally = Tally()
        for log_p, rank in score_blocks(model, _From(recordings, blocks, sight), *_relative(blocks, sight)):
            tally.add(log_p, rank)
        found.append(tally.scores().bits if blocks else None)
    return found


class _From:
    """Recordings that begin `sight` samples before each block, with silence before that."""

    def __init__(self, recordings: Any, blocks: list[Block], sight: int):
        self.recordings, self.blocks, self.sight = recordings, blocks, sight
        self.n_class, self.labels = recordings.n_class, None

    def __getitem__(self, index: int) -> Any:
        recording, start, stop = self.blocks[index]
        return _Codes(self.recordings[recording].codes[start - self.sight : stop])


class _Codes:
    def __init__(self, codes: Tensor):
        self.codes = codes


def _relative(blocks: list[Block], sight: int) -> tuple[list[Block], int, int]:
    """score_blocks' blocks, context and batch for _From."""
    return (
        [(i, sight, sight + stop - start) for i, (_, start, stop) in enumerate(blocks)],
        sight,
        even_batch(len(blocks)),
    )


def even_batch(n: int, most: int = 8) -> int:
    """A batch size up to `most` that leaves no batch of one row, which a shuffled context could not serve."""
    return next((size for size in range(min(n, most), 2, -1) if n % size != 1), 2) if n > 1 else 1


@torch.no_grad()
def causal(model: nn.Module, n_class: int, *, length: int = 4096, seed: int = 0) -> bool:
    """Whether the logits at t depend on the codes up to t alone: other codes from t0 on leave those before bit-equal.

    Five places t0, random codes. Reads ahead by any number of samples are seen, unless their weight is exactly 0.
    ValueError where the model does not give logits (batch, time, n_class), or NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    device, was_training = device_of_model(model), model.training
    model.eval()
    try:
        codes = torch.randint(0, n_class, (2, length), generator=generator).to(device)
        before = model(codes)
        if not isinstance(before, Tensor) or not before.is_floating_point():
            came = before.dtype if isinstance(before, Tensor) else type(before).__name__
            raise ValueError(f"{type(model).__name__} must give a tensor of floating-point logits, got {came}")
        if before.shape != (2, length, n_class):
            shapes = f"{(2, length, n_class)} for codes {(2, length)}, got {tuple(before.shape)}"
            raise ValueError(f"{type(model).__name__} must give logits (batch, time, n_class): {shapes}")
        if before.isnan().any():
            raise ValueError(f"{type(model).__name__} must give logits that are numbers, got NaN")
        for t in (1, length // 3, length // 2, length - 2, length - 1):
            other = codes.clone()
            other[:, t:] = (
                other[:, t:] + torch.randint(1, n_class, (2, length - t), generator=generator).to(device)
            ) % n_class
            if not torch.equal(model(other)[:, :t], before[:, :t]):
                return False
    finally:
        model.train(was_training)
    return True


def measured(model: nn.Module, step: Callable[[], Any]) -> int:
    """Bytes that `step`, a forward pass, keeps for the backward pass, the weights not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()
    del result
    return sum(kept.values())

"""Which channel is averaged over how many steps: what the Haar ops share. A level l is 2^l steps, -1 all of them.

Ops take levels as `runs` of neighbouring channels, [level, count, level, count, ...]: host numbers, so that no kernel
waits for the device, and few of them, since plans put channels of one level side by side.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from audiokernels._checks import is_size, is_whole

MAX_LEVEL = 62


def haar_levels(dim: int, seqlen: int, plan: str = "dyadic") -> tuple[int, ...]:
    """The level of every channel, fast ones first.

    Args:
        dim: channels, >= 0.
        seqlen: steps, >= 0. A level whose 2^level steps would be the whole sequence or more is -1.
        plan: "dyadic": the first half of the channels at level 0, half of the rest at level 1, and so on; the last
            channel holds the mean of the whole sequence (Verma & Berger 2021, arXiv 2105.00335). A channel alone stays
            at level 0. "linear": half of the channels at level 0, the others shared evenly by the levels
            1 .. log2(seqlen) (as in WaveletGPT, 2409.12924).

    Returns:
        dim integers, each -1 or >= 0.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """
    runs = plan_runs(dim, seqlen, plan)
    return tuple(level for level, count in zip(runs[::2], runs[1::2], strict=True) for _ in range(count))


def plan_runs(dim: int, seqlen: int | None, plan: str = "dyadic") -> list[int]:
    """The same as runs; without a seqlen every level of the dyadic plan stays as it is."""
    for name, value in (("dim", dim), ("seqlen", 0 if seqlen is None else seqlen)):
        if not is_size(value):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if plan not in ("dyadic", "linear"):
        raise ValueError(f'plan must be "dyadic" or "linear", got {plan!r}')
    runs, level, left = [], 0, dim
    if plan == "linear":
        top = _log2(1 if seqlen is None else seqlen)
        left = dim // 2 if top else 0
        runs = [0, dim - left]
        for level in range(1, top + 1):
            count = level * left // top - (level - 1) * left // top
            runs += [_clipped(level, seqlen), count]
        return _merged(runs)
    while left > 1 or (left > 0 and level == 0):
        count = (left + 1) // 2
        runs += [_clipped(level, seqlen), count]
        left, level = left - count, level + 1
    return _merged([*runs, -1, 1] if left > 0 else runs)


def level_runs(levels: Sequence[int] | Tensor | None, dim: int, seqlen: int | None) -> list[int]:
    """The runs of a public op's `levels`; None is the dyadic plan. Raise TypeError or ValueError where wrong."""
    if torch.jit.is_tracing():  # it makes tensors of sizes, which no list of integers holds
        dim, seqlen = int(dim), None if seqlen is None else int(seqlen)
    if levels is None:
        whole = type(dim) is int and (seqlen is None or type(seqlen) is int)  # symbolic numbers have no hash
        return list(_planned(dim, seqlen)) if whole and not torch.compiler.is_compiling() else plan_runs(dim, seqlen)
    if isinstance(levels, Tensor):
        if levels.ndim != 1 or levels.is_floating_point() or levels.is_complex() or levels.dtype == torch.bool:
            raise TypeError(f"levels must be integers (dim,), got {levels.dtype} of shape {tuple(levels.shape)}")
        if torch.compiler.is_compiling():
            raise TypeError("levels must be a sequence of integers where torch.compile is to know them, got a tensor")
        levels = levels.tolist()
    if isinstance(levels, (str, bytes)) or not isinstance(levels, Sequence):
        raise TypeError(f"levels must be a sequence of integers, a tensor of them or None, got {type(levels).__name__}")
    if len(levels) != dim:
        raise ValueError(f"levels must have one number for each of the {dim} channels, got {len(levels)}")
    if set(map(type, levels)) - {int}:
        wrong = sorted({type(level).__name__ for level in levels if not is_whole(level)})
        if wrong:
            raise TypeError(f"levels must be integers, got {wrong[0]}")
        levels = [int(level) for level in levels]  # numpy's
    grouped = _grouped.__wrapped__ if torch.compiler.is_compiling() else _grouped
    return list(grouped(tuple(levels)))


@lru_cache
def _planned(dim: int, seqlen: int | None) -> tuple[int, ...]:
    return tuple(plan_runs(dim, seqlen))


@lru_cache
def _grouped(levels: tuple[int, ...]) -> tuple[int, ...]:
    runs = []
    for level, members in groupby(levels):
        runs += [level, len(list(members))]
    check_runs(runs, len(levels))
    return tuple(runs)


def check_runs(runs: Sequence[int], dim: int) -> None:
    """Raise ValueError if runs are no [level, count, ...] of `dim` channels."""
    if len(runs) % 2:
        raise ValueError(f"runs must be pairs of a level and a count, got {len(runs)} numbers")
    total = 0
    for level, count in zip(runs[::2], runs[1::2], strict=True):
        if not -1 <= level <= MAX_LEVEL:
            raise ValueError(f"levels must be -1 or 0..{MAX_LEVEL}, got {level}")
        if count < 0:
            raise ValueError(f"runs must have counts >= 0, got {count}")
        total = total + count
    if total != dim:
        raise ValueError(f"runs must cover the {dim} channels of x, got {total}")


def _log2(n: int) -> int:
    """floor(log2(n)), 0 below 2, by comparisons: n may be symbolic."""
    level = 0
    while n >= 1 << (level + 1):
        level += 1
    return level


def _clipped(level: int, seqlen: int | None) -> int:
    return level if seqlen is None or level == 0 or 1 << level < seqlen else -1


def _merged(runs: list[int]) -> list[int]:
    result: list[int] = []
    for level, count in zip(runs[::2], runs[1::2], strict=True):
        if result and result[-2] == level:
            result[-1] = result[-1] + count
        else:
            result += [level, count]
    return result

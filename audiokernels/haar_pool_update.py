"""One step of causal Haar pooling, for models that generate: the next row of haar_pool(x, mode="causal").

A channel of level l keeps the values of its last 2^l steps in a ring, and the sum of those of the current block of 2^l
steps. A window is the current block so far and the rest of the one before it; when a block ends, its slots are summed
up from the end, so that slot j holds the sum of the steps j and later. No value is ever subtracted, hence nothing
drifts. A step costs three additions a channel, and 2^l more every 2^l steps.

State, which the caller owns: (batch, slots) float32, float64 for float64, zeros at the start. Run after run (`runs` as
in haar_pool.py), a run of `count` channels takes rows of `count` numbers: none at level 0, two at level -1, 2^l + 1 at
level l. The first two are the sum since the block began, high and low part (level -1: since the start), the others the
ring's slots 1 .. 2^l - 1; slot 0 is never needed. At position t, p = t mod 2^l (level -1: p = t):

    rest = slot[p + 1], or 0 where p = 2^l - 1;    sum = x if p = 0 else sum + x;    slot[p] = x where p > 0
    y = (sum + rest) / w;    where p = 2^l - 1: slot[j] = slot[j] + slot[j + 1] + ... for every j

The low part takes what the additions round away (Knuth's two-sum), 0 in its place where that is NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from audiokernels._checks import (
    FLOATS,
    check_dense,
    check_device,
    check_not_expanded,
    check_whole,
    is_size,
    mark_written,
    refuse_grad,
)
from audiokernels._library import lib, triton_launcher
from audiokernels.backends import Explanation, describe
from audiokernels.haar_levels import check_runs, level_runs
from audiokernels.haar_pool import check_input, kernel_of, options

lib.define(
    "haar_pool_update(Tensor x, Tensor(a!) state, Tensor position, SymInt[] runs, *, bool count=False, "
    "SymInt seqlen=0) -> Tensor"
)


def haar_pool_state(
    batch: int,
    dim: int,
    *,
    levels: Sequence[int] | Tensor | None = None,
    seqlen: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """A fresh state for haar_pool_update: zeros (batch, slots), float32 (float64 for dtype float64).

    Args:
        batch, dim: of the inputs.
        levels, seqlen: as they will be given to haar_pool_update.
        dtype: of the inputs.
        device: of the inputs.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """
    batch = check_whole("batch", batch, 0)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    slots = state_slots(level_runs(levels, dim, seqlen))
    return torch.zeros(batch, slots, dtype=torch.promote_types(dtype, torch.float32), device=device)


def haar_pool_update(
    x: Tensor,
    state: Tensor,
    position: Tensor,
    *,
    levels: Sequence[int] | Tensor | None = None,
    norm: str = "window",
    seqlen: int | None = None,
) -> Tensor:
    """The next row of haar_pool(..., mode="causal") over all rows so far. It has no gradient.

    Args:
        x: (batch, dim), float32, bfloat16, float16 or float64: this step's row.
        state: of haar_pool_state with the same levels and seqlen; changed in place.
        position: (batch,) int32 >= 0, steps before this one; the caller adds 1.
        levels: as for haar_pool. None: the dyadic plan for seqlen steps, without seqlen for any number of them.
        norm: "window" or "count", as for haar_pool.
        seqlen: length of the whole sequence. Needed where a level is -1 and norm is "window", which divides by it.

    Returns:
        (batch, dim), dtype of x.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came; state is unchanged then.
        RuntimeError: an input requires grad while grad mode is on.
    """
    check_input(x, 2)
    _, count = options("causal", norm)
    runs = level_runs(levels, x.shape[1], seqlen)
    seqlen = 0 if seqlen is None else seqlen
    if torch.is_grad_enabled():
        refuse_grad("haar_pool_update", x=x, state=state)
    try:
        out = _op(x, state, position, runs, count=count, seqlen=seqlen)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        _check(x, state, position, runs, count=count, seqlen=seqlen)
        raise
    mark_written(state)
    return out


def haar_pool_update_ref(
    x: Tensor, state: Tensor, position: Tensor, runs: Sequence[int], *, count: bool = False, seqlen: int = 0
) -> Tensor:
    """haar_pool_update, given runs, in plain torch, for any device."""
    _check(x, state, position, runs, count=count, seqlen=seqlen)
    out, first, slot = x.clone(memory_format=torch.contiguous_format), 0, 0
    for level, n in zip(runs[::2], runs[1::2], strict=True):
        rows = _rows(level)
        if rows and n and x.shape[0]:
            ring = state[:, slot : slot + rows * n].unflatten(1, (rows, n))
            total = _step(x[:, first : first + n].to(state.dtype), ring, position.long(), level)
            steps = position[:, None].to(state.dtype) + 1
            block = seqlen if level < 0 else 1 << level
            width = block if not count else steps if level < 0 else steps.clamp(max=block)
            out[:, first : first + n] = (total / width).to(x.dtype)
        first, slot = first + n, slot + rows * n
    return out


def _step(x: Tensor, ring: Tensor, position: Tensor, level: int) -> Tensor:
    """The window's sums (batch, n); moves the ring (batch, rows, n) of one run by a step."""
    row = torch.arange(len(x), device=x.device)
    phase = position if level < 0 else position % (1 << level)
    begins = (phase == 0)[:, None]
    high, low = ring[:, 0].masked_fill(begins, 0), ring[:, 1].masked_fill(begins, 0)
    total = high + x
    part = total - high
    lost = (high - (total - part)) + (x - part)
    ring[:, 0], ring[:, 1] = total, low + lost.masked_fill(lost.isnan(), 0)
    window = total
    if level > 0:
        block = 1 << level
        last = phase == block - 1
        window = window + ring[row, torch.where(last, 0, phase + 2)].masked_fill(last[:, None], 0)
        ring[row, torch.where(phase > 0, phase + 1, 0)] = torch.where(begins, ring[:, 0], x)
        done = last.nonzero()[:, 0]
        if len(done):
            sums = ring[done, 2:].double().flip(1).cumsum(1).flip(1)
            ring[done, 2:] = sums.to(ring.dtype)
    return window + ring[:, 1]


def state_slots(runs: Sequence[int]) -> int:
    """Numbers of state for one sequence."""
    return sum(_rows(level) * n for level, n in zip(runs[::2], runs[1::2], strict=True))


def _rows(level: int) -> int:
    return 0 if level == 0 else 2 if level < 0 else (1 << level) + 1


# ---- checks and registrations


def _check(x, state, position, runs, *, count=False, seqlen=0) -> None:
    """Raise TypeError or ValueError for the first argument that breaks a rule of haar_pool_update."""
    check_input(x, 2)
    check_runs(runs, x.shape[1])
    check_input(state, 2, "state")
    check_dense("position", position, 1)
    if position.dtype != torch.int32:
        raise TypeError(f"position must be int32, got {position.dtype}")
    for name, tensor in (("state", state), ("position", position)):
        check_device(name, tensor, "x", x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state.dtype != dtype:
        raise TypeError(f"state must be {dtype} for x of {x.dtype}, got {state.dtype}")
    shapes = {
        "state": (state, (x.shape[0], state_slots(runs)), "(batch, slots) of haar_pool_state"),
        "position": (position, (x.shape[0],), "(batch,)"),
    }
    for name, (tensor, shape, rule) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {rule} = {shape}, got {tuple(tensor.shape)}")
    check_not_expanded("state", state)
    if not is_size(seqlen):
        raise TypeError(f"seqlen must be an integer or None, got {type(seqlen).__name__}")
    if seqlen < 0:
        raise ValueError(f"seqlen must be >= 0, got {seqlen}")
    if not count and seqlen == 0 and any(level < 0 and n for level, n in zip(runs[::2], runs[1::2], strict=True)):
        raise ValueError('seqlen is needed, at least 1: a level is -1, and norm "window" divides by the length')
    if type(position) is Tensor and position.device.type == "cpu" and len(position) and int(position.min()) < 0:
        raise ValueError(f"position must be >= 0, got {int(position.min())}")


def _fake(x, state, position, runs, *, count=False, seqlen=0):
    if torch.is_grad_enabled():
        refuse_grad("haar_pool_update", x=x, state=state)
    _check(x, state, position, runs, count=count, seqlen=seqlen)
    return x.new_empty(x.shape)


def _vmap(info, in_dims, x, state, position, runs, **kwargs):
    if in_dims[1] is None:
        raise ValueError("state must be mapped by vmap: each mapped call writes its own")
    args = list(zip((x, state, position), in_dims, strict=False))
    calls = [[a if d is None else a.select(d, i) for a, d in args] for i in range(info.batch_size)]
    return torch.stack([_op(*call, runs, **kwargs) for call in calls]), 0


def _describe(x, state, position, *, levels=None, norm="window", seqlen=None) -> Explanation:
    check_input(x, 2)
    runs = level_runs(levels, x.shape[1], seqlen)
    _check(x, state, position, runs, count=norm == "count", seqlen=seqlen or 0)
    slow = x.shape[0] * sum(n for level, n in zip(runs[::2], runs[1::2], strict=True) if level)
    # of the state: sum, its low part, the slot read and the slot written, each read or written once more on average
    return Explanation(
        *kernel_of("haar_pool_update", x), 9 * slow, 2 * x.numel() * x.element_size() + 8 * slow * state.element_size()
    )


lib.impl("haar_pool_update", haar_pool_update_ref, "CompositeExplicitAutograd")
triton_launcher("haar_pool_update", "haar_pool_triton", _check)
torch.library.register_fake("audiokernels::haar_pool_update", _fake, lib=lib)
torch.library.register_vmap("audiokernels::haar_pool_update", _vmap, lib=lib)
describe("haar_pool_update", _describe)
_op = torch.ops.audiokernels.haar_pool_update.default

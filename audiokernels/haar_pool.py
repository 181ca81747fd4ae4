"""Haar pooling: every channel averaged at a time scale of its own, in one pass over the sequence.

    block:   y[t] = mean of x[s] over the steps s of t's block, floor(s / b) = floor(t / b); the last one may be short
    causal:  y[t] = (x[t] + x[t - 1] + ... + x[t - b + 1]) / w,   what lies before the start counts 0,
             w = b (norm "window") or min(t + 1, b) (norm "count": a true mean from the first step on)

b = 2^level of the channel, or the whole sequence. Verma & Berger, "Audio transformers" (arXiv 2105.00335); causal as in
WaveletGPT (2409.12924). Block mode looks up to b - 1 steps ahead: only causal mode may stand in a model that generates.
Block mode is an orthogonal projection, its backward is itself; causal mode's is itself with time reversed: nothing is
saved. It costs the reading of x and the writing of y, and less than an addition an element.

The op behind it takes the levels as `runs`, [level, count, level, count, ...] (haar_levels.py): the first `count`
channels have the first level, and so on; counts sum to dim. `causal` and `count` are mode and norm. `adjoint` is the
transposed operator, dx[s] = sum over the t whose window holds s of dy[t] / w(t); block mode is its own. `count` without
`causal` means nothing. The result is contiguous. haar_pool_ writes into x; block mode leaves level 0 untouched.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from audiokernels._checks import (
    check_dense,
    check_floating,
    check_not_expanded,
    mark_written,
    refuse_grad,
)
from audiokernels._gpu import device_facts
from audiokernels._library import C, lib, register_autograd, triton_launcher
from audiokernels.backends import REFERENCE, Explanation, describe, implementation
from audiokernels.haar_levels import check_runs, level_runs

lib.define("haar_pool(Tensor x, SymInt[] runs, *, bool causal=False, bool count=False, bool adjoint=False) -> Tensor")
lib.define("haar_pool_(Tensor(a!) x, SymInt[] runs, *, bool causal=False, bool count=False) -> ()")


def haar_pool(
    x: Tensor, *, levels: Sequence[int] | Tensor | None = None, mode: str = "block", norm: str = "window"
) -> Tensor:
    """Average every channel over blocks, or over causal windows, of 2^level steps.

    Sums are float32 (float64 for float64), rounded once. What is not finite stays inside its block or windows. Within a
    block all results are the same to the bit. Differentiable any number of times.

    Args:
        x: (batch, seqlen, dim), float32, bfloat16, float16 or float64, any strides.
        levels: dim integers -1 or 0..62, on the host (a tensor on a GPU would be waited for): 2^level steps, -1 for the
            whole sequence. None: haar_levels(dim, seqlen), the dyadic plan.
        mode: "block" or "causal". Block mode looks ahead: a model that generates must use "causal".
        norm: of causal mode: "window" divides by 2^level (level -1: by seqlen), "count" by the steps that there are.

    Returns:
        (batch, seqlen, dim), dtype of x, contiguous.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """
    check_input(x, 3)
    causal, count = options(mode, norm)
    runs = level_runs(levels, x.shape[2], x.shape[1])
    return _op(x, runs, causal=causal, count=count)


def haar_pool_(
    x: Tensor, *, levels: Sequence[int] | Tensor | None = None, mode: str = "block", norm: str = "window"
) -> Tensor:
    """haar_pool in place, for inference; returns x.

    Block mode does not touch the channels of level 0, half of them in both plans: half of the memory traffic.

    Raises:
        TypeError, ValueError: as haar_pool; also where x is an expanded view. x is unchanged then.
        RuntimeError: x requires grad while grad mode is on.
    """
    check_input(x, 3)
    if torch.is_grad_enabled():
        refuse_grad("haar_pool_", "call haar_pool", x=x)
    causal, count = options(mode, norm)
    runs = level_runs(levels, x.shape[2], x.shape[1])
    _check_(x, runs)
    _inplace_op(x, runs, causal=causal, count=count)
    mark_written(x)
    return x


def haar_pool_ref(
    x: Tensor, runs: Sequence[int], *, causal: bool = False, count: bool = False, adjoint: bool = False
) -> Tensor:
    """haar_pool, given runs, in plain torch, for any device."""
    _check(x, runs)
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    for level, channels in _channels(runs):
        wide = x[:, :, channels].to(torch.promote_types(x.dtype, torch.float32))
        if level == 0:
            part = wide
        elif causal:
            part = _windows(wide, level, count, adjoint)
        else:
            part = _blocks(wide, level)
        out[:, :, channels] = part.to(x.dtype)
    return out


def haar_pool__ref(x: Tensor, runs: Sequence[int], *, causal: bool = False, count: bool = False) -> None:
    """haar_pool_, given runs, in plain torch."""
    _check_(x, runs)
    for level, channels in _channels(runs):
        if level and channels.stop > channels.start:
            part = x[:, :, channels]
            part.copy_(haar_pool_ref(part, [level, part.shape[2]], causal=causal, count=count))


def _channels(runs: Sequence[int]) -> Iterator[tuple[int, slice]]:
    first = 0
    for level, count in zip(runs[::2], runs[1::2], strict=True):
        yield level, slice(first, first + count)
        first += count


def _blocks(x: Tensor, level: int) -> Tensor:
    seqlen = x.shape[1]
    block = seqlen if level < 0 else min(1 << level, seqlen)
    whole = seqlen // block * block
    means = [x[:, :whole].unflatten(1, (whole // block, block)).mean(2).repeat_interleave(block, 1)]
    if whole < seqlen:
        means.append(x[:, whole:].mean(1, keepdim=True).expand(-1, seqlen - whole, -1))
    return torch.cat(means, 1)


def _windows(x: Tensor, level: int, count: bool, adjoint: bool) -> Tensor:
    """Causal window sums over w, or with `adjoint` those of x / w backwards in time.

    A window is the rest of one block of b steps and the start of the next: sums within blocks only. A difference of
    sums from the start of the sequence would lose a digit for every tenfold of its length.
    """
    seqlen = x.shape[1]
    block = seqlen if level < 0 else 1 << level
    if count:
        width = torch.arange(1, seqlen + 1, device=x.device).clamp(max=block).to(x.dtype)[:, None]
        return _window_sums((x / width).flip(1), block).flip(1) if adjoint else _window_sums(x, block) / width
    return (_window_sums(x.flip(1), block).flip(1) if adjoint else _window_sums(x, block)) / block


def _window_sums(x: Tensor, block: int) -> Tensor:
    seqlen = x.shape[1]
    block = min(block, seqlen)
    blocks = -(-seqlen // block)
    x = torch.nn.functional.pad(x, (0, 0, 0, blocks * block - seqlen)).unflatten(1, (blocks, block))
    sums = x.double().cumsum(2)
    rest = x.double().flip(2).cumsum(2).flip(2)[:, :-1, 1:]  # of each block but the last, from its second step on
    sums[:, 1:, :-1] += rest
    return sums.flatten(1, 2)[:, :seqlen].to(x.dtype)


# ---- checks


def options(mode: str, norm: str) -> tuple[bool, bool]:
    """(causal, count) of the public arguments."""
    if mode not in ("block", "causal"):
        raise ValueError(f'mode must be "block" or "causal", got {mode!r}')
    if norm not in ("window", "count"):
        raise ValueError(f'norm must be "window" or "count", got {norm!r}')
    return mode == "causal", norm == "count"


def check_input(x: Tensor, ndim: int, name: str = "x") -> None:
    """Raise TypeError or ValueError if x is no dense floating-point tensor of `ndim` dimensions."""
    check_dense(name, x, ndim)
    check_floating(name, x)


def _check(x, runs, *, causal=False, count=False, adjoint=False) -> None:
    check_input(x, 3)
    check_runs(runs, x.shape[2])


def _check_(x, runs, *, causal=False, count=False) -> None:
    _check(x, runs)
    check_not_expanded("x", x)


def _fake(x, runs, *, causal=False, count=False, adjoint=False):
    _check(x, runs)
    return x.new_empty(x.shape)


def _fake_(x, runs, *, causal=False, count=False):
    if torch.is_grad_enabled():
        refuse_grad("haar_pool_", "call haar_pool", x=x)
    _check_(x, runs)


# ---- gradients, vmap, explain


def _setup(ctx, inputs, options, output):
    ctx.runs, ctx.options = inputs[1], options


def _backward(ctx, grad):
    return _op(grad, ctx.runs, **ctx.options | {"adjoint": not ctx.options["adjoint"]}), None


def _jvp(ctx, tangent, _runs):
    return _op(tangent, ctx.runs, **ctx.options)


def _vmap(info, in_dims, x, runs, **kwargs):
    x = x.movedim(in_dims[0], 0)
    return _op(x.flatten(0, 1), runs, **kwargs).unflatten(0, x.shape[:2]), 0


def _vmap_(info, in_dims, x, runs, **kwargs):
    for part in x.unbind(in_dims[0]):
        _inplace_op(part, runs, **kwargs)
    return None, None


def kernel_of(op: str, x: Tensor) -> tuple[str, str]:
    """(kernel, why) of a call of a Haar op."""
    why = implementation(op, x.device.type)
    if why.startswith(REFERENCE):
        return REFERENCE, why.removeprefix(f"{REFERENCE}: ")
    if why == "Triton":
        refused = refused_by_triton(x)
        return (REFERENCE, refused) if refused else ("Triton", "compiled, not yet run on a GPU")
    if x.dtype == torch.float64:
        return "cpu_loop", "float64 runs in a plain loop"
    return f"cpu_{C.isa()}", f"the compiled CPU kernel, on up to {torch.get_num_threads()} thread(s)"


def refused_by_triton(x: Tensor) -> str:
    """Why no Triton kernel of a Haar op takes x, or ""."""
    if x.dtype == torch.float64:
        return "float64 runs on the reference"
    major = device_facts(x.device).capability[0] if x.device.type == "cuda" else 8
    return "" if major >= 8 else f"sm_{major}x is older than sm_80"  # as Triton asks for


def _describe(x, *, levels=None, mode="block", norm="window") -> Explanation:
    slow, causal = _slow(x, levels), options(mode, norm)[0]
    return Explanation(*kernel_of("haar_pool", x), slow * (3 if causal else 1), 2 * x.numel() * x.element_size())


def _describe_(x, *, levels=None, mode="block", norm="window") -> Explanation:
    slow, causal = _slow(x, levels), options(mode, norm)[0]
    return Explanation(*kernel_of("haar_pool_", x), slow * (3 if causal else 1), 2 * slow * x.element_size())


def _slow(x: Tensor, levels: Sequence[int] | Tensor | None) -> int:
    """Elements above level 0: each costs an addition, but for a product once a block; two and one in causal mode."""
    check_input(x, 3)
    channels = _channels(level_runs(levels, x.shape[2], x.shape[1]))
    return x.shape[0] * x.shape[1] * sum(part.stop - part.start for level, part in channels if level)


lib.impl("haar_pool", haar_pool_ref, "CompositeExplicitAutograd")
lib.impl("haar_pool_", haar_pool__ref, "CompositeExplicitAutograd")
triton_launcher("haar_pool", "haar_pool_triton", _check)
triton_launcher("haar_pool_", "haar_pool_triton", _check_)
torch.library.register_fake("audiokernels::haar_pool", _fake, lib=lib)
torch.library.register_fake("audiokernels::haar_pool_", _fake_, lib=lib)
register_autograd("haar_pool", _backward, _setup, _jvp)
torch.library.register_vmap("audiokernels::haar_pool", _vmap, lib=lib)
torch.library.register_vmap("audiokernels::haar_pool_", _vmap_, lib=lib)
describe("haar_pool", _describe)
describe("haar_pool_", _describe_)
_op = torch.ops.audiokernels.haar_pool.default
_inplace_op = torch.ops.audiokernels.haar_pool_.default

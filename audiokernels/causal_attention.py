"""Causal attention over long sequences: exact softmax attention, windows, grouped heads, log-sum-exp, all gradients.

    s[i, j] = scale * q[i] . k[j]   for the keys j that query i sees
    lse[i]  = log sum_j exp(s[i, j])
    out[i]  = sum_j exp(s[i, j] - lse[i]) v[j]

Query i stands at position i + seqlen_k - seqlen_q (the last query at the last key) and sees the keys up to its own
position, with `window` = w itself and the w - 1 before it. Vaswani et al., "Attention is all you need" (1706.03762); in
tiles with a running maximum, Dao et al., "FlashAttention" (2205.14135, 2307.08691). 4 * headdim operations for every
pair of a query and a key that it sees, 10 * headdim backward; memory grows with the length, not with its square.
"""

import numbers
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from audiokernels._checks import check_dense, check_device, check_floating, is_size
from audiokernels._library import C, lib, register_autograd, triton_launcher
from audiokernels.backends import REFERENCE, Explanation, describe, implementation
from audiokernels.causal_attention_plan import causal_attention_backward_plan, device_facts, plan_of

lib.define(
    "causal_attention(Tensor q, Tensor k, Tensor v, *, float? scale=None, SymInt? window=None) -> (Tensor, Tensor)"
)
lib.define(  # the kernel for small heads in CUDA C++; scale: of logits in log2 units
    "_causal_attention_sm90(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, float scale, SymInt window)"
    " -> ()"
)
lib.define(
    "causal_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
    ", *, float? scale=None, SymInt? window=None) -> (Tensor, Tensor, Tensor)"
)


@overload
def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    scale: float | None = None, window: int | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    scale: float | None = None, window: int | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    scale: float | None = None, window: int | None = None, return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention of every query over the keys that it sees.

    Sums are float32 (float64 for float64). A key or value that is not finite reaches only the queries that see it.
    Differentiable any number of times, deterministically; backward of backward is slow.

    Args:
        q: (batch, nheads, seqlen_q, headdim), headdim 8..256, float32, bfloat16, float16 or float64, any strides.
        k: (batch, nheads_kv, seqlen_k, headdim), dtype of q; nheads is a multiple of nheads_kv: query head h reads
            head h // (nheads // nheads_kv). seqlen_q <= seqlen_k, aligned at the end.
        v: shape and dtype of k.
        scale: of the logits, headdim ** -0.5 by default. A number: has no gradient.
        window: >= 1: a query sees itself and the window - 1 keys before it. None: all before it.
        return_lse: also return the logarithm of the softmax's denominator.

    Returns:
        (batch, nheads, seqlen_q, headdim), dtype of q, in the memory order (batch, seqlen_q, nheads, headdim) where q
        has it, else contiguous. With return_lse also lse, (batch, nheads, seqlen_q), float32 (float64 for float64),
        natural logarithm; it has gradients, so that results over parts of the keys can be merged.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise TypeError("scale must be a number, got a tensor that requires grad: multiply q by it and pass scale=1.0")
    try:
        out, lse = _op(q, k, v, scale=scale, window=window)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        check_attention(q, k, v, scale=scale, window=window)
        raise
    return (out, lse) if return_lse else out


def causal_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) in plain torch, for any device, one block of queries at a time."""
    check_attention(q, k, v, scale=scale, window=window)
    return attend(q, k, v, scale, window)


def causal_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of causal_attention with respect to q, k and v, given those of its results.

        dS = P * (grad_out V^T - rowsum(grad_out * out) + grad_lse),    dq = scale dS k,    dk = scale dS^T q
        dv = P^T grad_out

    Args:
        grad_out: shape and dtype of q.
        grad_lse: shape and dtype of lse, or None for zeros.
        q, k, v, scale, window: as they were given to causal_attention.
        out, lse: what it returned. Differentiated again, they count as functions of q, k and v: they get no gradient.

    Returns:
        (dq, dk, dv), shapes and dtypes of q, k and v, memory order as causal_attention's result.
    """
    tensors = (grad_out, grad_lse, q, k, v, out, lse)
    try:
        return _backward_op(*tensors, scale=scale, window=window)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        check_backward(*tensors, scale=scale, window=window)
        raise


def _in_full_precision(function: Callable) -> Callable:
    """Without autocast, which would narrow the sums that plain torch does."""

    @wraps(function)
    def call(*args, **kwargs):
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call


@_in_full_precision
def causal_attention_backward_ref(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch, for any device, one block of queries at a time."""
    check_backward(grad_out, grad_lse, q, k, v, out, lse, scale=scale, window=window)
    dq, dk, dv = output_like(q), torch.zeros_like(_wide(k)), torch.zeros_like(_wide(v))
    grouped, keys, values, grads = _grouped(q, k), _wide(k), _wide(v), _grouped(grad_out, k)
    shift = (_grouped(out, k) * grads).sum(-1)  # sum_j P dP
    if grad_lse is not None:
        shift = shift - grad_lse.reshape(shift.shape)
    row_lse, scale = lse.reshape(shift.shape), _scale(q, scale)
    for block in _blocks(q, k, window):
        rows, cols = block.queries, block.keys
        logits = _logits(grouped, keys, block, scale)
        p = (logits - row_lse[..., rows, None]).exp().where(block.visible, 0)
        dp = torch.einsum("bhgid,bhjd->bhgij", grads[..., rows, :], values[:, :, cols])
        ds = (p * (dp - shift[..., rows, None]) * scale).where(block.visible, 0)
        dq[:, :, rows] = _sum_over_keys(ds, keys[:, :, cols], block).flatten(1, 2).to(q.dtype)
        dk[:, :, cols] += _sum_over_queries(ds, grouped[..., rows, :], block)
        dv[:, :, cols] += _sum_over_queries(p, grads[..., rows, :], block)
    return dq, output_like(k).copy_(dk), output_like(v).copy_(dv)


# ---- the reference's parts: (batch, nheads_kv, group, ...) tensors of float32 or float64, a block of queries each


@_in_full_precision
def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, exists: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments. `exists` (batch, seqlen_k): which keys there are; v must be finite elsewhere."""
    out, lse = output_like(q), lse_like(q)
    grouped, keys, values, scale = _grouped(q, k), _wide(k), _wide(v), _scale(q, scale)
    for block in _blocks(q, k, window):
        logits = _logits(grouped, keys, block, scale)
        if exists is not None:
            logits = logits.where(exists[:, None, None, None, block.keys], -torch.inf)
        # softmax, not exp(logits - lse): where the logits are large, lse is rounded coarsely
        sums = _sum_over_keys(logits.softmax(-1), values[:, :, block.keys], block)
        out[:, :, block.queries] = sums.flatten(1, 2).to(q.dtype)
        lse[:, :, block.queries] = logits.logsumexp(-1).flatten(1, 2)
    return out, lse


class _Block(NamedTuple):
    """Some queries and the keys that any of them sees; those from full.start to full.stop, all of them see."""

    queries: slice
    keys: slice
    full: slice
    visible: Tensor


def _blocks(q: Tensor, k: Tensor, window: int | None) -> Iterator[_Block]:
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    window, offset = min(window or seqlen_k, seqlen_k), seqlen_k - seqlen_q
    step = max(16, min(128, (1 << 24) // max(1, q.shape[0] * q.shape[1] * seqlen_k)))
    for start in range(0, seqlen_q, step):
        stop = min(start + step, seqlen_q)
        first, last = max(0, start + offset - window + 1), stop + offset
        position = torch.arange(start + offset, stop + offset, device=q.device)[:, None]
        key = torch.arange(first, last, device=q.device)
        full_stop = start + offset + 1 - first
        full_start = min(max(0, stop + offset - window - first), full_stop)
        visible = (key <= position) & (key > position - window)
        yield _Block(slice(start, stop), slice(first, last), slice(full_start, full_stop), visible)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """(batch, nheads_kv, group, seqlen_q, headdim): the query heads of one key head side by side."""
    batch, nheads, *rest = x.shape
    group = nheads // k.shape[1] if k.shape[1] else 1
    return _wide(x).reshape(batch, k.shape[1], group, *rest)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else scale


def _logits(grouped: Tensor, keys: Tensor, block: _Block, scale: float) -> Tensor:
    products = torch.einsum("bhgid,bhjd->bhgij", grouped[..., block.queries, :], keys[:, :, block.keys])
    return (products * scale).where(block.visible, -torch.inf)


def _sum_over_keys(weights: Tensor, values: Tensor, block: _Block) -> Tensor:
    """sum_j weights[i, j] values[j]; outside of `visible` the weights are 0, and the values need not be finite."""
    full = block.full
    out = torch.einsum("bhgij,bhjd->bhgid", weights[..., full], values[:, :, full])
    for edge in (slice(0, full.start), slice(full.stop, None)):
        clean, above, below = _split(values[:, :, edge])
        out += torch.einsum("bhgij,bhjd->bhgid", weights[..., edge], clean)
        seen = block.visible[:, edge].to(values.dtype)
        for flags, value in ((above, torch.inf), (below, -torch.inf)):
            out += torch.where(seen @ flags > 0, value, 0.0)[:, :, None]
    return out


def _sum_over_queries(weights: Tensor, values: Tensor, block: _Block) -> Tensor:
    """sum_i weights[i, j] values[i], likewise."""
    parts = []
    for edge in (slice(0, block.full.start), block.full, slice(block.full.stop, None)):
        clean, above, below = _split(values) if edge is not block.full else (values, None, None)
        part = torch.einsum("bhgij,bhgid->bhjd", weights[..., edge], clean)
        if above is not None:
            seeing = block.visible[:, edge].T.to(values.dtype)
            for flags, value in ((above, torch.inf), (below, -torch.inf)):
                part += torch.where((seeing @ flags).sum(2) > 0, value, 0.0)
        parts.append(part)
    return torch.cat(parts, 2)


def _split(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The finite values, 0 elsewhere; where +inf stands; where -inf stands. A NaN is both."""
    nan = values.isnan()
    above, below = nan | values.isposinf(), nan | values.isneginf()
    return values.where(values.isfinite(), 0), above.to(values.dtype), below.to(values.dtype)


# ---- checks and shapes


def check_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None) -> None:
    """Raise TypeError or ValueError for the first argument that breaks a rule of causal_attention."""
    check_tensors({"q": (q, 4), "k": (k, 4), "v": (v, 4)})
    (batch, nheads, seqlen_q, headdim), (_, nheads_kv, seqlen_k, _) = q.shape, k.shape
    if not 8 <= headdim <= 256:
        raise ValueError(f"q must have a headdim of 8..256, got shape {tuple(q.shape)}")
    if k.shape[0] != batch or k.shape[3] != headdim:
        rule = f"(batch, nheads_kv, seqlen_k, headdim) with batch {batch} and headdim {headdim} as q has them"
        raise ValueError(f"k must have shape {rule}, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    check_heads(nheads, nheads_kv, "k")
    if seqlen_q > seqlen_k:
        raise ValueError(f"k must be at least as long as q (seqlen_q <= seqlen_k), got {seqlen_q} and {seqlen_k}")
    check_options(scale, window)


def check_tensors(tensors: dict[str, tuple[Tensor, int]]) -> None:
    """{name: (tensor, number of dimensions)}: dense, of one device and one floating dtype, those of the first."""
    first, like = next((name, tensor) for name, (tensor, _) in tensors.items())
    for name, (tensor, ndim) in tensors.items():
        check_dense(name, tensor, ndim)
        check_device(name, tensor, first, like)
        check_floating(first, like)
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name} must be {like.dtype}, the dtype of {first}, got {tensor.dtype}")


def check_heads(nheads: int, nheads_kv: int, name: str) -> None:
    """Grouped heads: nheads_kv divides nheads."""
    if nheads % nheads_kv if nheads_kv else nheads:
        raise ValueError(f"q must have a multiple of the heads of {name}, got {nheads} heads and {nheads_kv}")


def check_options(scale: float | None, window: int | None) -> None:
    """What scale and window may be."""
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
        if not -float("inf") < scale < float("inf"):
            raise ValueError(f"scale must be finite, got {scale}")
    if window is not None:
        if not is_size(window):
            raise TypeError(f"window must be an integer or None, got {type(window).__name__}")
        if not 1 <= window < 1 << 63:
            raise ValueError(f"window must be >= 1 (and below 2^63), got {window}")


def check_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    **options: float | int | None,
) -> None:
    """Raise TypeError or ValueError for the first argument that breaks a rule of causal_attention_backward."""
    check_attention(q, k, v, **options)
    check_tensors({"q": (q, 4), "grad_out": (grad_out, 4), "out": (out, 4)})
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {tuple(q.shape)}, got {tuple(tensor.shape)}")
    for name, tensor in (("lse", lse), ("grad_lse", grad_lse)):
        if tensor is None and name == "grad_lse":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.shape != q.shape[:3]:
            raise ValueError(f"{name} must have shape {tuple(q.shape[:3])}, got {tuple(tensor.shape)}")
        dtype = torch.promote_types(q.dtype, torch.float32)
        if tensor.dtype != dtype or tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense {dtype} tensor, got {tensor.dtype} of layout {tensor.layout}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}), got {tensor.device}")


def output_like(x: Tensor) -> Tensor:
    """Uninitialised, like x: memory in the order (batch, seqlen, nheads, headdim) where x lies so, else contiguous."""
    batch, nheads, seqlen, headdim = x.shape
    if x.transpose(1, 2).is_contiguous() and not x.is_contiguous():
        return x.new_empty(batch, seqlen, nheads, headdim).transpose(1, 2)
    return x.new_empty(batch, nheads, seqlen, headdim)


def lse_like(q: Tensor) -> Tensor:
    """Uninitialised (batch, nheads, seqlen_q), float32, for float64 float64."""
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def visible_pairs(seqlen_q: int, seqlen_k: int, window: int | None = None) -> int:
    """How many pairs of a query and a key that it sees there are, for one head."""
    offset = seqlen_k - seqlen_q
    window = seqlen_k if window is None else min(window, seqlen_k)
    growing = max(0, min(seqlen_q, window - offset))  # queries that see every key before them
    return growing * offset + growing * (growing + 1) // 2 + (seqlen_q - growing) * window


def _fake(q, k, v, *, scale=None, window=None):
    check_attention(q, k, v, scale=scale, window=window)
    return output_like(q), lse_like(q)


def _fake_backward(grad_out, grad_lse, q, k, v, out, lse, **options):
    check_backward(grad_out, grad_lse, q, k, v, out, lse, **options)
    return output_like(q), output_like(k), output_like(v)


# ---- gradients


def _setup(ctx, inputs, options, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.save_for_forward(*inputs)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    if grad_out is None and grad_lse is None:
        return None, None, None
    q, k, v, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    return _backward_op(grad_out, grad_lse, q, k, v, out, lse, **ctx.options)


@_in_full_precision
def _jvp(ctx, *tangents):
    """Tangents of (out, lse), in plain torch, one block of queries at a time.

    With dS = scale (dq k^T + q dk^T) and r = rowsum(P dS): dlse = r, dout = P (dS - r) v + P dv.
    """
    q, k, v = (forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors)
    dq, dk, dv = (torch.zeros_like(x) if dx is None else dx for x, dx in zip((q, k, v), tangents, strict=True))
    scale, wide = _scale(q, ctx.options["scale"]), [_wide(x) for x in (k, v, dk, dv)]
    qs, dqs = _grouped(q, k), _grouped(dq, k)
    of_out, of_lse = [], []
    for block in _blocks(q, k, ctx.options["window"]):
        ks, vs, dks, dvs = (x[:, :, block.keys] for x in wide)
        p = _logits(qs, wide[0], block, scale).softmax(-1).where(block.visible, 0)
        pds = p * scale * (_pairs(dqs[..., block.queries, :], ks) + _pairs(qs[..., block.queries, :], dks))
        r = pds.sum(-1, keepdim=True)
        of_out.append(_keys(pds - r * p, vs) + _keys(p, dvs))
        of_lse.append(r[..., 0])
    if not of_out:
        return dq, torch.zeros_like(lse_like(q))
    return torch.cat(of_out, -2).flatten(1, 2).to(q.dtype), torch.cat(of_lse, -1).flatten(1, 2)


def _setup_backward(ctx, inputs, options, output):
    grad_out, grad_lse, q, k, v, _, _ = inputs
    ctx.save_for_backward(grad_out, grad_lse, q, k, v)
    ctx.options = options


@_in_full_precision
def _backward_backward(ctx, grad_dq, grad_dk, grad_dv):
    """In plain torch, so that it can be differentiated again. Then torch keeps the N x N weights, block by block.

    With W = scale (grad_dq k^T + q grad_dk^T) the gradient of dS, r = rowsum(W P) and dP = grad_out v^T:
    the gradient of dP is P (W - r), that of grad_lse r, and that of S follows from that of P,
    W (dP - delta + grad_lse) - r dP + grad_out grad_dv^T, through the softmax.
    """
    grad_out, grad_lse, q, k, v = ctx.saved_tensors
    scale = _scale(q, ctx.options["scale"])
    wide = [_wide(k), _wide(v), _wide(grad_dk), _wide(grad_dv)]
    of_queries, of_lse, of_keys = [], [], None
    grouped = [_grouped(x, k) for x in (q, grad_out, grad_dq)]
    lse_grads = torch.zeros_like(grouped[0][..., 0]) if grad_lse is None else grad_lse.reshape(grouped[0].shape[:-1])
    for block in _blocks(q, k, ctx.options["window"]):
        rows, cols = block.queries, block.keys
        (qs, gos, gqs), (ks, vs, gks, gvs) = [x[..., rows, :] for x in grouped], [x[:, :, cols] for x in wide]

        p = _logits(grouped[0], wide[0], block, scale).softmax(-1).where(block.visible, 0)
        dp = _pairs(gos, vs)
        shifted = dp - (p * dp).sum(-1, keepdim=True) + lse_grads[..., rows, None]
        w = scale * (_pairs(gqs, ks) + _pairs(qs, gks))
        r = (w * p).sum(-1, keepdim=True)
        of_p = w * shifted - r * dp + _pairs(gos, gvs)
        of_logits = scale * p * (of_p - (p * of_p).sum(-1, keepdim=True))
        of_dp, ds = p * (w - r), scale * p * shifted
        of_queries.append(
            torch.stack([_keys(of_logits, ks) + _keys(ds, gks), _keys(of_dp, vs) + _keys(p, gvs)])  # of q, of grad_out
        )
        of_lse.append(r[..., 0])
        more = torch.stack([_queries(of_logits, qs) + _queries(ds, gqs), _queries(of_dp, gos)])  # of k, of v
        of_keys = more.new_zeros(2, *k.shape) if of_keys is None else of_keys  # mapped by vmap where `more` is
        of_keys[..., cols, :] += more
    of_q, of_grad_out = torch.cat(of_queries, -2).flatten(2, 3) if of_queries else (0 * q, 0 * grad_out)
    of_grad_lse = None
    if grad_lse is not None:
        of_grad_lse = torch.cat(of_lse, -1).flatten(1, 2) if of_lse else 0 * grad_lse
    of_k, of_v = (0 * k, 0 * v) if of_keys is None else of_keys
    grads = (of_grad_out.to(q.dtype), of_grad_lse, of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype))
    return *grads, None, None


def _pairs(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.einsum("bhgid,bhjd->bhgij", queries, keys)


def _keys(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("bhgij,bhjd->bhgid", weights, values)


def _queries(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("bhgij,bhgid->bhjd", weights, values)


# ---- vmap, autocast, explain


def fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """A tensor mapped by vmap along `dim` with the mapped dimension inside its batch."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def unfold(x: Tensor, size: int) -> Tensor:
    """fold undone: the mapped dimension first."""
    return x.reshape(size, x.shape[0] // size if size else 0, *x.shape[1:])


def _vmap(op):
    def mapped(info, in_dims, *args, **options):
        folded = [fold(x, dim, info.batch_size) for x, dim in zip(args, in_dims, strict=False)]
        results = op(*folded, **options)
        return tuple(unfold(x, info.batch_size) for x in results), (0,) * len(results)

    return mapped


def _autocast(device: str):
    def cast(q, k, v, *, scale=None, window=None):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):  # as for torch's own ops, float64 stays
            tensors = (x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in (q, k, v))
            return _op(*tensors, scale=scale, window=window)

    return cast


def _describe(q, k, v, *, scale=None, window=None, return_lse=False) -> Explanation:
    check_attention(q, k, v, scale=scale, window=window)
    moved = sum(x.numel() * x.element_size() for x in (q, q, k, v, lse_like(q.to("meta"))))
    flops = 4 * q.shape[3] * q.shape[0] * q.shape[1] * visible_pairs(q.shape[2], k.shape[2], window)
    return Explanation(*_plan(q, k, v, window), flops, moved)


def _describe_backward(grad_out, grad_lse, q, k, v, out, lse, **options) -> Explanation:
    check_backward(grad_out, grad_lse, q, k, v, out, lse, **options)
    window = options.get("window")
    moved = sum(x.numel() * x.element_size() for x in (q, q, q, q, k, k, v, v, lse))
    flops = 10 * q.shape[3] * q.shape[0] * q.shape[1] * visible_pairs(q.shape[2], k.shape[2], window)
    return Explanation(*_plan_backward(q, k, window), flops, moved)


def _plan(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[str, str]:
    """(kernel, why) of a call."""
    return _without_gpu("causal_attention", q) or plan_of(q, k, v, window)[:2]


def _plan_backward(q: Tensor, k: Tensor, window: int | None) -> tuple[str, str]:
    """The same of a call of its backward."""
    known = _without_gpu("causal_attention_backward", q)
    return known or causal_attention_backward_plan(q.shape, k.shape, q.dtype, window, device_facts(q.device))[:2]


def _without_gpu(op: str, q: Tensor) -> tuple[str, str] | None:
    """The same where no kernel for GPUs serves the op."""
    kernel = implementation(op, q.device.type)
    if kernel.startswith(REFERENCE):
        return REFERENCE, kernel.removeprefix(f"{REFERENCE}: ")
    return None if kernel == "Triton" else cpu_kernel(q.dtype, pairs=True)


def cpu_kernel(dtype: torch.dtype, pairs: bool = False) -> tuple[str, str]:
    """(kernel, why) where compiled CPU kernels serve a call; pairs: by avx512_bf16 where the processor has it."""
    if dtype == torch.float64:
        return "cpu_loop", "float64 runs in a plain loop"
    isa, why = C.isa(), f"the compiled CPU kernel, on up to {torch.get_num_threads()} thread(s)"
    if pairs and dtype == torch.bfloat16 and isa in ("avx512_bf16", "avx512_amx"):
        return f"cpu_{isa}", f"{why}, bfloat16 multiplied in pairs, summed in float32"
    return f"cpu_{isa.split('_')[0]}", why  # what extends avx512 adds nothing to float32


lib.impl("causal_attention", causal_attention_ref, "CompositeExplicitAutograd")
lib.impl("causal_attention_backward", causal_attention_backward_ref, "CompositeExplicitAutograd")
for _device in ("CPU", "CUDA"):
    lib.impl("causal_attention", _autocast(_device.lower()), f"Autocast{_device}")
triton_launcher("causal_attention", "causal_attention_triton", check_attention)
triton_launcher("causal_attention_backward", "causal_attention_backward_triton", check_backward)
torch.library.register_fake("audiokernels::causal_attention", _fake, lib=lib)
torch.library.register_fake("audiokernels::causal_attention_backward", _fake_backward, lib=lib)
torch.library.register_fake("audiokernels::_causal_attention_sm90", lambda *call: None, lib=lib)
register_autograd("causal_attention", _backward, _setup, _jvp)
register_autograd("causal_attention_backward", _backward_backward, _setup_backward)
_op = torch.ops.audiokernels.causal_attention.default
_backward_op = torch.ops.audiokernels.causal_attention_backward.default
torch.library.register_vmap("audiokernels::causal_attention", _vmap(_op), lib=lib)
torch.library.register_vmap("audiokernels::causal_attention_backward", _vmap(_backward_op), lib=lib)
describe("causal_attention", _describe)
describe("causal_attention_backward", _describe_backward)

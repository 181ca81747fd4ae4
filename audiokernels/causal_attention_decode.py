"""Causal attention step by step: the newest positions against a cache of keys and values, a ring once it is full.

    kv_cache_update:          k_cache[b, :, (p + i) mod capacity] = k[b, :, i],  v_cache likewise,  p = cache_seqlens[b]
    causal_attention_decode:  out[b, :, i] = softmax over the positions p + i - window < j <= p + i of
                              scale * q[b, :, i] . k_j, times v_j

Both take the same cache_seqlens, the number of positions before this step, and the caller adds m to it when all layers
are done: a step then replays in a CUDA graph. With window <= capacity - m + 1 the ring computes exactly what
causal_attention with that window computes over the whole sequence. After Dao et al., flash_attn_with_kvcache
(FlashAttention), and "Flash-Decoding" (2023). A step reads the window's keys and values once: 4 * headdim operations
for every pair of a query and a key that it sees.
"""

import torch
from torch import Tensor

from audiokernels._checks import check_not_expanded, mark_written, refuse_grad
from audiokernels._library import lib, triton_launcher
from audiokernels.backends import REFERENCE, Explanation, describe, implementation
from audiokernels.causal_attention import (
    attend,
    check_heads,
    check_options,
    check_tensors,
    cpu_kernel,
    fold,
    output_like,
    unfold,
)
from audiokernels.causal_attention_plan import causal_attention_decode_plan, device_facts

lib.define("kv_cache_update(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens) -> ()")
lib.define(
    "causal_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, "
    "*, float? scale=None, SymInt? window=None) -> Tensor"
)


def kv_cache_update(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor) -> None:
    """Write the keys and values of m new positions into their slots of the caches.

    Position p has the slot p mod capacity. Call it under torch.inference_mode(), before causal_attention_decode with
    the same cache_seqlens.

    Args:
        k_cache: (batch, nheads_kv, capacity, headdim), headdim 8..256, float32, bfloat16, float16 or float64, any
            strides but expanded ones; mutated.
        v_cache: the same; mutated.
        k: (batch, nheads_kv, m, headdim), dtype of the caches, m <= capacity.
        v: shape and dtype of k.
        cache_seqlens: (batch,) int32 >= 0, positions written before this step; it may exceed the capacity. Before it
            reaches 2^31 (37 hours at 16 kHz) subtract a multiple of the capacity that leaves at least the capacity. On
            a GPU a negative one is taken modulo the capacity.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came; the caches are unchanged then.
        RuntimeError: an input requires grad while grad mode is on.
    """
    if torch.is_grad_enabled():
        refuse_grad("kv_cache_update", k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    try:
        _update_op(k_cache, v_cache, k, v, cache_seqlens)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        check_update(k_cache, v_cache, k, v, cache_seqlens)
        raise
    mark_written(k_cache, v_cache)


def kv_cache_update_ref(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor) -> None:
    """The same in plain torch, for any device."""
    check_update(k_cache, v_cache, k, v, cache_seqlens)
    if k.numel() == 0:
        return
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    slots = (cache_seqlens[:, None].long() + torch.arange(k.shape[2], device=k.device)) % k_cache.shape[2]
    k_cache[row, :, slots] = k.transpose(1, 2)
    v_cache[row, :, slots] = v.transpose(1, 2)


def causal_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of the m newest positions, whose keys and values kv_cache_update has just written.

    Sums are float32 (float64 for float64). Call it under torch.inference_mode(): it has no gradient. Slots that no
    query sees may hold anything.

    Args:
        q: (batch, nheads, m, headdim), headdim 8..256, float32, bfloat16, float16 or float64: the queries at the
            positions cache_seqlens[b] .. cache_seqlens[b] + m - 1.
        k_cache: (batch, nheads_kv, capacity, headdim), dtype of q; nheads is a multiple of nheads_kv.
        v_cache: shape and dtype of k_cache.
        cache_seqlens: (batch,) int32 >= 0, as it was given to kv_cache_update. On a GPU, where a negative one is not
            seen, its row is unspecified.
        scale: of the logits, headdim ** -0.5 by default.
        window: >= 1: a query sees itself and the window - 1 positions before it, where there are so many;
            capacity >= window + m - 1. By default all that the ring holds, capacity - m + 1.

    Returns:
        (batch, nheads, m, headdim), dtype of q, in the memory order (batch, m, nheads, headdim) where q has it, else
        contiguous.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
        RuntimeError: an input requires grad while grad mode is on.
    """
    if torch.is_grad_enabled():
        refuse_grad("causal_attention_decode", q=q, k_cache=k_cache, v_cache=v_cache)
    try:
        return _op(q, k_cache, v_cache, cache_seqlens, scale=scale, window=window)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        check_decode(q, k_cache, v_cache, cache_seqlens, scale=scale, window=window)
        raise


def causal_attention_decode_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The same in plain torch, for any device: the window out of the ring, then as causal_attention_ref."""
    check_decode(q, k_cache, v_cache, cache_seqlens, scale=scale, window=window)
    (batch, _, m, _), capacity = q.shape, k_cache.shape[2]
    if q.numel() == 0:
        return output_like(q)
    window = capacity - m + 1 if window is None else window
    start = cache_seqlens[:, None].long() - (window - 1)
    position = start + torch.arange(window + m - 1, device=q.device)
    row = torch.arange(batch, device=q.device)[:, None]
    k, v = (cache[row, :, position % capacity].transpose(1, 2) for cache in (k_cache, v_cache))
    exists = position >= 0
    return attend(q, k, v.where(exists[:, None, :, None], 0), scale, window, exists)[0]


def check_update(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor) -> None:
    """Raise TypeError or ValueError for the first argument that breaks a rule of kv_cache_update."""
    check_tensors({"k_cache": (k_cache, 4), "v_cache": (v_cache, 4), "k": (k, 4), "v": (v, 4)})
    _check_caches(k_cache, v_cache)
    batch, nheads_kv, capacity, headdim = k_cache.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_not_expanded(name, cache)
    if (k.shape[0], k.shape[1], k.shape[3]) != (batch, nheads_kv, headdim) or k.shape[2] > capacity:
        rule = f"({batch}, {nheads_kv}, m, {headdim}), m <= {capacity}, as k_cache has them"
        raise ValueError(f"k must have shape {rule}, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    _check_seqlens(cache_seqlens, k_cache)


def check_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> None:
    """Raise TypeError or ValueError for the first argument that breaks a rule of causal_attention_decode."""
    check_tensors({"q": (q, 4), "k_cache": (k_cache, 4), "v_cache": (v_cache, 4)})
    _check_caches(k_cache, v_cache)
    (batch, nheads, m, headdim), capacity = q.shape, k_cache.shape[2]
    if k_cache.shape[0] != batch or k_cache.shape[3] != headdim:
        rule = f"batch {k_cache.shape[0]} and headdim {k_cache.shape[3]} as k_cache has them"
        raise ValueError(f"q must have shape (batch, nheads, m, headdim) with {rule}, got {tuple(q.shape)}")
    check_heads(nheads, k_cache.shape[1], "k_cache")
    _check_seqlens(cache_seqlens, k_cache)
    check_options(scale, window)
    if capacity < (1 if window is None else window) + m - 1:
        came = f"window {window}, m = {m}, capacity {capacity}"
        raise ValueError(f"k_cache must have a capacity >= window + m - 1 (window 1 at least), got {came}")


def _check_caches(k_cache, v_cache) -> None:
    if not 8 <= k_cache.shape[3] <= 256:
        raise ValueError(f"k_cache must have a headdim of 8..256, got shape {tuple(k_cache.shape)}")
    if v_cache.shape != k_cache.shape:
        rule = f"the shape of k_cache, {tuple(k_cache.shape)}"
        raise ValueError(f"v_cache must have {rule}, got {tuple(v_cache.shape)}")


def _check_seqlens(cache_seqlens, k_cache) -> None:
    if not isinstance(cache_seqlens, Tensor):
        raise TypeError(f"cache_seqlens must be a tensor, got {type(cache_seqlens).__name__}")
    if cache_seqlens.dtype != torch.int32:
        raise TypeError(f"cache_seqlens must be int32, got {cache_seqlens.dtype}")
    if cache_seqlens.layout != torch.strided:
        raise TypeError(f"cache_seqlens must be a dense tensor, got layout {cache_seqlens.layout}")
    if tuple(cache_seqlens.shape) != (k_cache.shape[0],):
        rule = f"(batch,) = ({k_cache.shape[0]},)"
        raise ValueError(f"cache_seqlens must have shape {rule}, got {tuple(cache_seqlens.shape)}")
    if cache_seqlens.device != k_cache.device:
        where = f"the device of k_cache ({k_cache.device})"
        raise ValueError(f"cache_seqlens must be on {where}, got {cache_seqlens.device}")
    # on a GPU it would have to wait, and a tensor of vmap's has many values
    seen = type(cache_seqlens) is Tensor and cache_seqlens.device.type == "cpu"
    seen = seen and not torch._C._functorch.is_functorch_wrapped_tensor(cache_seqlens)
    if seen and cache_seqlens.numel() > 0 and int(cache_seqlens.min()) < 0:
        raise ValueError(f"cache_seqlens must be >= 0, got {int(cache_seqlens.min())}")


def _fake_update(k_cache, v_cache, k, v, cache_seqlens):
    if torch.is_grad_enabled():
        refuse_grad("kv_cache_update", k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    check_update(k_cache, v_cache, k, v, cache_seqlens)


def _fake(q, k_cache, v_cache, cache_seqlens, *, scale=None, window=None):
    if torch.is_grad_enabled():
        refuse_grad("causal_attention_decode", q=q, k_cache=k_cache, v_cache=v_cache)
    check_decode(q, k_cache, v_cache, cache_seqlens, scale=scale, window=window)
    return output_like(q)


def _vmap_update(info, in_dims, *args):
    for name, dim in zip(("k_cache", "v_cache"), in_dims, strict=False):
        if dim is None:
            raise ValueError(f"{name} must be mapped by vmap: each mapped call writes its own")
    for i in range(info.batch_size):
        _update_op(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
    return None, None


def _vmap(info, in_dims, *args, **options):
    folded = [fold(x, dim, info.batch_size) for x, dim in zip(args, in_dims, strict=False)]
    return unfold(_op(*folded, **options), info.batch_size), 0


def _describe_update(k_cache, v_cache, k, v, cache_seqlens) -> Explanation:
    check_update(k_cache, v_cache, k, v, cache_seqlens)
    kernel, why = _plan("kv_cache_update", k, k_cache)
    return Explanation(kernel, why, 0, 4 * k.numel() * k.element_size())


def _describe(q, k_cache, v_cache, cache_seqlens, *, scale=None, window=None) -> Explanation:
    """FLOPs and bytes are those of a ring that holds the whole window already."""
    check_decode(q, k_cache, v_cache, cache_seqlens, scale=scale, window=window)
    (batch, nheads, m, headdim), (_, nheads_kv, capacity, _) = q.shape, k_cache.shape
    window = capacity - m + 1 if window is None else window
    kernel, why = _plan("causal_attention_decode", q, k_cache, window)
    numbers = 2 * q.numel() + 2 * batch * nheads_kv * (window + m - 1 if m else 0) * headdim
    return Explanation(kernel, why, 4 * batch * nheads * m * window * headdim, numbers * q.element_size())


def _plan(op: str, x: Tensor, k_cache: Tensor, window: int | None = None) -> tuple[str, str]:
    kernel = implementation(op, x.device.type)
    if kernel.startswith(REFERENCE):
        return REFERENCE, kernel.removeprefix(f"{REFERENCE}: ")
    if kernel != "Triton":
        return cpu_kernel(x.dtype)
    if op == "kv_cache_update":
        return kernel, "one program for some of the new positions"
    return causal_attention_decode_plan(x.shape, k_cache.shape, x.dtype, window, device_facts(x.device))[:2]


lib.impl("kv_cache_update", kv_cache_update_ref, "CompositeExplicitAutograd")
lib.impl("causal_attention_decode", causal_attention_decode_ref, "CompositeExplicitAutograd")
triton_launcher("kv_cache_update", "causal_attention_decode_triton", check_update)
triton_launcher("causal_attention_decode", "causal_attention_decode_triton", check_decode)
torch.library.register_fake("audiokernels::kv_cache_update", _fake_update, lib=lib)
torch.library.register_fake("audiokernels::causal_attention_decode", _fake, lib=lib)
torch.library.register_vmap("audiokernels::kv_cache_update", _vmap_update, lib=lib)
torch.library.register_vmap("audiokernels::causal_attention_decode", _vmap, lib=lib)
describe("kv_cache_update", _describe_update)
describe("causal_attention_decode", _describe)
_op = torch.ops.audiokernels.causal_attention_decode.default
_update_op = torch.ops.audiokernels.kv_cache_update.default

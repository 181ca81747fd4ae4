"""Causal attention against a ring cache on NVIDIA GPUs: decoding and the cache's update, in Triton.

A step has few queries and many keys, so the keys of a head are shared out among `splits` programs, whose partial sums
one more kernel adds in a fixed order. How many is a matter of shapes alone; what part of the ring holds anything is
read from cache_seqlens on the device: a step replays in a CUDA graph. The queries of all heads that share a key head
are the rows of one block, so that keys and values are read once.

Compiled for sm_80 to sm_120 and run through Triton's interpreter; not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from audiokernels._triton import Launch, strides
from audiokernels.causal_attention import output_like
from audiokernels.causal_attention_decode import causal_attention_decode_ref, kv_cache_update_ref
from audiokernels.causal_attention_plan import (
    REFERENCE,
    DecodePlan,
    causal_attention_decode_plan,
    device_facts,
    padded,
)
from audiokernels.causal_attention_triton import (
    LOG2_E,
    add_not_finite,
    finite,
    interpreted,
    online_softmax,
    row_offset,
)


@triton.jit
def at(base, rows, stride_row, columns, stride_col):
    """Pointers to (rows, columns), in 64 bits."""
    return base + rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_col


@triton.jit(do_not_specialize=["nheads", "group", "steps", "capacity", "window", "splits"])
def decode_kernel(
    q, k, v, seqlens, out, partial, partial_m, partial_norm,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim,
    v_batch, v_head, v_row, v_dim, o_batch, o_head, o_row, o_dim, seqlens_stride,
    nheads, group, steps, capacity, window, splits, scale,
    headdim: tl.constexpr, HEADDIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SHARED: tl.constexpr,
    SEVERAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of the keys for ROWS of the group * steps queries of one key head."""
    pid = tl.program_id(0)
    split, pid = pid % splits, pid // splits
    blocks = tl.cdiv(group * steps, ROWS)
    row, pid = pid % blocks * ROWS + tl.arange(0, ROWS), pid // blocks
    nheads_kv = nheads // group
    b, kv_head = pid // nheads_kv, pid % nheads_kv
    inside = row < group * steps
    head, step = kv_head * group + row // steps, row % steps
    d = tl.arange(0, HEADDIM)
    mask = inside[:, None] & (d < headdim)[None, :]
    places = head.to(tl.int64) * q_head + step.to(tl.int64) * q_row
    columns = d[None, :].to(tl.int64) * q_dim
    query = tl.load(row_offset(b, q_batch, q) + places[:, None] + columns, mask=mask, other=0.0)

    # keys count from the oldest position that any query sees; key i lies in slot (oldest + i) mod capacity
    seqlen = tl.load(row_offset(b, seqlens_stride, seqlens)).to(tl.int64)
    oldest = tl.maximum(seqlen - window + 1, 0)
    count = (seqlen + steps - oldest).to(tl.int32)
    own = (seqlen - oldest).to(tl.int32) + step
    slot = (oldest % capacity).to(tl.int32)
    share = tl.cdiv(tl.cdiv(tl.maximum(count, 0), KEYS), splits) * KEYS
    end = tl.minimum(count, (split + 1) * share)

    k = row_offset(kv_head, k_head, row_offset(b, k_batch, k))
    v = row_offset(kv_head, v_head, row_offset(b, v_batch, v))
    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEADDIM], tl.float32)
    for start in tl.range(split * share, end, KEYS):
        i = start + tl.arange(0, KEYS)
        slots = tl.where(slot + i < capacity, slot + i, slot + i - capacity)
        there = (i < end)[:, None] & (d < headdim)[None, :]
        keys = tl.load(at(k, slots, k_row, d, k_dim), mask=there, other=0.0)
        values = tl.load(at(v, slots, v_row, d, v_dim), mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        seen = (i[None, :] <= own[:, None]) & (i[None, :] > own[:, None] - window) & (i < end)[None, :]
        weights, m, norm, rescale = online_softmax(tl.where(seen, scores, float("-inf")), m, norm)
        weights = weights.to(values.dtype)
        acc = acc * rescale[:, None]
        if SEVERAL:  # a later query may see what an earlier one does not
            acc = tl.dot(weights, finite(values), acc, input_precision=PRECISION)
            acc = add_not_finite(acc, seen, values)
        else:
            acc = tl.dot(weights, values, acc, input_precision=PRECISION)

    if not SHARED:
        places = head.to(tl.int64) * o_head + step.to(tl.int64) * o_row
        pointers = row_offset(b, o_batch, out) + places[:, None] + d[None, :] * o_dim
        tl.store(pointers, (acc / norm[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        place = ((b * nheads + head) * steps + step).to(tl.int64) * splits + split
        tl.store(partial_m + place, m, mask=inside)
        tl.store(partial_norm + place, norm, mask=inside)
        tl.store(partial + place[:, None] * headdim + d[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["nheads", "steps", "splits"])
def combine_kernel(
    partial, partial_m, partial_norm, out, o_batch, o_head, o_row, o_dim, nheads, steps, splits,
    headdim: tl.constexpr, HEADDIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One query's output from its partial sums."""
    row = tl.program_id(0)
    split, d = tl.arange(0, PADDED), tl.arange(0, HEADDIM)
    place = tl.cast(row, tl.int64) * splits + split
    inside = split < splits
    mask = inside[:, None] & (d < headdim)[None, :]
    m = tl.load(partial_m + place, mask=inside, other=float("-inf"))
    norm = tl.load(partial_norm + place, mask=inside, other=0.0)
    acc = tl.load(partial + place[:, None] * headdim + d[None, :], mask=mask, other=0.0)
    base = tl.max(m, 0)
    weights = tl.exp2(m - tl.where(base == float("-inf"), 0.0, base))
    result = tl.sum(acc * weights[:, None], 0) / tl.sum(norm * weights, 0)
    b, h, step = row // steps // nheads, row // steps % nheads, row % steps
    out = row_offset(step, o_row, row_offset(h, o_head, row_offset(b, o_batch, out)))
    tl.store(out + d * o_dim, result.to(out.dtype.element_ty), mask=d < headdim)


@triton.jit(do_not_specialize=["nheads", "steps", "capacity"])
def update_kernel(
    k_cache, v_cache, k, v, seqlens,
    kc_batch, kc_head, kc_row, kc_dim, vc_batch, vc_head, vc_row, vc_dim,
    k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim, seqlens_stride, nheads, steps, capacity,
    headdim: tl.constexpr, HEADDIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS new positions of one key head into their slots."""
    blocks = tl.cdiv(steps, ROWS)
    pid = tl.program_id(0)
    i = pid % blocks * ROWS + tl.arange(0, ROWS)
    b, h = pid // blocks // nheads, pid // blocks % nheads
    d = tl.arange(0, HEADDIM)
    mask = (i < steps)[:, None] & (d < headdim)[None, :]
    seqlen = tl.load(row_offset(b, seqlens_stride, seqlens)).to(tl.int64)
    slots = ((seqlen + i) % capacity + capacity) % capacity  # a bad, negative length stays inside
    k = row_offset(h, k_head, row_offset(b, k_batch, k))
    v = row_offset(h, v_head, row_offset(b, v_batch, v))
    k_cache = row_offset(h, kc_head, row_offset(b, kc_batch, k_cache))
    v_cache = row_offset(h, vc_head, row_offset(b, vc_batch, v_cache))
    tl.store(at(k_cache, slots, kc_row, d, kc_dim), tl.load(at(k, i, k_row, d, k_dim), mask=mask), mask=mask)
    tl.store(at(v_cache, slots, vc_row, d, vc_dim), tl.load(at(v, i, v_row, d, v_dim), mask=mask), mask=mask)


# ---- launching


def decode_launches(
    plan: DecodePlan, q: Tensor, caches: tuple[Tensor, Tensor], seqlens: Tensor, out: Tensor, scale: float
) -> list[Launch]:
    """One launch, or two where the keys are shared out."""
    (batch, nheads, steps, headdim), (_, nheads_kv, capacity, _) = q.shape, caches[0].shape
    rows = batch * nheads * steps
    parts = plan.splits if plan.splits > 1 else 0
    partial = {
        "partial": q.new_empty((rows, parts, headdim), dtype=torch.float32),
        "partial_m": q.new_empty((rows, parts), dtype=torch.float32),
        "partial_norm": q.new_empty((rows, parts), dtype=torch.float32),
    }
    sizes = {"nheads": nheads, "steps": steps, "splits": plan.splits}
    arguments = {"q": q, "k": caches[0], "v": caches[1], "seqlens": seqlens, "out": out, **partial}
    for prefix, x in (("q", q), ("k", caches[0]), ("v", caches[1]), ("o", out)):
        arguments.update(strides(prefix, x))
    arguments.update(sizes, seqlens_stride=seqlens.stride(0), group=nheads // nheads_kv)
    arguments.update(capacity=capacity, window=plan.window, scale=scale * LOG2_E)
    constants = {
        "headdim": headdim,
        "HEADDIM": plan.headdim,
        "ROWS": plan.block_rows,
        "KEYS": plan.block_keys,
        "SHARED": plan.splits > 1,
        "SEVERAL": steps > 1,
        "PRECISION": "ieee" if interpreted() else plan.precision,
    }
    blocks = triton.cdiv(nheads // nheads_kv * steps, plan.block_rows)
    grid = (batch * nheads_kv * blocks * plan.splits,)
    launches = [Launch(decode_kernel, grid, arguments, constants, {"num_warps": plan.warps, "num_stages": plan.stages})]
    if parts:
        constants = {"headdim": headdim, "HEADDIM": plan.headdim, "PADDED": padded(parts)}
        arguments = {**partial, "out": out, **strides("o", out), **sizes}
        launches.append(Launch(combine_kernel, (rows,), arguments, constants, {"num_warps": 4, "num_stages": 1}))
    return launches


def causal_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The op causal_attention_decode on the device of q."""
    plan = causal_attention_decode_plan(q.shape, k_cache.shape, q.dtype, window, device_facts(q.device))
    if plan.kernel == REFERENCE:
        return causal_attention_decode_ref(q, k_cache, v_cache, cache_seqlens, scale=scale, window=window)
    out = output_like(q)
    if out.numel():
        scale = q.shape[3] ** -0.5 if scale is None else scale
        for launch in decode_launches(plan, q, (k_cache, v_cache), cache_seqlens, out, scale):
            launch.run(q)
    return out


def update_launch(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, seqlens: Tensor) -> Launch:
    """The launch of kv_cache_update's kernel."""
    batch, nheads, steps, headdim = k.shape
    arguments = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "seqlens": seqlens}
    for prefix, x in (("kc", k_cache), ("vc", v_cache), ("k", k), ("v", v)):
        arguments.update(strides(prefix, x))
    arguments.update(seqlens_stride=seqlens.stride(0), nheads=nheads, steps=steps, capacity=k_cache.shape[2])
    rows = min(16, triton.next_power_of_2(steps))
    constants = {"headdim": headdim, "HEADDIM": padded(headdim), "ROWS": rows}
    grid = (batch * nheads * triton.cdiv(steps, rows),)
    return Launch(update_kernel, grid, arguments, constants, {"num_warps": 1 if rows == 1 else 4, "num_stages": 1})


def kv_cache_update(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor) -> None:
    """The op kv_cache_update on the device of k."""
    if k.dtype == torch.float64:
        kv_cache_update_ref(k_cache, v_cache, k, v, cache_seqlens)
    elif k.numel():
        update_launch(k_cache, v_cache, k, v, cache_seqlens).run(k)

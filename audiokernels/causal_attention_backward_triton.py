"""Causal attention on NVIDIA GPUs, backward: three Triton kernels, deterministic, without atomics.

    delta = rowsum(out * grad_out) - grad_lse
    P = exp(S - lse),  dS = P * (grad_out V^T - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T grad_out

One kernel for delta; one program for every block of queries sums dq over the keys that they see; one for every block of
keys sums dk and dv over the queries that see them, and over the query heads of a key head, with the scores transposed
so that P and dS are left factors as they come. The programs with the most to do start first.
Tiles that not every query of a block sees whole are masked; in these, what is not finite in k, q and grad_out is kept
from queries that do not see it. Where it is seen, lse or the product with grad_out carries it: then a whole row is NaN.

Compiled for sm_80 to sm_120 and run through Triton's interpreter; not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from audiokernels._triton import Launch, is_wide, strides
from audiokernels.causal_attention import causal_attention_backward_ref, output_like
from audiokernels.causal_attention_plan import (
    REFERENCE,
    BackwardPlan,
    Tile,
    causal_attention_backward_plan,
    device_facts,
)
from audiokernels.causal_attention_triton import (
    LARGEST_TILE,
    LOG2_E,
    finite,
    interpreted,
    launch_options,
    load_tile,
    row_offset,
    seen_keys,
    store_tile,
)

INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["nheads", "seqlen_q"])
def delta_kernel(
    out, grad_out, grad_lse, delta,
    o_batch, o_head, o_row, o_dim, g_batch, g_head, g_row, g_dim, nheads, seqlen_q,
    headdim: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr, GRAD_LSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """delta of BLOCK_M queries of one head; delta and grad_lse are contiguous."""
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    batch_head, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    b, h = batch_head // nheads, batch_head % nheads
    out = row_offset(h, o_head, row_offset(b, o_batch, out))
    grad_out = row_offset(h, g_head, row_offset(b, g_batch, grad_out))
    results = load_tile(out, row, seqlen_q, o_row, o_dim, headdim, BLOCK_M, HEADDIM, True, WIDE)
    grads = load_tile(grad_out, row, seqlen_q, g_row, g_dim, headdim, BLOCK_M, HEADDIM, True, WIDE)
    total = tl.sum(results.to(tl.float32) * grads.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK_M)
    if GRAD_LSE:
        total -= tl.load(row_offset(batch_head, seqlen_q, grad_lse) + rows, mask=rows < seqlen_q, other=0.0)
    tl.store(row_offset(batch_head, seqlen_q, delta) + rows, total, mask=rows < seqlen_q)


# ---- dq


@triton.jit
def dq_tile(
    dq, query, grads, lse, delta, k, v, k_row, k_dim, v_row, v_dim, start, end, position, window, headdim, scale,
    BLOCK_N: tl.constexpr, HEADDIM: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq + dS k over the keys of one tile."""
    keys = load_tile(k, start, end, k_row, k_dim, headdim, BLOCK_N, HEADDIM, MASKED, WIDE)
    values = load_tile(v, start, end, v_row, v_dim, headdim, BLOCK_N, HEADDIM, MASKED, WIDE)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    p = tl.exp2(scores * scale - lse[:, None])
    dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(seen_keys(start, position, window, BLOCK_N, WINDOWED), ds, 0.0)
        keys = finite(keys)
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["nheads", "group", "heads", "seqlen_q", "seqlen_k", "window"])
def dq_kernel(
    q, k, v, grad_out, lse, delta, dq,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim,
    g_batch, g_head, g_row, g_dim, d_batch, d_head, d_row, d_dim,
    nheads, group, heads, seqlen_q, seqlen_k, window, scale, scale_log2,
    headdim: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head; heads = batch * nheads."""
    pid = tl.program_id(0)
    row = (tl.cdiv(seqlen_q, BLOCK_M) - 1 - pid // heads) * BLOCK_M
    batch_head = pid % heads
    b, h = batch_head // nheads, batch_head % nheads
    q = row_offset(h, q_head, row_offset(b, q_batch, q))
    k = row_offset(h // group, k_head, row_offset(b, k_batch, k))
    v = row_offset(h // group, v_head, row_offset(b, v_batch, v))
    grad_out = row_offset(h, g_head, row_offset(b, g_batch, grad_out))
    dq = row_offset(h, d_head, row_offset(b, d_batch, dq))

    first = row + seqlen_k - seqlen_q
    last = tl.minimum(row + BLOCK_M, seqlen_q) - 1 + seqlen_k - seqlen_q
    position = tl.minimum(first + tl.arange(0, BLOCK_M), last)
    diagonal = (first + 1) // BLOCK_N * BLOCK_N  # tiles before it every query sees whole, but for the window's edge
    begin, full = 0, 0
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N
        diagonal = tl.maximum(diagonal, begin)
        full = tl.minimum(full, diagonal)
    n_edge = (full - begin) // EDGE

    query = load_tile(q, row, seqlen_q, q_row, q_dim, headdim, BLOCK_M, HEADDIM, True, WIDE)
    grads = load_tile(grad_out, row, seqlen_q, g_row, g_dim, headdim, BLOCK_M, HEADDIM, True, WIDE)
    rows = row + tl.arange(0, BLOCK_M)
    lse = tl.load(row_offset(batch_head, seqlen_q, lse) + rows, mask=rows < seqlen_q, other=INF) * 1.4426950408889634
    delta = tl.load(row_offset(batch_head, seqlen_q, delta) + rows, mask=rows < seqlen_q, other=0.0)
    total = tl.zeros([BLOCK_M, HEADDIM], tl.float32)
    for start in tl.range(full, diagonal, BLOCK_N):
        total = dq_tile(
            total, query, grads, lse, delta, k, v, k_row, k_dim, v_row, v_dim, start, seqlen_k, position, window,
            headdim, scale_log2, BLOCK_N, HEADDIM, False, WINDOWED, PRECISION, WIDE,
        )  # fmt: skip
    for i in tl.range(0, n_edge + tl.cdiv(last + 1 - diagonal, EDGE), num_stages=1):
        start = tl.where(i < n_edge, begin + i * EDGE, diagonal + (i - n_edge) * EDGE)
        total = dq_tile(
            total, query, grads, lse, delta, k, v, k_row, k_dim, v_row, v_dim, start, seqlen_k, position, window,
            headdim, scale_log2, EDGE, HEADDIM, True, WINDOWED, PRECISION, WIDE,
        )  # fmt: skip
    store_tile(dq, row, seqlen_q, d_row, d_dim, headdim, total * scale, BLOCK_M, HEADDIM, WIDE)


# ---- dk and dv


@triton.jit
def dkdv_tile(
    dk, dv, keys, values, q, grad_out, lse, delta, q_batch, q_head, q_row, q_dim,
    g_batch, g_head, g_row, g_dim, b, h, nheads, row, seqlen_q, offset, key, window, headdim, scale,
    BLOCK_M: tl.constexpr, HEADDIM: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk + dS^T q and dv + P^T grad_out over the queries of one tile of query head h."""
    q = row_offset(h, q_head, row_offset(b, q_batch, q))
    grad_out = row_offset(h, g_head, row_offset(b, g_batch, grad_out))
    lse = row_offset(b * nheads + h, seqlen_q, lse)
    delta = row_offset(b * nheads + h, seqlen_q, delta)
    query = load_tile(q, row, seqlen_q, q_row, q_dim, headdim, BLOCK_M, HEADDIM, MASKED, WIDE)
    grads = load_tile(grad_out, row, seqlen_q, g_row, g_dim, headdim, BLOCK_M, HEADDIM, MASKED, WIDE)
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < seqlen_q
    row_lse = tl.load(lse + rows, mask=inside, other=0.0) if MASKED else tl.load(lse + rows)
    row_delta = tl.load(delta + rows, mask=inside, other=0.0) if MASKED else tl.load(delta + rows)
    row_lse *= 1.4426950408889634
    scores = tl.dot(keys, tl.trans(query), input_precision=PRECISION)
    p = tl.exp2(scores * scale - row_lse[None, :])
    dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    ds = p * (dp - row_delta[None, :])
    if MASKED:
        position = rows[None, :] + offset
        seen = (key[:, None] <= position) & inside[None, :]
        if WINDOWED:
            seen = seen & (key[:, None] > position - window)
        ds = tl.where(seen, ds, 0.0)
        p = tl.where(seen, p + tl.sum(grads.to(tl.float32) * 0.0, 1)[None, :], 0.0)  # NaN where grads are not finite
        query, grads = finite(query), finite(grads)
    dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["nheads", "group", "heads", "seqlen_q", "seqlen_k", "window"])
def dkdv_kernel(
    q, k, v, grad_out, lse, delta, dk, dv,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim,
    g_batch, g_head, g_row, g_dim, dk_batch, dk_head, dk_row, dk_dim, dv_batch, dv_head, dv_row, dv_dim,
    nheads, group, heads, seqlen_q, seqlen_k, window, scale, scale_log2,
    headdim: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, GROUPED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head; heads = batch * nheads_kv."""
    pid = tl.program_id(0)
    start = pid // heads * BLOCK_N
    nheads_kv = nheads // group
    b, h = pid % heads // nheads_kv, pid % heads % nheads_kv
    k = row_offset(h, k_head, row_offset(b, k_batch, k))
    v = row_offset(h, v_head, row_offset(b, v_batch, v))
    keys = load_tile(k, start, seqlen_k, k_row, k_dim, headdim, BLOCK_N, HEADDIM, True, WIDE)
    values = load_tile(v, start, seqlen_k, v_row, v_dim, headdim, BLOCK_N, HEADDIM, True, WIDE)

    key = start + tl.arange(0, BLOCK_N)
    offset = seqlen_k - seqlen_q
    last = tl.minimum(start + BLOCK_N, seqlen_k) - 1
    # queries begin..end see some of the keys, full_begin..full_end all of them
    begin = tl.maximum(start - offset, 0) // EDGE * EDGE
    end = seqlen_q
    if WINDOWED:
        end = tl.maximum(tl.minimum(seqlen_q, last - offset + window), 0)
    full_begin = tl.cdiv(tl.maximum(last - offset, 0), EDGE) * EDGE
    whole = end - full_begin
    if WINDOWED:
        whole = tl.minimum(start - offset + window, end) - full_begin
    full_end = full_begin + tl.maximum(whole, 0) // BLOCK_M * BLOCK_M
    n_whole = (full_end - full_begin) // BLOCK_M
    n_diagonal = tl.cdiv(tl.maximum(tl.minimum(full_begin, end) - begin, 0), EDGE)
    n_masked = n_diagonal + tl.cdiv(tl.maximum(end - full_end, 0), EDGE)

    # the heads of the group in turn, in one flat loop: nested ones keep too many addresses in registers
    dk_total = tl.zeros([BLOCK_N, HEADDIM], tl.float32)
    dv_total = tl.zeros([BLOCK_N, HEADDIM], tl.float32)
    for i in tl.range(0, n_whole * group if GROUPED else n_whole):
        member = i // n_whole if GROUPED else 0
        row = full_begin + (i - member * n_whole) * BLOCK_M
        dk_total, dv_total = dkdv_tile(
            dk_total, dv_total, keys, values, q, grad_out, lse, delta, q_batch, q_head, q_row, q_dim,
            g_batch, g_head, g_row, g_dim, b, h * group + member, nheads,
            row, seqlen_q, offset, key, window, headdim, scale_log2,
            BLOCK_M, HEADDIM, False, WINDOWED, PRECISION, WIDE,
        )  # fmt: skip
    for i in tl.range(0, n_masked * group if GROUPED else n_masked, num_stages=1):
        member = i // n_masked if GROUPED else 0
        i -= member * n_masked
        row = tl.where(i < n_diagonal, begin + i * EDGE, full_end + (i - n_diagonal) * EDGE)
        dk_total, dv_total = dkdv_tile(
            dk_total, dv_total, keys, values, q, grad_out, lse, delta, q_batch, q_head, q_row, q_dim,
            g_batch, g_head, g_row, g_dim, b, h * group + member, nheads,
            row, seqlen_q, offset, key, window, headdim, scale_log2,
            EDGE, HEADDIM, True, WINDOWED, PRECISION, WIDE,
        )  # fmt: skip
    dk = row_offset(h, dk_head, row_offset(b, dk_batch, dk))
    dv = row_offset(h, dv_head, row_offset(b, dv_batch, dv))
    store_tile(dk, start, seqlen_k, dk_row, dk_dim, headdim, dk_total * scale, BLOCK_N, HEADDIM, WIDE)
    store_tile(dv, start, seqlen_k, dv_row, dv_dim, headdim, dv_total, BLOCK_N, HEADDIM, WIDE)


# ---- launching


def backward_launches(
    plan: BackwardPlan,
    inputs: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    kept: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> list[Launch]:
    """The three launches: inputs (q, k, v), grads (grad_out, grad_lse), kept (out, lse, room for delta), results.

    lse, grad_lse and delta are contiguous.
    """
    (q, k, v), (grad_out, grad_lse), (out, lse, delta), (dq, dk, dv) = inputs, grads, kept, results
    (batch, nheads, seqlen_q, headdim), (_, nheads_kv, seqlen_k, _) = q.shape, k.shape
    common = {"q": q, "k": k, "v": v, "grad_out": grad_out, "lse": lse, "delta": delta}
    for prefix, x in (("q", q), ("k", k), ("v", v), ("g", grad_out)):
        common.update(strides(prefix, x))
    common.update(nheads=nheads, group=nheads // nheads_kv, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=plan.window)
    common.update(scale=scale, scale_log2=scale * LOG2_E)
    wide = is_wide(*LARGEST_TILE, q, k, v, grad_out, out, dq, dk, dv)
    row_sums = Launch(
        delta_kernel,
        (triton.cdiv(seqlen_q, 64) * batch * nheads,),
        {
            **{"out": out, "grad_out": grad_out, "grad_lse": grad_lse, "delta": delta},
            **strides("o", out),
            **strides("g", grad_out),
            **{"nheads": nheads, "seqlen_q": seqlen_q},
        },
        {
            **{"headdim": headdim, "HEADDIM": plan.headdim, "BLOCK_M": 64},
            **{"GRAD_LSE": grad_lse is not None, "WIDE": wide},
        },
        {"num_warps": 4, "num_stages": 1},
    )
    of_q = Launch(
        dq_kernel,
        (triton.cdiv(seqlen_q, plan.dq.block_m) * batch * nheads,),
        {**common, "dq": dq, **strides("d", dq), "heads": batch * nheads},
        _constants(plan, plan.dq, headdim, seqlen_k, wide),
        launch_options(plan.dq),
    )
    of_kv = Launch(
        dkdv_kernel,
        (triton.cdiv(seqlen_k, plan.dkdv.block_n) * batch * nheads_kv,),
        {**common, "dk": dk, "dv": dv, **strides("dk", dk), **strides("dv", dv), "heads": batch * nheads_kv},
        {**_constants(plan, plan.dkdv, headdim, seqlen_k, wide), "GROUPED": nheads > nheads_kv},
        launch_options(plan.dkdv),
    )
    return [row_sums, of_q, of_kv]


def _constants(plan: BackwardPlan, tile: Tile, headdim: int, seqlen_k: int, wide: bool) -> dict[str, int | str]:
    return {
        "headdim": headdim,
        "HEADDIM": plan.headdim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "WINDOWED": plan.window < seqlen_k,
        "PRECISION": "ieee" if interpreted() else plan.precision,
        "WIDE": wide,
        "EDGE": min(16 if plan.headdim >= 128 else 32, tile.block_m, tile.block_n),
    }


def causal_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    **options: float | int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op causal_attention_backward on the device of q; options are scale and window."""
    scale, window = options.get("scale"), options.get("window")
    plan = causal_attention_backward_plan(q.shape, k.shape, q.dtype, window, device_facts(q.device))
    if plan.kernel == REFERENCE:
        return causal_attention_backward_ref(grad_out, grad_lse, q, k, v, out, lse, scale=scale, window=window)
    results = (output_like(q), output_like(k), output_like(v))
    if q.numel() == 0:
        return results[0], results[1].zero_(), results[2].zero_()
    scale = q.shape[3] ** -0.5 if scale is None else scale
    grads = (grad_out, None if grad_lse is None else grad_lse.contiguous())
    kept = (out, lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format))
    for launch in backward_launches(plan, (q, k, v), grads, kept, results, scale):
        launch.run(q)
    return results

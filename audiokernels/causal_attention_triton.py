"""Causal attention on NVIDIA GPUs, forward: a Triton kernel, one program for every block of queries of every head.

Blocks with the most keys start first, the heads of a block side by side. A block takes the tiles that not every query
sees whole (the diagonal, the window's edge) first, by the exact online softmax: that fixes a reference m for each row
and leaves l >= 1, since the row's maximum over those keys counts 1. The tiles after it need neither a maximum nor a
rescaling: weights 2^(x - m), summed in float32.
Nothing is lost by that: what falls below 2^-126 of l vanishes beside it, and as long as l stays below 2^100 no weight
was too large for float32 or bfloat16, whose relative precision is the same at every size. A row whose l passes 2^100,
or whose l or output is not finite, is done again by the exact online softmax, in the same program; the rows beside it
keep what they have.
bfloat16 weights have float32's range; float16 ones end at 2^16 and lose bits below 2^-14, so that no reference but the
running maximum serves them, and float32 inputs are for those who want the last bit: both take the running maximum
throughout, and are done again only where inputs are not finite.
A value that is not finite reaches only the queries that see it: 0 stands for it in tiles that not every query sees
whole, and it is added to the output afterwards.

Compiled for sm_80 to sm_120 and run through Triton's interpreter; not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from audiokernels._triton import Launch, is_wide, strides
from audiokernels.causal_attention import causal_attention_ref, lse_like, output_like
from audiokernels.causal_attention_plan import REFERENCE, SM90, Plan, Tile, plan_of

LOG2_E = 1.4426950408889634
LARGEST_TILE = (256, 256)
"""Rows and columns."""

# Four times 2^x for x in [-100, 128], two of eight elements by range reduction in float32 and a cubic in bfloat16, the
# others by the exponential unit: at headdim 16 that unit is the bottleneck. The exponent is added to the bits of a
# value near 2^-100. The clamps keep NaN, make x >= 128 inf (or nearly so: above 2^100) and x < -100 2^-100.
_EXP2 = """
{
.reg .f32 a0, a1, r0, r1, e<6>;
.reg .b32 f, p, i;
max.NaN.f32 a0, $4, 0fC2C80000;
max.NaN.f32 a1, $5, 0fC2C80000;
min.NaN.f32 a0, a0, 0f43000000;
min.NaN.f32 a1, a1, 0f43000000;
add.rn.f32 r0, a0, 0f4B400064;
add.rn.f32 r1, a1, 0f4B400064;
sub.rn.f32 e0, r0, 0f4B400064;
sub.rn.f32 e1, r1, 0f4B400064;
sub.rn.f32 a0, a0, e0;
sub.rn.f32 a1, a1, e1;
cvt.rn.bf16x2.f32 f, a1, a0;
mov.b32 p, 0x0B630B63;
mov.b32 i, 0x0C760C76;
fma.rn.bf16x2 p, p, f, i;
mov.b32 i, 0x0D310D31;
fma.rn.bf16x2 p, p, f, i;
mov.b32 i, 0x0D800D80;
fma.rn.bf16x2 p, p, f, i;
mov.b32 f, r0;
mov.b32 i, r1;
prmt.b32 i, f, i, 0x5410;
mad.lo.u32 $0, i, 128, p;
ex2.approx.ftz.f32 e0, $6;
ex2.approx.ftz.f32 e1, $7;
ex2.approx.ftz.f32 e2, $8;
ex2.approx.ftz.f32 e3, $9;
ex2.approx.ftz.f32 e4, $10;
ex2.approx.ftz.f32 e5, $11;
cvt.rn.bf16x2.f32 $1, e1, e0;
cvt.rn.bf16x2.f32 $2, e3, e2;
cvt.rn.bf16x2.f32 $3, e5, e4;
}
"""
EXP2: tl.constexpr = tl.constexpr(_EXP2)


# ---- parts that the backward and the decode kernels use as well


@triton.jit
def row_offset(row, stride, base):
    """base + row * stride in 64 bits: a tensor may have more than 2^31 elements."""
    return base + tl.cast(row, tl.int64) * stride


@triton.jit
def load_tile(
    base, row, end, stride_row, stride_col, headdim,
    BLOCK: tl.constexpr, HEADDIM: tl.constexpr, BOUNDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(BLOCK, HEADDIM) elements from `row` on, zeros past `headdim` and, if BOUNDED, from row `end` on."""
    i, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, HEADDIM)[None, :]
    if WIDE:  # a tile alone spans 2^31 elements
        i, d = i.to(tl.int64), d.to(tl.int64)
    pointers = row_offset(row, stride_row, base) + (i * stride_row + d * stride_col)
    if headdim == HEADDIM:
        tile = tl.load(pointers, mask=row + i < end, other=0.0) if BOUNDED else tl.load(pointers)
    elif BOUNDED:
        tile = tl.load(pointers, mask=(row + i < end) & (d < headdim), other=0.0)
    else:
        tile = tl.load(pointers, mask=d < headdim, other=0.0)
    return tile


@triton.jit
def store_tile(
    base, row, end, stride_row, stride_col, headdim, tile,
    BLOCK: tl.constexpr, HEADDIM: tl.constexpr, WIDE: tl.constexpr, chosen=None,
):  # fmt: skip
    """Store what load_tile would load, of the `chosen` rows if they are given."""
    i, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, HEADDIM)[None, :]
    if WIDE:
        i, d = i.to(tl.int64), d.to(tl.int64)
    pointers = row_offset(row, stride_row, base) + (i * stride_row + d * stride_col)
    mask = (row + i < end) & (d < headdim)
    if chosen is not None:
        mask = mask & chosen[:, None]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(base, row, end, stride_row, stride_col, column, headdim, BLOCK: tl.constexpr):
    """Like load_tile, but only the 16 columns from `column` on."""
    i, d = tl.arange(0, BLOCK)[:, None], column + tl.arange(0, 16)[None, :]
    pointers = row_offset(row, stride_row, base) + i.to(tl.int64) * stride_row + d.to(tl.int64) * stride_col
    return tl.load(pointers, mask=(row + i < end) & (d < headdim), other=0.0)


@triton.jit
def add_columns(base, row, end, stride_row, stride_col, column, headdim, tile, BLOCK: tl.constexpr):
    """Add `tile` to what load_columns would load."""
    i, d = tl.arange(0, BLOCK)[:, None], column + tl.arange(0, 16)[None, :]
    pointers = row_offset(row, stride_row, base) + i.to(tl.int64) * stride_row + d.to(tl.int64) * stride_col
    mask = (row + i < end) & (d < headdim)
    tl.store(pointers, (tl.load(pointers, mask=mask, other=0.0) + tile).to(base.dtype.element_ty), mask=mask)


@triton.jit
def any_of(flags):
    """Whether any of a block of booleans is set, as a scalar."""
    return tl.max(flags.to(tl.int32)) > 0


@triton.jit
def finite(values):
    """The values, 0 in the place of those that are not finite."""
    return tl.where(tl.abs(values.to(tl.float32)) < float("inf"), values, tl.zeros_like(values))


@triton.jit
def add_not_finite(acc, seen, values):
    """acc with the inf, -inf or NaN that each row sees: seen @ values, were it only these that count."""
    wide = values.to(tl.float32)
    if any_of(~(tl.abs(wide) < float("inf"))):
        # three counts of up to 128 side by side in one number: 2^-8 for inf, 1 for -inf, 2^8 for NaN
        code = tl.where(wide == float("inf"), 0.00390625, tl.where(wide == float("-inf"), 1.0, 0.0))
        code = tl.where(wide != wide, 256.0, code)
        counts = tl.dot(seen.to(tl.float16), code.to(tl.float16))
        nan = counts >= 256.0
        counts -= tl.floor(counts * 0.00390625) * 256.0
        above, below = counts > tl.floor(counts), counts >= 1.0
        acc += tl.where(nan | (above & below), float("nan"), tl.where(above, float("inf"), 0.0))
        acc -= tl.where(below, float("inf"), 0.0)
    return acc


@triton.jit
def online_softmax(scores, m, norm):
    """One step of the online softmax over (rows, keys) scores in log2 units: weights, m, norm, rescaling."""
    m_new = tl.maximum(m, tl.max(scores, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: weights 0, not NaN
    weights = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(m - base)
    return weights, m_new, norm * rescale + tl.sum(weights, 1), rescale


# ---- forward


@triton.jit
def seen_keys(start, position, window, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr):
    """(rows, keys): which of the keys from `start` on each row sees."""
    key = start + tl.arange(0, BLOCK_N)[None, :]
    seen = key <= position[:, None]
    if WINDOWED:
        seen = seen & (key > position[:, None] - window)
    return seen


@triton.jit
def exact_tiles(
    query, m, norm, acc, k, v, k_stride, k_dim, v_stride, v_dim,
    position, window, end, headdim, scale, n_first, first, second, count,
    BLOCK_N: tl.constexpr, HEADDIM: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Masked tiles with a running maximum: n_first tiles from key `first` on, then from `second` on, `count` in all.

    Values that are not finite count as 0; not 0 in the last result where there were any.
    """
    spoiled = tl.zeros([BLOCK_N], tl.int32)
    for i in tl.range(0, count, num_stages=1):
        start = tl.where(i < n_first, first + i * BLOCK_N, second + (i - n_first) * BLOCK_N)
        keys = load_tile(k, start, end, k_stride, k_dim, headdim, BLOCK_N, HEADDIM, True, WIDE)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        seen = seen_keys(start, position, window, BLOCK_N, WINDOWED)
        weights, m, norm, rescale = online_softmax(tl.where(seen, scores, float("-inf")), m, norm)
        values = load_tile(v, start, end, v_stride, v_dim, headdim, BLOCK_N, HEADDIM, True, WIDE)
        spoiled |= tl.max((~(tl.abs(values.to(tl.float32)) < float("inf"))).to(tl.int32), 1)
        acc = tl.dot(weights.to(values.dtype), finite(values), acc * rescale[:, None], input_precision=PRECISION)
    return m, norm, acc, spoiled


@triton.jit
def exp2_packed(x):
    """2^x as bfloat16, one of four pairs through the polynomial."""
    return tl.inline_asm_elementwise(  # & (early clobber): results are written before the last operand is read
        EXP2, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=8
    )  # fmt: skip


@triton.jit(do_not_specialize=["nheads", "group", "heads", "seqlen_q", "seqlen_k", "window"])
def forward_kernel(
    q, k, v, out, lse,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim,
    v_batch, v_head, v_row, v_dim, o_batch, o_head, o_row, o_dim,
    nheads, group, heads, seqlen_q, seqlen_k, window, scale,
    headdim: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, OPTIMISTIC: tl.constexpr, POLYNOMIAL: tl.constexpr, ONES: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, REDO: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries of one head. `heads` = batch * nheads; `scale` is in log2 units."""
    pid = tl.program_id(0)
    row = (tl.cdiv(seqlen_q, BLOCK_M) - 1 - pid // heads) * BLOCK_M
    batch_head = pid % heads
    b, h = batch_head // nheads, batch_head % nheads
    q = row_offset(h, q_head, row_offset(b, q_batch, q))
    k = row_offset(h // group, k_head, row_offset(b, k_batch, k))
    v = row_offset(h // group, v_head, row_offset(b, v_batch, v))

    first = row + seqlen_k - seqlen_q  # positions of the block's first and last query
    last = tl.minimum(row + BLOCK_M, seqlen_q) - 1 + seqlen_k - seqlen_q
    position = tl.minimum(first + tl.arange(0, BLOCK_M), last)  # rows of padding: copies of the last, with q = 0
    diagonal = first // BLOCK_N * BLOCK_N  # from this key on tiles are masked; every query sees itself there
    begin, full = 0, 0  # the first tile, the first that every query sees whole
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        full = tl.minimum(tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N, diagonal)
    EDGE: tl.constexpr = min(BLOCK_N, 64)  # masked tiles: fewer keys, so that less is computed in vain
    n_diagonal = tl.cdiv(last + 1 - diagonal, EDGE)
    n_edge = (full - begin) // EDGE

    query = load_tile(q, row, seqlen_q, q_row, q_dim, headdim, BLOCK_M, HEADDIM, True, WIDE)
    query = tl.where(scale < 0, -query, query)  # so that the largest product is the largest score
    scale = tl.abs(scale)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEADDIM], tl.float32)
    m, norm, acc, spoiled = exact_tiles(
        query, m, norm, acc, k, v, k_row, k_dim, v_row, v_dim,
        position, window, last + 1, headdim, scale, n_diagonal, diagonal, begin, n_diagonal + n_edge,
        EDGE, HEADDIM, WINDOWED, PRECISION, WIDE,
    )  # fmt: skip

    ones = tl.full([BLOCK_N, 16], 1.0, v.dtype.element_ty)
    sums = tl.zeros([BLOCK_M, 16], tl.float32)
    for start in tl.range(full, diagonal, BLOCK_N):
        keys = load_tile(k, start, seqlen_k, k_row, k_dim, headdim, BLOCK_N, HEADDIM, False, WIDE)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if OPTIMISTIC:
            x = scores * scale - m[:, None]
            weights = exp2_packed(x) if POLYNOMIAL else tl.exp2(x)
        else:
            m_new = tl.maximum(m, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - m_new[:, None])
            rescale = tl.exp2(m - m_new)
            m, norm, acc = m_new, norm * rescale, acc * rescale[:, None]
        narrow = weights.to(v.dtype.element_ty)
        if ONES:
            sums = tl.dot(narrow, ones, sums)
        else:
            norm += tl.sum(weights, 1)
        values = load_tile(v, start, seqlen_k, v_row, v_dim, headdim, BLOCK_N, HEADDIM, False, WIDE)
        acc = tl.dot(narrow, values, acc, input_precision=PRECISION)
    if ONES:
        norm += tl.sum(sums, 1) * 0.0625

    out = row_offset(h, o_head, row_offset(b, o_batch, out))
    rows = row + tl.arange(0, BLOCK_M)
    lse = row_offset(batch_head, seqlen_q, lse)
    store_tile(out, row, seqlen_q, o_row, o_dim, headdim, acc / norm[:, None], BLOCK_M, HEADDIM, WIDE)
    tl.store(lse + rows, (m + tl.log2(norm)) * 0.6931471805599453, mask=rows < seqlen_q)

    if REDO:  # keys of a tile, few so that what is rarely run costs the loop above no registers
        wrong = ~(norm < 1.2676506e30) | (tl.max((~(tl.abs(acc) < float("inf"))).to(tl.int32), 1) > 0)  # 2^100
        if any_of(wrong) | any_of(spoiled):
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            norm = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, HEADDIM], tl.float32)
            count = tl.cdiv(last + 1 - begin, REDO)
            m, norm, acc, _ = exact_tiles(
                query, m, norm, acc, k, v, k_row, k_dim, v_row, v_dim,
                position, window, last + 1, headdim, scale, count, begin, begin, count,
                REDO, HEADDIM, WINDOWED, PRECISION, WIDE,
            )  # fmt: skip
            store_tile(out, row, seqlen_q, o_row, o_dim, headdim, acc / norm[:, None], BLOCK_M, HEADDIM, WIDE, wrong)
            tl.store(lse + rows, (m + tl.log2(norm)) * 0.6931471805599453, mask=(rows < seqlen_q) & wrong)
            tl.debug_barrier()  # other threads of the block stored what this one adds to
            for column in tl.range(0, headdim, 16):
                total = tl.zeros([BLOCK_M, 16], tl.float32)
                for start in tl.range(begin, last + 1, 16, num_stages=1):
                    seen = seen_keys(start, position, window, 16, WINDOWED)
                    values = load_columns(v, start, last + 1, v_row, v_dim, column, headdim, 16)
                    total = add_not_finite(total, seen, values)
                add_columns(out, row, seqlen_q, o_row, o_dim, column, headdim, total, BLOCK_M)


# ---- launching


def interpreted() -> bool:
    """Triton's interpreter knows neither inline assembly nor the split precisions: kernels do without them there."""
    return triton.knobs.runtime.interpret


def launch_options(tile: Tile) -> dict[str, int]:
    """What the compiler is told about a tile."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return {**options, "maxnreg": tile.maxnreg} if tile.maxnreg else options


def forward_launch(plan: Plan, q: Tensor, k: Tensor, v: Tensor, results: tuple[Tensor, Tensor], scale: float) -> Launch:
    """The launch of causal_attention's kernel into results = (out, lse)."""
    (out, lse), tile = results, plan.tile
    (batch, nheads, seqlen_q, headdim), (_, nheads_kv, seqlen_k, _) = q.shape, k.shape
    arguments = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    for prefix, x in (("q", q), ("k", k), ("v", v), ("o", out)):
        arguments.update(strides(prefix, x))
    sizes = {"nheads": nheads, "group": nheads // nheads_kv, "heads": batch * nheads}
    arguments.update(sizes, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=plan.window, scale=scale * LOG2_E)
    constants = {
        "headdim": headdim,
        "HEADDIM": plan.headdim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "WINDOWED": plan.window < seqlen_k,
        "OPTIMISTIC": plan.optimistic,
        "POLYNOMIAL": tile.polynomial and not interpreted(),
        "ONES": tile.ones,
        "PRECISION": "ieee" if interpreted() else plan.precision,
        "WIDE": is_wide(*LARGEST_TILE, q, k, v, out),
        "REDO": 32 if plan.headdim < 128 else 16,
    }
    grid = (triton.cdiv(seqlen_q, tile.block_m) * batch * nheads,)
    return Launch(forward_kernel, grid, arguments, constants, launch_options(tile))


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The op causal_attention on the device of q."""
    plan = plan_of(q, k, v, window)
    if plan.kernel == REFERENCE:
        return causal_attention_ref(q, k, v, scale=scale, window=window)
    out, lse = output_like(q), lse_like(q)
    if out.numel():
        scale = q.shape[3] ** -0.5 if scale is None else scale
        if plan.kernel == SM90:
            torch.ops.audiokernels._causal_attention_sm90(q, k, v, out, lse, scale * LOG2_E, plan.window)
        else:
            forward_launch(plan, q, k, v, (out, lse), scale).run(q)
    return out, lse

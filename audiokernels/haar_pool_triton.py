"""Haar pooling on NVIDIA GPUs: Triton kernels, one program for every tile of time and channels.

A tile is read once. Block mode adds neighbours up a tree, to the highest level of the tile's channels, and hands each
channel's level down again: channels of level 0 are copied. Causal mode splits a window where a block of its length
begins: the sums up to each step within its block, and the sums from each step on within the block before, both scans
that start anew at block edges; the latter are taken of the tile moved back by 2^level - 1 steps, which lies in the
caches. Backward it is the same with time reversed. Levels beyond a tile add whole tiles' sums, of a launch before.

In a tile of block mode 8 neighbouring steps (of 16 bits: 4) lie in one thread: the lowest levels are additions of
registers. In place, tiles of level 0 alone are neither read nor written.

Compiled for sm_80 to sm_120 and run through Triton's interpreter; not yet run on a GPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from audiokernels._triton import Launch, is_wide, strides
from audiokernels.haar_pool import haar_pool__ref, haar_pool_ref, refused_by_triton
from audiokernels.haar_pool_update import haar_pool_update_ref, state_slots
from audiokernels.haar_tiles import (
    Part,
    encoded,
    first_channel,
    inner_first,
    level_of,
    levels_of,
    log2_tile,
    pair_sums,
    parts,
    place,
    twice,
)

LOG_TILE = {False: 8, True: 7}
"""{causal: log2 of a tile's steps}: 256 hold all levels of the dyadic plan up to 512 channels but the whole sequence's;
causal mode, which keeps two tiles and their scans in registers, would spill."""
LOG_INNER = {2: 2, 4: 3}
"""{bytes of an element: log2 of the first axis}: what 8 warps leave of a tile once they cover its channels."""
BLOCK = 32  # channels of a tile: rows of 64 bytes in 16 bits; with 128 a tile takes 230 registers a thread


# ---- whole tiles' sums, for levels beyond a tile


@triton.jit
def weighted_rows(
    x, first, shift, level, mask, x_row, seqlen, ROWS: tl.constexpr, COUNT: tl.constexpr, ADJOINT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """float32 (ROWS, channels): the steps from `first` - `shift` on, in the direction of summing; x points at channels.

    Adjoint: from the end backwards; norm "count" then weighs them by 1 / w.
    """
    i = tl.arange(0, ROWS)[:, None]
    before = tl.minimum(tl.maximum(shift - first, 0), ROWS).to(tl.int32)
    left = seqlen - first + shift
    row = x_row
    if ADJOINT:
        row = -x_row
        x += (seqlen - 1).to(tl.int64) * x_row
    inside = mask & (i >= before[None, :]) & (i < tl.minimum(left, ROWS).to(tl.int32)[None, :])
    there = tl.maximum(left.to(tl.float32)[None, :] - i, 1.0)
    if WIDE:
        i = i.to(tl.int64)
    pointers = (x + (first - shift) * row)[None, :] + i * row
    values = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if COUNT and ADJOINT:
        values /= tl.minimum(there, block_of(level).to(tl.float32)[None, :])
    return values


@triton.jit
def block_of(level):
    """2^level, at most 2^40."""
    return tl.full(level.shape, 1, tl.int64) << tl.minimum(level, 40).to(tl.int64)


@triton.jit(do_not_specialize=["seqlen", "tiles", "long_first", "long_count"])
def sums_kernel(
    x, sums, runs, x_batch, x_row, x_dim, seqlen, dim, tiles, long_first, long_count,
    LOG_T: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, ADJOINT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """sums (batch, tiles, long_count): the sum of every tile, for channels from long_first on."""
    b, k, at = place(long_count, tiles, BLOCK)
    c = (long_first + at).to(tl.int64)
    level = levels_of(c, dim, runs)
    mask = ((at < long_count) & (level > LOG_T))[None, :]
    none = tl.zeros_like(c)
    x += b * x_batch + c * x_dim
    values = weighted_rows(x, k << LOG_T, none, level, mask, x_row, seqlen, 1 << LOG_T, COUNT, ADJOINT, WIDE)
    tl.store(sums + (b * tiles + k) * long_count + at, tl.sum(values, axis=0), mask=at < long_count)


@triton.jit
def tile_range(sums, b, c, low, high, tiles, long_first, long_count, BLOCK: tl.constexpr):
    """For each channel the sum of its tiles' sums from tile `low` to before `high`, always in the same order."""
    total = tl.zeros([BLOCK], tl.float32)
    longest = tl.max(high - low)
    j = tl.arange(0, 16).to(tl.int64)[:, None]
    for start in tl.range(0, longest, 16):
        k = low[None, :] + start + j
        pointers = sums + (b * tiles + k) * long_count + (c - long_first)[None, :]
        total += tl.sum(tl.load(pointers, mask=k < high[None, :], other=0.0), axis=0)
    return total


# ---- block mode


@triton.jit
def share_of(count, LEVEL: tl.constexpr):
    """1 / count, to the bit where it is a whole block's: x / y in Triton may be two bits off, whatever y."""
    return tl.where(count == 1 << LEVEL, 1.0 / (1 << LEVEL), 1.0 / count.to(tl.float32))


@triton.jit
def outer_tree(
    x, level, top, long_mean, left, LEVEL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Means over blocks, given the sums (ROWS, BLOCK) over 2^LEVEL steps; for levels up to LEVEL those of LEVEL.

    `left` of the tile's steps are there.
    """
    count = tl.minimum(tl.maximum(left - tl.arange(0, ROWS) * (1 << LEVEL), 1), 1 << LEVEL)
    mean = x * share_of(count, LEVEL)[:, None]
    if ROWS == 1:
        mean = tl.where(level[None, :] > LEVEL, long_mean[None, :], mean)
    else:
        if top > LEVEL:
            sums = pair_sums(x, ROWS, BLOCK)
            above = outer_tree(sums, level, top, long_mean, left, LEVEL + 1, ROWS // 2, BLOCK)
            mean = tl.where(level[None, :] > LEVEL, twice(above, ROWS // 2, BLOCK), mean)
    return mean


@triton.jit
def inner_tree(
    x, level, top, long_mean, left,
    LEVEL: tl.constexpr, LOG_R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of (2^(LOG_R - LEVEL), ROWS, BLOCK): a block of 2^LOG_R steps is a column of the first axis."""
    N: tl.constexpr = 1 << (LOG_R - LEVEL)
    if N == 1:
        flat = tl.reshape(x, [ROWS, BLOCK])
        mean = outer_tree(flat, level, top, long_mean, left, LEVEL, ROWS, BLOCK)
        mean = tl.reshape(mean, [1, ROWS, BLOCK])
    else:
        r, o = tl.arange(0, N)[:, None, None], tl.arange(0, ROWS)[None, :, None]
        count = tl.minimum(tl.maximum(left - (o * (1 << LOG_R) + r * (1 << LEVEL)), 1), 1 << LEVEL)
        mean = x * share_of(count, LEVEL) if LEVEL > 0 else x
        if top > LEVEL:
            sums = tl.sum(tl.reshape(x, [N // 2, 2, ROWS, BLOCK]), axis=1)
            above = inner_tree(sums, level, top, long_mean, left, LEVEL + 1, LOG_R, ROWS, BLOCK)
            both = tl.broadcast_to(tl.reshape(above, [N // 2, 1, ROWS, BLOCK]), [N // 2, 2, ROWS, BLOCK])
            mean = tl.where(level[None, None, :] > LEVEL, tl.reshape(both, [N, ROWS, BLOCK]), mean)
    return mean


@triton.jit(do_not_specialize=["seqlen", "tiles", "long_first", "long_count"])
def block_kernel(
    x, out, sums, runs, x_batch, x_row, x_dim, o_batch, o_row, o_dim,
    seqlen, dim, tiles, long_first, long_count,
    LOG_T: tl.constexpr, LOG_R: tl.constexpr, BLOCK: tl.constexpr, INPLACE: tl.constexpr, LONG: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Means over blocks of one tile of 2^LOG_T steps and BLOCK channels."""
    b, k, c = place(dim, tiles, BLOCK)
    level = levels_of(c, dim, runs)
    top = tl.max(level)
    least = 1 if INPLACE else 0
    if top >= least:
        start = k << LOG_T
        ROWS: tl.constexpr = 1 << (LOG_T - LOG_R)
        i, d = inner_first(LOG_R, ROWS)[:, None], c[None, :]
        left = tl.minimum(seqlen - start, 1 << LOG_T).to(tl.int32)
        mask = (i < left) & (d < dim)
        if WIDE:
            i, d = i.to(tl.int64), d.to(tl.int64)
        tile = tl.load(x + (b * x_batch + start * x_row) + (i * x_row + d * x_dim), mask=mask, other=0.0)
        long_mean = tl.zeros([BLOCK], tl.float32)
        if LONG:  # noqa: SIM102 (a constant, and a scalar of the device)
            if top > LOG_T:
                block = tl.minimum(block_of(level), tiles.to(tl.int64) << LOG_T)
                # blocks beyond the sequence need not be a power of two of tiles: they begin at 0
                span = tl.maximum(block >> LOG_T, 1)
                low = tl.where(block_of(level) >= seqlen, 0, (k // span) * span)
                high = tl.minimum(low + span, tiles)
                high = tl.where(level > LOG_T, high, low)
                total = tile_range(sums, b, c.to(tl.int64), low, high, tiles, long_first, long_count, BLOCK)
                count = tl.maximum(tl.minimum(seqlen - (low << LOG_T), block), 1)
                long_mean = total / count.to(tl.float32)
        wide = tl.reshape(tile.to(tl.float32), [1 << LOG_R, ROWS, BLOCK])
        mean = inner_tree(wide, level, top, long_mean, left, 0, LOG_R, ROWS, BLOCK)
        mean = tl.reshape(mean, [ROWS << LOG_R, BLOCK])
        tl.store(out + (b * o_batch + start * o_row) + (i * o_row + d * o_dim), mean.to(tile.dtype), mask=mask)


# ---- causal mode


@triton.jit
def restarted(sum1, begins1, sum2, begins2):
    """Sums that start anew where a flag is set."""
    return tl.where(begins2 != 0, sum2, sum1 + sum2), begins1 | begins2


@triton.jit(do_not_specialize=["seqlen", "tiles", "long_first", "long_count"])
def causal_kernel(
    x, out, sums, runs, x_batch, x_row, x_dim, o_batch, o_row, o_dim,
    seqlen, dim, tiles, long_first, long_count,
    LOG_T: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, ADJOINT: tl.constexpr, LONG: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Causal windows of one tile of 2^LOG_T steps, counted in the direction of summing, and BLOCK channels."""
    b, k, c = place(dim, tiles, BLOCK)
    c = c.to(tl.int64)
    level = levels_of(c, dim, runs)
    top = tl.max(level)
    start = k << LOG_T
    block = block_of(level)
    x += b * x_batch + c * x_dim
    mask = (c < dim)[None, :]
    none = tl.zeros_like(c)
    ROWS: tl.constexpr = 1 << LOG_T
    y = weighted_rows(x, start, none, level, mask, x_row, seqlen, ROWS, COUNT, ADJOINT, WIDE)
    i = tl.arange(0, ROWS)[:, None]
    if top > 0:
        inner = tl.minimum(block, ROWS).to(tl.int32)[None, :]
        phase = i & (inner - 1)
        # what the window holds of the block before: moved back, it begins at phase 1 and ends with its block
        before = mask & (phase != inner - 1) & (level < 41)[None, :]
        y, _ = tl.associative_scan((y, (phase == 0).to(tl.int32)), 0, restarted)
        rest = weighted_rows(x, start, block - 1, level, before, x_row, seqlen, ROWS, COUNT, ADJOINT, WIDE)
        rest, _ = tl.associative_scan((rest, (phase == inner - 2).to(tl.int32)), 0, restarted, reverse=True)
        y += tl.where(before, rest, 0.0)
        if LONG:  # noqa: SIM102 (a constant, and a scalar of the device)
            if top > LOG_T:
                low = tl.maximum(k - (block >> LOG_T) + 1, 0)
                high = tl.where(level > LOG_T, k, low)
                y += tile_range(sums, b, c, low, high, tiles, long_first, long_count, BLOCK)[None, :]
        if not COUNT:
            share = ((127 - level) << 23).to(tl.float32, bitcast=True)  # 2^-level: exp2 is an approximation
            y *= tl.where(level == 63, tl.div_rn(1.0, seqlen.to(tl.float32)), share)[None, :]
        elif not ADJOINT:
            y /= tl.minimum((start + 1 + i).to(tl.float32), block.to(tl.float32)[None, :])
    row = o_row
    if ADJOINT:
        row = -o_row
        out += (seqlen - 1).to(tl.int64) * o_row
    inside = mask & (i < tl.minimum(seqlen - start, ROWS).to(tl.int32))
    if WIDE:
        i = i.to(tl.int64)
    pointers = (out + b * o_batch + c * o_dim + start * row)[None, :] + i * row
    tl.store(pointers, y.to(out.dtype.element_ty), mask=inside)


# ---- one step


@triton.jit(do_not_specialize=["seqlen"])
def update_kernel(
    x, state, position, out, runs, x_batch, x_dim, s_batch, s_slot, p_batch, o_batch, dim, seqlen,
    BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A step of BLOCK channels of one sequence: haar_pool_update.py tells the state's layout."""
    groups = tl.cdiv(dim, BLOCK)
    b = (tl.program_id(0) // groups).to(tl.int64)
    c = ((tl.program_id(0) % groups) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    level = tl.zeros([BLOCK], tl.int32)
    base, first, count = tl.zeros_like(c), tl.zeros_like(c), tl.zeros_like(c)
    slots = tl.zeros([], tl.int64)
    every = slots + dim
    for i in tl.static_range(16):  # of each channel: its run's level, first channel, count and place in the state
        begin = tl.minimum(first_channel(runs[i]), every)
        end = every
        if i + 1 < 16:
            end = tl.minimum(first_channel(runs[i + 1]), end)
        run_level = level_of(runs[i])
        mine = c >= begin
        level, base = tl.where(mine, run_level, level), tl.where(mine, slots, base)
        first, count = tl.where(mine, begin, first), tl.where(mine, end - begin, count)
        rows = tl.where(run_level == 63, 2, (1 + (tl.full([], 1, tl.int64) << tl.minimum(run_level, 40).to(tl.int64))))
        slots += tl.where(run_level == 0, 0, rows) * (end - begin)
    mask = c < dim
    slow = mask & (level > 0)
    ringed = slow & (level < 63)
    block = block_of(level)
    steps = tl.load(position + b * p_batch).to(tl.int64)
    phase = tl.where(level == 63, steps, steps & (block - 1))
    value = tl.load(x + b * x_batch + c * x_dim, mask=mask, other=0.0).to(tl.float32)
    ring = state + b * s_batch + (base + c - first) * s_slot
    stride = count * s_slot

    high = tl.load(ring, mask=slow & (phase != 0), other=0.0)
    low = tl.load(ring + stride, mask=slow & (phase != 0), other=0.0)
    total = high + value
    part = total - high
    lost = (high - (total - part)) + (value - part)
    low += tl.where(lost == lost, lost, 0.0)
    last = ringed & (phase == block - 1)
    rest = tl.load(ring + (phase + 2) * stride, mask=ringed & (phase != block - 1), other=0.0)
    tl.store(ring, total, mask=slow)
    tl.store(ring + stride, low, mask=slow)
    tl.store(ring + (phase + 1) * stride, value, mask=ringed & (phase != 0))
    if COUNT:
        width = tl.minimum(steps + 1, block).to(tl.float32)
    else:
        width = tl.where(level == 63, seqlen.to(tl.float32), block.to(tl.float32))
    y = tl.where(slow, tl.div_rn((total + rest) + low, width), value)
    tl.store(out + b * o_batch + c, y.to(out.dtype.element_ty), mask=mask)

    longest = tl.max(tl.where(last, block, 1))  # blocks that end: sums from the end, slots 1 .. block - 1
    carry = tl.zeros([BLOCK], tl.float32)
    j = tl.arange(0, 16).to(tl.int64)[:, None]
    for back in tl.range(0, longest - 1, 16):
        slot = block[None, :] - 16 - back + j
        inside = last[None, :] & (slot >= 1)
        pointers = ring[None, :] + (slot + 1) * stride[None, :]
        old = tl.load(pointers, mask=inside & (slot < block[None, :] - 1), other=0.0)
        values = tl.where(slot == block[None, :] - 1, value[None, :], old)  # its store above need not be seen here
        sums = tl.cumsum(values, axis=0, reverse=True) + carry[None, :]
        tl.store(pointers, sums, mask=inside)
        carry += tl.sum(values, axis=0)


# ---- launching


def pool_launches(
    x: Tensor, out: Tensor, part: Part, causal: bool = False, count: bool = False, adjoint: bool = False
) -> list[Launch]:
    """The launches of haar_pool on the channels of one part: one, or two where a level is beyond a tile."""
    batch, seqlen, dim = x.shape
    count, adjoint = count and causal, adjoint and causal  # block mode is its own transpose
    log_tile = log2_tile(seqlen, LOG_TILE[causal])
    runs = part.runs
    if not causal and seqlen <= 1 << log_tile:  # the whole sequence is one block of the tile
        runs = [(log_tile if level < 0 else min(level, log_tile), first, n) for level, first, n in runs]
    tiles = triton.cdiv(seqlen, 1 << log_tile)
    far = [(first, first + n) for level, first, n in runs if not 0 <= level <= log_tile] if tiles > 1 else []
    begin, end = (min(a for a, _ in far), max(b for _, b in far)) if far else (0, 0)
    block = min(BLOCK, triton.next_power_of_2(dim))
    sums = x.new_empty((batch, tiles, end - begin), dtype=torch.float32)
    sizes = {"seqlen": seqlen, "dim": dim, "tiles": tiles, "long_first": begin, "long_count": end - begin}
    wide = is_wide(1 << log_tile, dim, x, out)  # tiles count from channel 0
    shared = {"x": x, "sums": sums, "runs": encoded(runs), **strides("x", x), **sizes}
    launches = []
    if far:
        narrow = min(block, max(32 // x.element_size(), triton.next_power_of_2(end - begin)))
        constants = {"LOG_T": log_tile, "BLOCK": narrow, "COUNT": count, "ADJOINT": adjoint, "WIDE": wide}
        grid = (triton.cdiv(end - begin, narrow) * tiles * batch,)
        launches.append(Launch(sums_kernel, grid, shared, constants, {"num_warps": 4}))
    constants = {"LOG_T": log_tile, "BLOCK": block, "LONG": bool(far), "WIDE": wide}
    if causal:
        constants.update(COUNT=count, ADJOINT=adjoint)
    else:
        constants.update(LOG_R=LOG_INNER[x.element_size()], INPLACE=x is out)
    grid = (triton.cdiv(dim, block) * tiles * batch,)
    arguments = {**shared, "out": out, **strides("o", out)}
    kernel = causal_kernel if causal else block_kernel
    return [*launches, Launch(kernel, grid, arguments, constants, {"num_warps": 8})]


def haar_pool(
    x: Tensor, runs: Sequence[int], *, causal: bool = False, count: bool = False, adjoint: bool = False
) -> Tensor:
    """The op haar_pool on the device of x."""
    if refused_by_triton(x):
        return haar_pool_ref(x, runs, causal=causal, count=count, adjoint=adjoint)
    out = x.new_empty(x.shape)
    if x.numel():
        for part in parts(runs):
            of_part = (x[:, :, part.channels], out[:, :, part.channels])
            for launch in pool_launches(*of_part, part, causal, count, adjoint):
                launch.run(x)
    return out


def haar_pool_(x: Tensor, runs: Sequence[int], *, causal: bool = False, count: bool = False) -> None:
    """The op haar_pool_ on the device of x."""
    if refused_by_triton(x):
        haar_pool__ref(x, runs, causal=causal, count=count)
    elif causal:  # windows reach into other tiles
        x.copy_(haar_pool(x, runs, causal=True, count=count))
    elif x.numel():
        for part in parts(runs):
            of_part = x[:, :, part.channels]
            for launch in pool_launches(of_part, of_part, part):
                launch.run(x)


def haar_pool_update(
    x: Tensor, state: Tensor, position: Tensor, runs: Sequence[int], *, count: bool = False, seqlen: int = 0
) -> Tensor:
    """The op haar_pool_update on the device of x."""
    if refused_by_triton(x):
        return haar_pool_update_ref(x, state, position, runs, count=count, seqlen=seqlen)
    out, slot = x.new_empty(x.shape), 0
    for part in parts(runs) if x.numel() else ():
        slots = state_slots([number for level, _, n in part.runs for number in (level, n)])
        update_launch(
            x[:, part.channels], state[:, slot : slot + slots], position, out[:, part.channels], part, count, seqlen
        ).run(x)
        slot += slots
    return out


def update_launch(
    x: Tensor, state: Tensor, position: Tensor, out: Tensor, part: Part, count: bool, seqlen: int
) -> Launch:
    """The launch of haar_pool_update on the channels of one part."""
    batch, dim = x.shape
    block = min(BLOCK, triton.next_power_of_2(dim))
    arguments = {"x": x, "state": state, "position": position, "out": out, "runs": encoded(part.runs)}
    arguments.update(x_batch=x.stride(0), x_dim=x.stride(1), s_batch=state.stride(0), s_slot=state.stride(1))
    arguments.update(p_batch=position.stride(0), o_batch=out.stride(0), dim=dim, seqlen=seqlen)
    grid = (triton.cdiv(dim, block) * batch,)
    return Launch(update_kernel, grid, arguments, {"BLOCK": block, "COUNT": count}, {"num_warps": 1})

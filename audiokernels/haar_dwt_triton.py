"""The Haar wavelet transform on NVIDIA GPUs: Triton kernels, one program for every tile of time and channels.

A tile of up to 256 steps goes through up to 8 levels in registers, the lowest three between registers of one thread;
each level's differences are stored where the packed layout wants them. Beyond 8 levels the sums go to a float32 scratch
1/256 as long, and on from there by another launch. The inverse is the same backwards.

Compiled for sm_80 to sm_120 and run through Triton's interpreter; not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from audiokernels._triton import Launch, strides
from audiokernels.haar_dwt import haar_dwt_ref, haar_idwt_ref
from audiokernels.haar_pool import refused_by_triton
from audiokernels.haar_tiles import BLOCK_C, inner_first, place

LOG_TILE = 8
LOG_INNER = 3
SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)


@triton.jit
def rows_of(pointer, row, end, stride, c, dim, dim_stride, tile, LOAD: tl.constexpr):
    """Load or store rows `row` of the channels c, up to row `end`."""
    pointers = pointer + (row[:, None] * stride + c[None, :] * dim_stride)
    mask = (row < end)[:, None] & (c < dim)[None, :]
    if LOAD:
        result = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        result = tile
        tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)
    return result


@triton.jit
def signs(N: tl.constexpr):
    """1 and -1 along the second of N axes."""
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
    return sign[None, :, None] if N == 3 else sign[None, :, None, None]


@triton.jit
def row_index(k, LEVEL: tl.constexpr, LOG_T: tl.constexpr, LOG_R: tl.constexpr):
    """Rows of level LEVEL of tile k, what is left of 2^LOG_R neighbours as inner_first has it."""
    ROWS: tl.constexpr = 1 << (LOG_T - max(LEVEL, LOG_R))
    return (k << (LOG_T - LEVEL)) + inner_first(max(LOG_R - LEVEL, 0), ROWS).to(tl.int64)


@triton.jit
def split_pairs(a, LEVEL: tl.constexpr, LOG_T: tl.constexpr, LOG_R: tl.constexpr, BLOCK: tl.constexpr):
    """(sums, differences) of level LEVEL + 1 of a tile's sums of level LEVEL, rows as in row_index."""
    ROWS: tl.constexpr = 1 << (LOG_T - max(LEVEL, LOG_R))
    HALF: tl.constexpr = 1 << (LOG_T - LEVEL - 1)
    if LEVEL < LOG_R:
        pairs = tl.reshape(a, [1 << (LOG_R - LEVEL - 1), 2, ROWS, BLOCK])
        sign = signs(4)
    else:
        pairs = tl.reshape(a, [ROWS // 2, 2, BLOCK])
        sign = signs(3)
    d = tl.sum(pairs * sign, axis=1) * SQRT_HALF
    a = tl.sum(pairs, axis=1) * SQRT_HALF
    return tl.reshape(a, [HALF, BLOCK]), tl.reshape(d, [HALF, BLOCK])


@triton.jit
def join_pairs(a, d, LEVEL: tl.constexpr, LOG_T: tl.constexpr, LOG_R: tl.constexpr, BLOCK: tl.constexpr):
    """split_pairs undone: sums of level LEVEL - 1 from sums and differences of level LEVEL."""
    ROWS: tl.constexpr = 1 << (LOG_T - max(LEVEL, LOG_R))
    if LEVEL <= LOG_R:
        N: tl.constexpr = 1 << (LOG_R - LEVEL)
        a, d = tl.reshape(a, [N, 1, ROWS, BLOCK]), tl.reshape(d, [N, 1, ROWS, BLOCK])
        result = tl.reshape((a + d * signs(4)) * SQRT_HALF, [2 * N * ROWS, BLOCK])
    else:
        result = tl.reshape((a[:, None, :] + d[:, None, :] * signs(3)) * SQRT_HALF, [2 * ROWS, BLOCK])
    return result


@triton.jit(do_not_specialize=["seqlen", "tiles", "padded"])
def dwt_kernel(
    x, sums, coeffs, x_batch, x_row, x_dim, s_batch, s_row, s_dim, c_batch, c_row, c_dim, seqlen, dim, tiles, padded,
    LEVELS: tl.constexpr, LOG_T: tl.constexpr, LOG_R: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Level 1 to LEVELS of one tile: sums to `sums`, differences of level l to `coeffs` from row padded / 2^l on."""
    b, k, c = place(dim, tiles, BLOCK)
    c = c.to(tl.int64)
    x += b * x_batch
    sums += b * s_batch
    coeffs += b * c_batch
    padded = padded.to(tl.int64)
    row = row_index(k, 0, LOG_T, LOG_R)
    end = seqlen.to(tl.int64)
    if EDGE:
        end = padded
        row = tl.minimum(row, seqlen.to(tl.int64) - 1)
    a = rows_of(x, row, end, x_row, c, dim, x_dim, 0, True)
    for level in tl.static_range(LEVELS):
        a, d = split_pairs(a, level, LOG_T, LOG_R, BLOCK)
        row = row_index(k, level + 1, LOG_T, LOG_R)
        end = padded >> (level + 1)
        rows_of(coeffs + end * c_row, row, end, c_row, c, dim, c_dim, d, False)
    row = row_index(k, LEVELS, LOG_T, LOG_R)
    rows_of(sums, row, padded >> LEVELS, s_row, c, dim, s_dim, a, False)


@triton.jit(do_not_specialize=["seqlen", "tiles", "padded"])
def idwt_kernel(
    x, sums, coeffs, x_batch, x_row, x_dim, s_batch, s_row, s_dim, c_batch, c_row, c_dim, seqlen, dim, tiles, padded,
    LEVELS: tl.constexpr, LOG_T: tl.constexpr, LOG_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dwt_kernel backwards: x of one tile from `sums` of level LEVELS and the differences below."""
    b, k, c = place(dim, tiles, BLOCK)
    c = c.to(tl.int64)
    x += b * x_batch
    sums += b * s_batch
    coeffs += b * c_batch
    padded = padded.to(tl.int64)
    a = rows_of(sums, row_index(k, LEVELS, LOG_T, LOG_R), padded >> LEVELS, s_row, c, dim, s_dim, 0, True)
    for i in tl.static_range(LEVELS):
        end = padded >> (LEVELS - i)
        row = row_index(k, LEVELS - i, LOG_T, LOG_R)
        d = rows_of(coeffs + end * c_row, row, end, c_row, c, dim, c_dim, 0, True)
        a = join_pairs(a, d, LEVELS - i, LOG_T, LOG_R, BLOCK)
    rows_of(x, row_index(k, 0, LOG_T, LOG_R), seqlen.to(tl.int64), x_row, c, dim, x_dim, a, False)


def _launch(kernel, levels: int, x: Tensor, sums: Tensor, coeffs: Tensor, **constants) -> Launch:
    batch, seqlen, dim = x.shape
    padded = coeffs.shape[1]
    log_tile = max(levels, min(LOG_TILE, max(4, (padded - 1).bit_length())))
    block = min(BLOCK_C[coeffs.element_size()], triton.next_power_of_2(dim))
    tiles = triton.cdiv(padded, 1 << log_tile)
    arguments = {"x": x, "sums": sums, "coeffs": coeffs}
    for prefix, tensor in (("x", x), ("s", sums), ("c", coeffs)):
        arguments.update(strides(prefix, tensor))
    arguments.update(seqlen=seqlen, dim=dim, tiles=tiles, padded=padded)
    constants.update(LEVELS=levels, LOG_T=log_tile, LOG_R=min(LOG_INNER, log_tile), BLOCK=block)
    return Launch(kernel, (triton.cdiv(dim, block) * tiles * batch,), arguments, constants, {"num_warps": 8})


def dwt_launches(x: Tensor, coeffs: Tensor, n_levels: int, edge: bool = False) -> list[Launch]:
    """The launches of haar_dwt into coeffs: one for every LOG_TILE levels."""
    here = min(n_levels, LOG_TILE)
    rows = coeffs.shape[1] >> here
    if here == n_levels:
        return [_launch(dwt_kernel, here, x, coeffs, coeffs, EDGE=edge)]
    sums = x.new_empty((x.shape[0], rows, x.shape[2]), dtype=torch.float32)
    rest = dwt_launches(sums, coeffs[:, :rows], n_levels - here)
    return [_launch(dwt_kernel, here, x, sums, coeffs, EDGE=edge), *rest]


def idwt_launches(coeffs: Tensor, x: Tensor, n_levels: int) -> list[Launch]:
    """The launches of haar_idwt into x, the slow levels first."""
    here = min(n_levels, LOG_TILE)
    rows = coeffs.shape[1] >> here
    if here == n_levels:
        return [_launch(idwt_kernel, here, x, coeffs, coeffs)]
    sums = x.new_empty((x.shape[0], rows, x.shape[2]), dtype=torch.float32)
    return [*idwt_launches(coeffs[:, :rows], sums, n_levels - here), _launch(idwt_kernel, here, x, sums, coeffs)]


def haar_dwt(x: Tensor, n_levels: int, *, edge: bool = False) -> Tensor:
    """The op haar_dwt on the device of x."""
    if refused_by_triton(x):
        return haar_dwt_ref(x, n_levels, edge=edge)
    padded = -(-x.shape[1] // (1 << n_levels)) << n_levels
    coeffs = x.new_empty(x.shape[0], padded, x.shape[2])
    for launch in dwt_launches(x, coeffs, n_levels, edge) if coeffs.numel() else ():
        launch.run(x)
    return coeffs


def haar_idwt(coeffs: Tensor, n_levels: int, *, seqlen: int | None = None) -> Tensor:
    """The op haar_idwt on the device of coeffs."""
    if refused_by_triton(coeffs):
        return haar_idwt_ref(coeffs, n_levels, seqlen=seqlen)
    x = coeffs.new_empty(coeffs.shape[0], coeffs.shape[1] if seqlen is None else seqlen, coeffs.shape[2])
    for launch in idwt_launches(coeffs, x, n_levels) if x.numel() else ():
        launch.run(coeffs)
    return x

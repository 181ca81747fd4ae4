"""What the Triton kernels of the Haar ops share: runs of levels as arguments, tiles of time and channels."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import triton
import triton.language as tl

MAX_RUNS = 16
WHOLE = 63
"""What kernels take for level -1."""
BLOCK_C = {2: 64, 4: 32}
"""{bytes of an element: channels of a tile}: rows of 128 bytes."""


class Part(NamedTuple):
    """Neighbouring channels in at most MAX_RUNS runs, (level, first channel, count): what one launch serves."""

    channels: slice
    runs: list[tuple[int, int, int]]


def parts(runs: Sequence[int]) -> Iterator[Part]:
    """Runs as in haar_levels.py, without empty ones, in parts; within a part channels are counted from its first."""
    first, members = 0, []
    for level, count in zip(runs[::2], runs[1::2], strict=True):
        if count and len(members) == MAX_RUNS:
            yield Part(slice(first, first + width(members)), members)
            first, members = first + width(members), []
        if count:
            members.append((level, width(members), count))
    if members:
        yield Part(slice(first, first + width(members)), members)


def width(runs: list[tuple[int, int, int]]) -> int:
    """Channels of a part's runs."""
    return sum(count for _, _, count in runs)


def encoded(runs: list[tuple[int, int, int]]) -> tuple[int, ...]:
    """Runs as MAX_RUNS arguments, all odd and beyond 2^32: for Triton, which compiles anew for other kinds of numbers,
    they all look the same."""
    codes = [(level if level >= 0 else WHOLE, first) for level, first, _ in runs]
    codes += [(0, 1 << 50)] * (MAX_RUNS - len(codes))  # of no channel
    return tuple(1 << 60 | first << 8 | level << 1 | 1 for level, first in codes)


def log2_tile(seqlen: int, largest: int) -> int:
    """log2 of the steps of a tile: no larger than the sequence asks for."""
    return min(largest, max(4, (seqlen - 1).bit_length()))


@triton.jit
def place(dim, tiles, BLOCK: tl.constexpr):
    """(batch row, tile, channels) of this program; neighbouring programs have neighbouring channels."""
    pid = tl.program_id(0)
    groups = tl.cdiv(dim, BLOCK)
    c = (pid % groups) * BLOCK + tl.arange(0, BLOCK)
    return (pid // groups // tiles).to(tl.int64), ((pid // groups) % tiles).to(tl.int64), c


@triton.jit
def inner_first(LOG_R: tl.constexpr, ROWS: tl.constexpr):
    """The steps of a tile's rows, of 2^LOG_R neighbours first all first ones, then all second ones ..

    A tile is loaded and stored so, in two dimensions: Triton then lays the neighbours out within a thread. Of three
    dimensions, 3.6 and 3.7 do not choose the same one.
    """
    j = tl.arange(0, ROWS << LOG_R)
    return (j % ROWS << LOG_R) + j // ROWS


@triton.jit
def first_channel(code):
    """Of an encoded run."""
    return (code & 0x0FFFFFFFFFFFFFFF) >> 8


@triton.jit
def level_of(code):
    """Of an encoded run."""
    return ((code >> 1) & 127).to(tl.int32)


@triton.jit
def levels_of(c, dim, runs):
    """The level of each channel, 0 past the last."""
    level = tl.zeros_like(c).to(tl.int32)
    for i in tl.static_range(16):
        level = tl.where(c >= first_channel(runs[i]), level_of(runs[i]), level)
    return tl.where(c < dim, level, 0)


@triton.jit
def pair_sums(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of neighbouring pairs of rows of (ROWS, COLUMNS)."""
    return tl.sum(tl.reshape(x, [ROWS // 2, 2, COLUMNS]), axis=1)


@triton.jit
def twice(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Every row of (ROWS, COLUMNS) twice."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], [ROWS, 2, COLUMNS]), [2 * ROWS, COLUMNS])

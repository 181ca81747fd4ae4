"""The Triton kernels of the Haar ops, run by Triton's interpreter: test_haar_triton.py starts this.

float32 and float16 only: bfloat16 is wrong in the interpreter without a word. It runs scans element by element, so
tiles are small here. What only a GPU can show: bfloat16, races between the programs, and everything about time.
"""

import math

import pytest
import torch

from audiokernels import haar_dwt_triton, haar_levels
from audiokernels import haar_pool_triton as room
from audiokernels.haar_dwt import haar_dwt_ref, haar_idwt_ref
from audiokernels.haar_levels import level_runs
from audiokernels.haar_pool import haar_pool_ref
from audiokernels.haar_pool_update import haar_pool_update_ref, state_slots

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy's, at inf and NaN
TOLERANCE = {torch.float32: 5e-7, torch.float16: 5e-4}
POOLS = [  # log2 of a tile's steps, (batch, seqlen), levels
    (4, (2, 1), (0, 3, -1)),
    (4, (1, 16), (0, 4, -1)),
    (4, (1, 71), (0, 1, 2, 5, -1)),
    pytest.param(4, (1, 50), (-1, 0, 6, 4), marks=pytest.mark.slow),
    pytest.param(5, (1, 40), haar_levels(7, 40), marks=pytest.mark.slow),
    (4, (1, 20), tuple(i % 3 for i in range(20))),  # more runs than a launch takes
]
MODES = [(causal, count, adjoint) for causal, count in ((0, 0), (1, 0), (1, 1)) for adjoint in (0, 1)][1:]


@pytest.fixture
def log_tile(request, monkeypatch):
    monkeypatch.setattr(room, "LOG_TILE", {False: request.param, True: request.param})


@pytest.mark.parametrize(("causal", "count", "adjoint"), MODES)
@pytest.mark.parametrize(("log_tile", "shape", "levels"), POOLS, indirect=["log_tile"])
def test_pool(log_tile, shape, levels, causal, count, adjoint):
    options = {"causal": bool(causal), "count": bool(count), "adjoint": bool(adjoint)}
    runs = level_runs(levels, len(levels), shape[1])
    x = torch.randn(*shape, len(levels))
    for dtype in (torch.float32, torch.float16) if shape[1] == 16 else (torch.float32,):
        got = room.haar_pool(x.to(dtype), runs, **options)
        want = haar_pool_ref(x.to(dtype).double(), runs, **options)
        assert got.dtype == dtype and float((got - want).abs().max()) <= TOLERANCE[dtype] * float(x.abs().max())


@pytest.mark.parametrize("seqlen", [300, 1000])
def test_block_mode_in_the_tiles_that_gpus_take(seqlen):
    for levels in (haar_levels(70, seqlen), (9, 0, -1, 8, 4)):
        runs, x = level_runs(levels, len(levels), seqlen), torch.randn(1, seqlen, len(levels))
        got = room.haar_pool(x, runs)
        torch.testing.assert_close(got.double(), haar_pool_ref(x.double(), runs), rtol=0, atol=5e-7)
        for i, level in enumerate(levels):
            for part in got[:, :, i].split(1 << level if level >= 0 else seqlen, 1):
                assert torch.equal(part, part[:, :1].expand_as(part))


@pytest.mark.parametrize("log_tile", [4], indirect=True)
def test_pool_in_place(log_tile):
    levels = (0, 1, 6, 0, -1)
    runs = level_runs(levels, 5, 45)
    for causal in (False, True):
        x = torch.randn(2, 45, 5)
        x[:, :, 3] = math.nan
        y = x.clone()
        room.haar_pool_(y, runs, causal=causal)
        torch.testing.assert_close(y, haar_pool_ref(x, runs, causal=causal), rtol=0, atol=5e-7, equal_nan=True)


@pytest.mark.parametrize("log_tile", [4], indirect=True)
@pytest.mark.parametrize(("causal", "count", "adjoint"), MODES)
def test_pool_strides_and_what_is_not_finite(log_tile, causal, count, adjoint):
    options = {"causal": bool(causal), "count": bool(count), "adjoint": bool(adjoint)}
    runs = level_runs((0, 2, 5, -1), 4, 35)
    x = torch.randn(1, 35, 4)
    x[0, 21, 1], x[0, 30, 2] = math.nan, math.inf
    want = haar_pool_ref(x, runs, **options)
    for order in ((0, 2, 1), (2, 1, 0)):
        spread = torch.full([2 * n + 1 for n in (x.shape[i] for i in order)], math.nan)
        view = spread[tuple(slice(1, None, 2) for _ in order)].permute(*(order.index(i) for i in range(3)))
        got = room.haar_pool(view.copy_(x), runs, **options)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("log_tile", [4], indirect=True)
def test_wide_offsets(log_tile):
    """64-bit offsets within a tile give the same."""
    x = torch.randn(1, 40, 4)
    for causal in (False, True):
        runs = level_runs((0, 2, 5, -1), 4, 40)
        out = torch.empty_like(x)
        part = next(room.parts(runs))
        for launch in room.pool_launches(x, out, part, causal):
            launch.constants["WIDE"] = True
            launch.run(x)
        torch.testing.assert_close(out, haar_pool_ref(x, runs, causal=causal), rtol=0, atol=5e-7)


def test_offsets_are_wide_where_a_tile_spans_2_to_the_31():
    def wide(shape, strides):
        x = torch.empty_strided(shape, strides, device="meta")
        part = next(room.parts([2, shape[2]]))
        return {launch.constants["WIDE"] for launch in room.pool_launches(x, torch.empty_like(x), part)}

    assert wide((4, 1 << 20, 512), (1 << 29, 512, 1)) == {False}
    assert wide((1, 20, 70), (1, 1, (1 << 25) - 8)) == {True}  # the last channel lies beyond
    assert wide((1, 256, 4), (1, 1 << 23, 1)) == {True}


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("levels", [(0, 1, 3, -1), (0, 1) * 9])
def test_update(levels, count):
    runs, n = level_runs(levels, len(levels), None), 10 if len(levels) == 4 else 3
    states = [torch.zeros(2, state_slots(runs)) for _ in range(2)]
    position = torch.zeros(2, dtype=torch.int32)
    for _ in range(n):
        x = torch.randn(2, len(levels))
        position[1] += 1  # the second row skips every other step
        got = room.haar_pool_update(x, states[0], position, runs, count=count, seqlen=n)
        want = haar_pool_update_ref(x, states[1], position, runs, count=count, seqlen=n)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
        position += 1
    torch.testing.assert_close(*states, rtol=0, atol=5e-6)


def test_update_where_blocks_end():
    """Rings of more slots than are summed up at a time."""
    runs = level_runs((5, 5, 6, 0, 7, -1), 6, None)
    states = [torch.randn(2, state_slots(runs), generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    position, x = torch.tensor([95, 127], dtype=torch.int32), torch.randn(2, 6)
    got = room.haar_pool_update(x, states[0], position, runs, count=True)
    torch.testing.assert_close(got, haar_pool_update_ref(x, states[1], position, runs, count=True), rtol=0, atol=1e-6)
    torch.testing.assert_close(*states, rtol=0, atol=2e-5)


@pytest.mark.parametrize("edge", [False, True])
@pytest.mark.parametrize(
    ("shape", "n_levels"),
    [((1, 1, 3), 0), ((2, 40, 4), 1), ((1, 63, 70), 3), ((1, 500, 5), 7), ((1, 600, 2), 10)],
)
def test_dwt(shape, n_levels, edge):
    x = torch.randn(shape)
    for dtype in (torch.float32, torch.float16):
        coeffs = haar_dwt_triton.haar_dwt(x.to(dtype), n_levels, edge=edge)
        want = haar_dwt_ref(x.to(dtype).double(), n_levels, edge=edge)
        scale = float(want.abs().max()) + 1
        assert coeffs.dtype == dtype and float((coeffs - want).abs().max()) <= TOLERANCE[dtype] * scale
        back = haar_dwt_triton.haar_idwt(coeffs, n_levels, seqlen=shape[1])
        want = haar_idwt_ref(coeffs.double(), n_levels, seqlen=shape[1])
        assert float((back - want).abs().max()) <= TOLERANCE[dtype] * scale


def test_dwt_strides():
    x = torch.randn(2, 7, 50).transpose(1, 2)
    coeffs = haar_dwt_triton.haar_dwt(x, 4)
    torch.testing.assert_close(coeffs, haar_dwt_ref(x, 4), rtol=0, atol=2e-6)
    back = haar_dwt_triton.haar_idwt(coeffs.transpose(1, 2).contiguous().transpose(1, 2), 4, seqlen=50)
    torch.testing.assert_close(back, x, rtol=0, atol=2e-6)


def test_nothing():
    x = torch.zeros(2, 0, 3)
    assert room.haar_pool(x, [0, 3]).shape == x.shape
    assert haar_dwt_triton.haar_dwt(x, 2).shape == haar_dwt_triton.haar_idwt(x, 2).shape == x.shape

"""The Triton kernels of the Haar ops without a GPU: through Triton's interpreter, and compiled ahead of time."""

import importlib
import importlib.util
import re

import pytest
import torch
from triton_cases import compiled, interpret, kind, spilled

from audiokernels import haar_levels
from audiokernels.haar_levels import level_runs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.timeout(1800)  # with the slow cases
def test_interpreted(request):
    interpret(request, "interpreted_haar.py", at_least=40)


def wide_loads(kernel):
    """Whether it reads and writes 16 bytes a thread."""
    return all(re.search(rf"{way}\.global[\w.:]*\.v4\.b32", kernel.asm["ptx"]) for way in ("ld", "st"))


def launches(dtype, dim, seqlen=4096):
    pool = importlib.import_module("audiokernels.haar_pool_triton")
    dwt = importlib.import_module("audiokernels.haar_dwt_triton")
    x, out = (torch.empty(2, seqlen, dim, dtype=dtype, device="meta") for _ in range(2))
    part = next(pool.parts(level_runs(haar_levels(dim, seqlen), dim, seqlen)))
    yield from pool.pool_launches(x, out, part)
    yield pool.pool_launches(x, x, part)[-1]
    for count in (False, True):
        for adjoint in (False, True):
            yield from pool.pool_launches(x, out, part, True, count, adjoint)
    state, position = torch.empty(2, 5000, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    yield pool.update_launch(x[:, 0], state, position, out[:, 0], part, True, 0)
    for n_levels in (2, 8, 10):
        yield from dwt.dwt_launches(x, out, n_levels, True)
        yield from dwt.idwt_launches(x, out, n_levels)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled_ahead_of_time_nothing_spills(dtype, architecture, tmp_path):
    for launch in launches(dtype, 256):
        kernel = compiled(launch, architecture)
        assert spilled(kernel, tmp_path) == 0, (launch.kernel.__name__, launch.constants)
        assert kernel.metadata.shared <= 48 << 10
        if launch.kernel.__name__ not in ("sums_kernel", "update_kernel") and launch.constants["LOG_T"] > 6:
            assert wide_loads(kernel), (launch.kernel.__name__, launch.constants)


def test_one_kernel_compiled_ahead_of_time(tmp_path):
    dwt = importlib.import_module("audiokernels.haar_dwt_triton")
    x, out = (torch.empty(2, 512, 64, device="meta") for _ in range(2))
    kernel = compiled(dwt.dwt_launches(x, out, 3)[0], 90)
    assert spilled(kernel, tmp_path) == 0 and wide_loads(kernel)
    # of three dimensions Triton 3.6 spreads those over a warp's threads that 3.7 keeps in one: 4 times the registers
    assert not re.findall(r"tt\.(?:load|store) .*tensor<\d+x\d+x\d+x", kernel.asm["ttgir"])


def test_windows_are_not_divided_by_approximation():
    """PTX's ex2.approx and div.full promise two bits less than plain torch keeps, powers of two or not."""
    pool = importlib.import_module("audiokernels.haar_pool_triton")
    x, out = (torch.empty(2, 4096, 64, device="meta") for _ in range(2))
    part = next(pool.parts(level_runs((3, -1) * 8 + (2,) * 48, 64, 4096)))
    state, position = torch.empty(2, 5000, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    windows = pool.pool_launches(x, out, part, causal=True)[-1]
    for launch in (windows, pool.update_launch(x[:, 0], state, position, out[:, 0], part, False, 4096)):
        assert not re.findall(r"ex2\.approx|div\.full", compiled(launch, 90).asm["ptx"])


def test_other_plans_and_lengths_compile_nothing_new():
    """Kernels take runs and sizes as numbers that Triton does not look at."""
    pool = importlib.import_module("audiokernels.haar_pool_triton")

    def looks(dim, seqlen, kind_of_plan):
        x, out = (torch.empty(2, seqlen, dim, device="meta") for _ in range(2))
        part = next(pool.parts(level_runs(haar_levels(dim, seqlen, kind_of_plan), dim, seqlen)))
        launch = pool.pool_launches(x, out, part)[-1]
        runs = launch.arguments["runs"]
        assert len(runs) == 16 and all(code % 2 and kind(code) == "i64" for code in runs)
        return launch.constants

    assert looks(64, 4000, "dyadic") == looks(64, 5000, "dyadic") == looks(64, 3001, "linear")


def test_long_levels_take_a_launch_before():
    pool = importlib.import_module("audiokernels.haar_pool_triton")

    def names(levels, seqlen, causal=False):
        x, out = (torch.empty(1, seqlen, len(levels), device="meta") for _ in range(2))
        part = next(pool.parts(level_runs(levels, len(levels), seqlen)))
        return [launch.kernel.__name__ for launch in pool.pool_launches(x, out, part, causal)]

    assert names((0, 8), 1000) == ["block_kernel"] and names((0, 9), 1000) == ["sums_kernel", "block_kernel"]
    assert names((0, -1), 256) == ["block_kernel"] and names((0, -1), 257) == ["sums_kernel", "block_kernel"]
    assert names((0, 7), 1000, True) == ["causal_kernel"]
    assert names((0, 8), 1000, True) == ["sums_kernel", "causal_kernel"]

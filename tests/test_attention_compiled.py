"""The Triton kernels compiled ahead of time for GPUs that are not here: registers, shared memory, instructions.

Shows what the compiler makes of every row of the table of blocks. Whether it runs, and how fast, only a GPU shows.
"""

import importlib.util
import os
import re

import pytest
import torch
from triton_cases import compiled, spilled

from audiokernels import causal_attention_plan as plans
from audiokernels.causal_attention_plan import BackwardPlan, Device, Plan, Tile, padded

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from audiokernels.causal_attention_backward_triton import backward_launches
from audiokernels.causal_attention_decode_triton import decode_launches, update_launch
from audiokernels.causal_attention_triton import _EXP2, forward_launch

TARGETS = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes of shared memory that a block may have
SMALL_SPILLS = 128  # bytes: float32 operands, split into three, fill the registers at larger heads and on mma.sync


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.getbasetemp() / "triton"))


def on_meta(headdim, dtype, nheads=8):
    return torch.empty(2, nheads, 4096, headdim, dtype=dtype, device="meta")


def forward(tile, headdim, dtype):
    """Windowed: of the variants the one with the most code."""
    if dtype == torch.float16:
        tile = plans.with_running_maximum(tile)
    plan = Plan("Triton", "", tile, padded(headdim), 1024, dtype == torch.bfloat16)
    q, lse = on_meta(headdim, dtype), torch.empty(2, 8, 4096, device="meta")
    return forward_launch(plan, q, q, q, (q, lse), headdim**-0.5)


def backward(kernel, tile, headdim, dtype):
    plan = BackwardPlan("Triton", "", tile, tile, padded(headdim), 1024)
    q, k, row = on_meta(headdim, dtype), on_meta(headdim, dtype, 4), torch.empty(2, 8, 4096, device="meta")
    return backward_launches(plan, (q, k, k), (q, row), (q, row, row), (q, k, k), headdim**-0.5)[kernel]


def table():
    """(name, headdim, dtype, arch, tile) for what the plans take somewhere."""
    names = {
        "forward": plans.FORWARD,
        "short": plans.FORWARD_SHORT,
        "dq": plans.BACKWARD_DQ,
        "dkdv": plans.BACKWARD_DKDV,
    }
    for name, rows in names.items():
        for (headdim, itemsize), tiles in rows.items():
            half = [torch.bfloat16, torch.float16] if name in ("forward", "short") else [torch.bfloat16]
            for dtype in half if itemsize == 2 else [torch.float32]:
                for arch, memory in TARGETS.items():
                    tile = plans.fitting(tiles, Device(132, memory, arch // 10))
                    if tile is not None:
                        yield name, headdim, dtype, arch, tile


QUICK = {
    ("forward", 16, 90),
    ("short", 16, 100),
    ("forward", 32, 80),
    ("dkdv", 32, 90),
    ("dq", 16, 120),
    ("forward", 64, 90),
}


def case(name, headdim, dtype, arch, tile):
    quick = dtype == torch.bfloat16 and (name, headdim, arch) in QUICK
    text = f"{name}-{headdim}-{str(dtype)[6:]}-sm_{arch}"
    return pytest.param(name, headdim, dtype, arch, tile, id=text, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "headdim", "dtype", "arch", "tile"), [case(*row) for row in table()])
def test_blocks(name, headdim, dtype, arch, tile, tmp_path):
    if name in ("forward", "short"):
        launch = forward(tile, headdim, dtype)
    else:
        launch = backward({"dq": 1, "dkdv": 2}[name], tile, headdim, dtype)
    made = compiled(launch, arch)
    assert made.metadata.shared <= tile.shared <= TARGETS[arch]
    spills = spilled(made, tmp_path)
    if headdim <= 128:
        assert spills <= (SMALL_SPILLS if dtype == torch.float32 else 0)
    instruction = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(arch, "mma.sync")
    assert instruction in made.asm["ptx"] or (dtype == torch.float32 and "mma.sync" in made.asm["ptx"])
    assert "0x0B630B63" in made.asm["ptx"] or not tile.polynomial or dtype != torch.bfloat16


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100, 120))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("headdim", [16, *(pytest.param(d, marks=pytest.mark.slow) for d in (64, 128, 256))])
def test_decode(headdim, dtype, arch, tmp_path):
    q, cache = on_meta(headdim, dtype)[:, :, :1], on_meta(headdim, dtype, 2)
    seqlens = torch.empty(2, dtype=torch.int32, device="meta")
    device = Device(132, TARGETS[arch], arch // 10)
    plan = plans.causal_attention_decode_plan(q.shape, cache.shape, dtype, None, device)
    launches = decode_launches(plan, q, (cache, cache), seqlens, q, 0.25)
    launches.append(update_launch(cache, cache, cache[:, :, :1], cache[:, :, :1], seqlens))
    assert len(launches) == 3
    for launch in launches:
        made = compiled(launch, arch)
        assert made.metadata.shared <= TARGETS[arch]
        assert spilled(made, tmp_path) == 0 or headdim > 128 or dtype == torch.float32


def test_a_batch_of_another_size_asks_for_no_other_kernel():
    """Nor do other numbers of programs that share the keys."""
    wanted, shares = set(), set()
    for batch in range(1, 65):
        q, cache = (torch.empty(batch, 8, n, 16, dtype=torch.bfloat16, device="meta") for n in (1, 65536))
        plan = plans.causal_attention_decode_plan(q.shape, cache.shape, q.dtype, None, Device())
        shares.add(plan.splits)
        for launch in decode_launches(plan, q, (cache, cache), torch.empty(batch, dtype=torch.int32), q, 0.25):
            wanted.add((launch.kernel.fn.__name__, *launch.constants.items()))
    assert len(shares) > 8
    assert len(wanted) <= 2 + 3  # keys shared out or not; the sums of up to 16, 32 or 64 programs


def test_delta(tmp_path):
    launch = backward(0, Tile(64, 64, 4, 1, 0), 64, torch.bfloat16)
    assert spilled(compiled(launch, 90), tmp_path) == 0


def bfloat16(x):
    return x.float().to(torch.bfloat16).double()


def polynomial(x):
    """What the packed polynomial of _EXP2 computes for float32 x, step by step, with the constants of its text."""
    low, high, shift = (
        torch.frombuffer(bytearray.fromhex(n)[::-1], dtype=torch.float32)
        for n in (
            re.search(rf"{op} \w+, \S+ 0f(\w+);", _EXP2)[1] for op in ("max.NaN.f32", "min.NaN.f32", "add.rn.f32")
        )
    )
    x = torch.minimum(torch.maximum(x, low), high)
    rounded = x + shift
    f = bfloat16(x - (rounded - shift))
    steps = [torch.tensor(int(n, 16), dtype=torch.int16) for n in re.findall(r"mov.b32 [pi], 0x....(\w+);", _EXP2)]
    cubic, *others = (step.view(torch.bfloat16).double() for step in steps)
    p = cubic
    for step in others:
        p = bfloat16(p * f + step)
    exponent = rounded.view(torch.int32) & 0xFFFF
    bits = p.to(torch.bfloat16).view(torch.int16).int() + exponent * 128
    return (bits & 0xFFFF).to(torch.int16).view(torch.bfloat16)


def test_polynomial_of_the_assembly():
    x = torch.linspace(-99, 99, 100001)
    got, want = polynomial(x).double(), torch.exp2(x.double())
    assert ((got - want).abs() / want).max() < 2**-7.5
    plain = want.to(torch.bfloat16).double()
    assert (got - want).div(want).square().mean() < 2 * (plain - want).div(want).square().mean()
    extremes = polynomial(torch.tensor([128, 1e6, 1e30, torch.inf, torch.nan])).float()
    assert not (extremes < 2.0**100).any(), "what is too large or NaN must make the block be done again"
    assert (polynomial(torch.tensor([-101, -4e4, -65636, -1e30, -torch.inf])).float() <= 2.0**-99).all()


def test_cuda_backend_takes_the_options():
    options = CUDABackend(GPUTarget("cuda", 90, 32)).parse_options({"num_warps": 4, "num_stages": 3, "maxnreg": 96})
    assert options.maxnreg == 96 and {"bf16x6", "bf16x3"} <= set(options.allowed_dot_input_precisions)

"""haar_levels and haar_pool: values, projection, causality, gradients, edge cases, torch's machinery, errors."""

import functools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import UNCOMPILED, distinct_instruction_sets, in_use

from audiokernels import explain, haar_levels, haar_pool, haar_pool_
from audiokernels._gpu import Gpu
from audiokernels._library import C
from audiokernels.backends import REFERENCE
from audiokernels.haar_levels import level_runs
from audiokernels.haar_pool import haar_pool_ref, refused_by_triton

OP = torch.ops.audiokernels.haar_pool.default
INPLACE = torch.ops.audiokernels.haar_pool_.default
pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ISAS = distinct_instruction_sets("haar_pool")
COMPILED = ISAS != UNCOMPILED
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
MODES = [("block", "window"), ("causal", "window"), ("causal", "count")]
modes = pytest.mark.parametrize(("mode", "norm"), MODES)
CASES = [  # batch, seqlen, levels (None: the dyadic plan of so many channels)
    (2, 1, (0, 1, 3, -1)),
    (1, 63, None, 1),
    (3, 100, None, 63),
    (2, 1000, None, 48),
    (1, 127, (-1, 6, 7, 0, 62, 1, 2)),
    (2, 613, None, 100),
    (1, 64, (6, 5, 4, 3, 2, 1, 0)),
    (2, 1031, (9, 10, 11, -1, 8)),
]


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this processor has, each in turn."""
    with in_use(request.param) as name:
        yield name


def plan(case):
    batch, seqlen, levels, *dim = case
    return haar_levels(dim[0], seqlen) if levels is None else levels


def make(case, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (case[0], case[1], len(plan(case)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


@functools.lru_cache(maxsize=64)
def matrix(seqlen, level, mode, norm):
    """The operator of one channel by its formula: float64 (seqlen, seqlen)."""
    block = seqlen if level < 0 else 1 << level
    t, s = torch.arange(seqlen)[:, None], torch.arange(seqlen)[None, :]
    if mode == "block":
        inside = (t // block == s // block) if block < 1 << 40 else torch.ones(seqlen, seqlen, dtype=torch.bool)
        return inside.double() / inside.sum(1, keepdim=True)
    inside = (s <= t) & (t - s < block)
    return inside.double() / (block if norm == "window" else inside.sum(1, keepdim=True))


def dense(x, levels, mode="block", norm="window"):
    x = x.double().cpu()
    return torch.stack([x[:, :, i] @ matrix(x.shape[1], level, mode, norm).T for i, level in enumerate(levels)], 2)


def pool_backward(x, levels, mode, norm):
    x = x.clone().requires_grad_()
    haar_pool(x, levels=levels, mode=mode, norm=norm).backward(x.detach())
    return x.grad


# ---- plans


def test_levels_of_the_talk():
    def counted(dim, seqlen, kind="dyadic"):
        levels = haar_levels(dim, seqlen, kind)
        return {level: levels.count(level) for level in dict.fromkeys(levels)}

    assert counted(64, 40) == {0: 32, 1: 16, 2: 8, 3: 4, 4: 2, 5: 1, -1: 1}
    assert counted(48, 1000) == {0: 24, 1: 12, 2: 6, 3: 3, 4: 2, -1: 1}
    assert counted(512, 4096) == {**{level: 256 >> level for level in range(9)}, -1: 1}
    assert counted(128, 512, "linear") == {0: 64, **{level: 7 for level in range(1, 9)}, -1: 8}
    assert counted(64, 5) == {0: 32, 1: 16, 2: 8, -1: 8}
    assert haar_levels(1, 100) == haar_levels(1, 100, "linear") == (0,)
    assert haar_levels(0, 7) == () and haar_levels(2, 0) == (0, -1) and haar_levels(4, 1, "linear") == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["dyadic", "linear"])
def test_levels_cover_all_channels_fast_ones_first(kind):
    for dim in (1, 2, 3, 7, 48, 63, 64, 100, 513):
        for seqlen in (1, 2, 3, 16, 17, 1000, 65536):
            levels = haar_levels(dim, seqlen, kind)
            places = [99 if level < 0 else level for level in levels]
            assert len(levels) == dim and places == sorted(places) and levels[0] == 0
            assert all(level < 1 or 1 << level < seqlen for level in levels)


# ---- values


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, device, dtype, mode, norm, isa):
    x, levels = make(case, dtype, device), plan(case)
    out = haar_pool(x, levels=levels, mode=mode, norm=norm)
    want = dense(x, levels, mode, norm)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == x.shape
    scale = max(1e-6, float(x.double().abs().max()))
    eps = max(
        torch.finfo(dtype).eps / 2, 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    )
    assert float((out.cpu().double() - want).abs().max()) <= eps * scale


def test_default_levels_are_the_dyadic_plan():
    x = torch.randn(2, 40, 64)
    for mode, norm in MODES:
        want = haar_pool(x, levels=haar_levels(64, 40), mode=mode, norm=norm)
        assert torch.equal(haar_pool(x, mode=mode, norm=norm), want)
        assert torch.equal(haar_pool(x, levels=torch.tensor(haar_levels(64, 40)), mode=mode, norm=norm), want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_within_a_block_are_the_same_to_the_bit(case, isa):
    x, levels = make(case), plan(case)
    out = haar_pool(x, levels=levels)
    for i, level in enumerate(levels):
        starts = torch.arange(case[1])
        starts -= starts % (case[1] if level < 0 else 1 << level)
        assert torch.equal(out[:, :, i], out[:, starts, i])


def test_block_mode_is_an_orthogonal_projection(isa):
    x, y = make(CASES[3], torch.float64), make(CASES[3], torch.float64, seed=1)
    levels = plan(CASES[3])
    px, py = haar_pool(x, levels=levels), haar_pool(y, levels=levels)
    torch.testing.assert_close(haar_pool(px, levels=levels), px, rtol=0, atol=1e-14)
    assert abs(float((px * y).sum() - (x * py).sum())) < 1e-9
    torch.testing.assert_close(pool_backward(x, levels, "block", "window"), px, rtol=0, atol=0)


def test_long_causal_windows_keep_their_accuracy(isa):
    """65536 steps of mean 3: differences of prefix sums from the start are off by 8e-3."""
    x = torch.randn(1, 65536, 8, generator=torch.Generator().manual_seed(0)) + 3
    levels = (0, 1, 2, 6, 8, 11, 15, -1)
    sums = torch.nn.functional.pad(x.double().cumsum(1), (0, 0, 1, 0))
    t = torch.arange(65536)
    for norm in ("window", "count"):
        out = haar_pool(x, levels=levels, mode="causal", norm=norm).double()
        for i, level in enumerate(levels):
            block = 65536 if level < 0 else 1 << level
            want = sums[0, 1:, i] - sums[0, (t + 1 - block).clamp(min=0), i]
            want /= block if norm == "window" else (t + 1).clamp(max=block)
            assert float((out[0, :, i] - want).abs().max()) < (1e-5 if level else 1e-12)


@modes
def test_what_is_not_finite_stays_inside(mode, norm, isa):
    levels = (0, 1, 2, 5, -1, 9)
    for value in (math.nan, math.inf, -math.inf):
        x = torch.randn(2, 300, len(levels))
        x[0, 133] = value
        out = haar_pool(x, levels=levels, mode=mode, norm=norm)
        for i, level in enumerate(levels):
            touched = matrix(300, level, mode, norm)[:, 133] > 0
            assert torch.equal(out[0, :, i].isfinite(), ~touched)
            if value != math.nan and not math.isnan(value):
                assert (out[0, touched, i] == value).all()
        assert out[1].isfinite().all()


def test_block_mode_looks_ahead_and_causal_mode_does_not(isa):
    x = torch.randn(2, 200, 64)
    changed = x.clone()
    changed[:, 101:] = torch.randn(2, 99, 64)
    for norm in ("window", "count"):
        before, after = (haar_pool(v, mode="causal", norm=norm) for v in (x, changed))
        assert torch.equal(before[:, :101], after[:, :101]) and not torch.equal(before, after)
    leaked = (haar_pool(x)[:, :101] != haar_pool(changed)[:, :101]).any(0).any(0)
    fast = torch.tensor(haar_levels(64, 200)) == 0
    assert not leaked[fast].any() and leaked[~fast].all()  # step 100 shares a block with 101 at level 1 already


# ---- strides, memory, sizes


@modes
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_inside_nan(dtype, device, mode, norm, isa):
    case = (2, 61, (0, 0, 1, 3, 6, -1, 2))
    x = make(case, dtype, device)
    want = haar_pool(x, levels=case[2], mode=mode, norm=norm)
    for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)):
        buffer = torch.full([2 * n + 3 for n in (x.shape[i] for i in order)], math.nan, dtype=dtype, device=device)
        view = buffer[tuple(slice(1, 1 + 2 * x.shape[i], 2) for i in order)].permute(
            *(order.index(i) for i in range(3))
        )
        view.copy_(x)
        assert torch.equal(haar_pool(view, levels=case[2], mode=mode, norm=norm), want)
        outside = buffer.isnan().sum()
        assert haar_pool_(view, levels=case[2], mode=mode, norm=norm) is view
        assert torch.equal(view, want) and buffer.isnan().sum() == outside
    expanded = x[:1].expand(3, -1, -1)
    assert torch.equal(haar_pool(expanded, levels=case[2], mode=mode, norm=norm), want[:1].expand(3, -1, -1))


@modes
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (0, 0, 0)], ids=str)
def test_zero_sizes(shape, device, mode, norm):
    x = torch.zeros(shape, device=device, requires_grad=True)
    out = haar_pool(x, mode=mode, norm=norm)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape
    assert haar_pool_(x.detach(), mode=mode, norm=norm).shape == shape


def test_result_memory_is_fully_written():
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        for case in CASES:
            for mode, norm in MODES:
                assert not haar_pool(make(case), levels=plan(case), mode=mode, norm=norm).isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("batch", [1, 5, 16])  # one sequence shared by threads; whole sequences a thread
def test_rows_do_not_depend_on_batch_or_threads(batch):
    x = torch.randn(batch, 900, 70)
    for mode, norm in MODES:
        out, inplace = haar_pool(x, mode=mode, norm=norm), haar_pool_(x.clone(), mode=mode, norm=norm)
        assert torch.equal(out[-1:], haar_pool(x[-1:], mode=mode, norm=norm)) and torch.equal(out, inplace)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(out, haar_pool(x, mode=mode, norm=norm))
            assert torch.equal(out, haar_pool_(x.clone(), mode=mode, norm=norm))
        torch.set_num_threads(1)


@pytest.mark.skipif(not COMPILED, reason="nothing is compiled")
@modes
def test_float32_is_the_same_to_the_bit_on_every_instruction_set(mode, norm):
    for case in CASES:
        x, results = make(case), []
        for name in ISAS:
            with in_use(name):
                results.append(haar_pool(x, levels=plan(case), mode=mode, norm=norm))
        assert all(torch.equal(results[0], result) for result in results)


def test_in_place_leaves_level_0_untouched():
    x = torch.randn(2, 33, 3).bfloat16()
    x[:, :, 0] = math.nan
    bits = x[:, :, 0].view(torch.int16).clone()
    haar_pool_(x, levels=(0, 2, -1))
    assert torch.equal(x[:, :, 0].view(torch.int16), bits) and x[:, :, 1:].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 300),
    levels=st.lists(st.sampled_from([-1, 0, 0, 1, 2, 3, 4, 5, 7, 8, 9, 40]), min_size=1, max_size=40),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
    isa_name=st.sampled_from(ISAS),
    transposed=st.booleans(),
)
def test_any_shape(batch, seqlen, levels, mode, dtype, isa_name, transposed):
    with in_use(isa_name):
        x = make((batch, seqlen, levels), dtype, seed=seqlen)
        if transposed:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        out = haar_pool(x, levels=levels, mode=mode[0], norm=mode[1])
        want = dense(x, levels, *mode)
        eps = max(torch.finfo(dtype).eps / 2, 5e-7 if dtype != torch.float64 else 1e-15)
        assert float((out.double() - want).abs().max()) <= eps * float(x.double().abs().max())
        inplace = haar_pool_(x.clone(), levels=levels, mode=mode[0], norm=mode[1])
        assert torch.equal(inplace, out)


# ---- gradients


@modes
def test_gradients(mode, norm):
    x = torch.randn(1, 11, 5, dtype=torch.float64, requires_grad=True)
    for levels in ((1, 2, -1, 3, 4), None):

        def pool(x, levels=levels):
            return haar_pool(x, levels=levels, mode=mode, norm=norm)

        assert torch.autograd.gradcheck(pool, (x,)) and torch.autograd.gradgradcheck(pool, (x,))


@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_backward_is_the_transposed_operator(device, dtype, mode, norm, isa):
    case = CASES[4]
    x, levels = make(case, dtype, device), plan(case)
    grad = pool_backward(x, levels, mode, norm)
    parts = [matrix(case[1], level, mode, norm).T @ x[0, :, i].double().cpu() for i, level in enumerate(levels)]
    want = torch.stack(parts, 1)[None]
    eps = max(torch.finfo(dtype).eps / 2, 5e-7 if dtype != torch.float64 else 1e-15)
    assert float((grad.cpu().double() - want).abs().max()) <= 2 * eps * float(want.abs().max() + x.abs().max())
    again = haar_pool(x, levels=levels, mode=mode, norm=norm)
    assert grad.dtype == dtype and (mode == "causal" or torch.equal(grad, again))


def test_nothing_is_saved_and_frozen_inputs_stay_frozen():
    x = torch.randn(2, 40, 16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        haar_pool(x).sum().backward()
        haar_pool(x, mode="causal").sum().backward()
    assert not saved and not haar_pool(x.detach()).requires_grad


def test_backward_twice_and_of_expanded_gradients():
    x = torch.randn(2, 40, 16, requires_grad=True)
    total = haar_pool(x, mode="causal", norm="count").sum()  # its gradient is an expanded scalar
    first = torch.autograd.grad(total, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(total, x)[0])


# ---- torch's own machinery


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(2, 13, 5), (0, 3, 5), (1, 0, 5)], ids=str)
def test_opcheck(shape, device):
    runs = [0, 2, 1, 1, -1, 2]
    x = torch.randn(shape, device=device)
    for options in ({}, {"causal": True}, {"causal": True, "count": True}, {"causal": True, "adjoint": True}):
        torch.library.opcheck(OP, (x.clone().requires_grad_(), runs), options)
    torch.library.opcheck(INPLACE, (x, runs), {"causal": True})


def test_compile_fullgraph_dynamic():
    def step(x):
        with torch.no_grad():
            y = haar_pool_(x.detach().clone(), mode="causal")
        return haar_pool(x.sin()) + haar_pool(x, mode="causal", norm="count") + y

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="inductor" if C else "aot_eager")
    for shape in ((2, 70, 24), (3, 91, 24), (4, 133, 24)):
        x = torch.randn(shape, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        out, want = compiled(x), step(twin)
        torch.testing.assert_close(out, want)
        out.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_refuses_bad_arguments():
    compiled = torch.compile(haar_pool, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="mode must be"):
        compiled(torch.randn(2, 8, 4), mode="average")


class Layer(torch.nn.Module):
    """A residual of pooled channels."""

    def forward(self, x):
        return x + haar_pool(x, mode="causal")


def test_export():
    x = torch.randn(2, 40, 8)
    exported = torch.export.export(Layer(), (x,)).module()
    assert torch.equal(exported(x), Layer()(x))


def test_vmap():
    x = torch.randn(2, 3, 4, 30, 8)
    want = haar_pool(x.flatten(0, 2), mode="causal").unflatten(0, (2, 3, 4))
    assert torch.equal(torch.vmap(torch.vmap(lambda v: haar_pool(v, mode="causal")))(x), want)
    inner = torch.vmap(lambda v: haar_pool(v, mode="causal"), in_dims=1, out_dims=1)
    assert torch.equal(inner(x[0].transpose(0, 1)), want[0].transpose(0, 1))
    z = x[0].clone().requires_grad_()
    torch.vmap(haar_pool)(z).backward(x[0])
    assert torch.equal(z.grad, torch.vmap(haar_pool)(x[0]))
    y = x[0].clone()
    torch.vmap(lambda v: haar_pool_(v, mode="causal"))(y)
    assert torch.equal(y, want[0])


def test_autocast_keeps_the_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert haar_pool(torch.randn(1, 8, 4, dtype=dtype)).dtype == dtype


@gpu
def test_cuda_graph():
    x = torch.randn(2, 3000, 64, device="cuda")
    haar_pool(haar_pool(x), mode="causal")  # no kernel may be loaded while a graph is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = haar_pool(haar_pool(x), mode="causal")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, haar_pool(haar_pool(x), mode="causal"))


@gpu
@pytest.mark.slow
def test_offsets_beyond_2_to_the_31():
    x = torch.randn(3, 700, 33, device="cuda").bfloat16()
    base = torch.empty(2**31 + 2**28, dtype=torch.bfloat16, device="cuda")
    far = base.as_strided(x.shape, (2**30, 33, 1)).copy_(x)
    rows = base.as_strided(x.shape, (1, 3 * 10**6, 3)).copy_(x)
    for mode, norm in MODES:
        want = haar_pool(x, mode=mode, norm=norm)
        assert torch.equal(haar_pool(far, mode=mode, norm=norm), want)
        assert torch.equal(haar_pool(rows, mode=mode, norm=norm), want)


# ---- wrong calls

Z = torch.zeros
WRONG = {
    "x is a list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x has two dimensions": ({"x": Z(5, 3)}, ValueError, r"x must have 3 dimensions, got shape \(5, 3\)"),
    "x is int64": ({"x": Z(2, 5, 3).long()}, TypeError, "x must be float32.*torch.int64"),
    "x is sparse": ({"x": Z(2, 5, 3).to_sparse()}, TypeError, "x must be a dense tensor.*sparse_coo"),
    "mode is unknown": ({"mode": "max"}, ValueError, "mode must be .block. or .causal., got 'max'"),
    "norm is unknown": ({"norm": "sum"}, ValueError, "norm must be .window. or .count., got 'sum'"),
    "levels are few": ({"levels": (0, 1)}, ValueError, "one number for each of the 3 channels, got 2"),
    "a level is -2": ({"levels": (0, 1, -2)}, ValueError, r"levels must be -1 or 0..62, got -2"),
    "a level is 63": ({"levels": (0, 1, 63)}, ValueError, r"levels must be -1 or 0..62, got 63"),
    "a level is 1.0": ({"levels": (0, 1.0, 2)}, TypeError, "levels must be integers, got float"),
    "a level is True": ({"levels": (True, 0, 2)}, TypeError, "levels must be integers, got bool"),
    "levels are a word": ({"levels": "dyadic"}, TypeError, "levels must be a sequence.*got str"),
    "levels are a number": ({"levels": 3}, TypeError, "levels must be a sequence.*got int"),
    "levels are floats": ({"levels": Z(3)}, TypeError, "levels must be integers.*float32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_call(case):
    change, error, message = WRONG[case]
    args = {"x": torch.randn(2, 5, 3), **change}
    for op in (haar_pool, haar_pool_):
        with pytest.raises(error, match=message):
            op(**args)


def test_integers_of_numpy_are_integers():
    x, levels = torch.randn(2, 50, 8), haar_levels(8, 50)
    assert haar_levels(np.int64(8), np.int32(50)) == levels
    assert all(type(level) is int for level in haar_levels(np.int64(8), np.int32(50)))
    assert torch.equal(haar_pool(x, levels=[np.int64(level) for level in levels]), haar_pool(x, levels=levels))
    with pytest.raises(TypeError, match="levels must be integers, got bool"):
        haar_pool(x, levels=[np.int64(0)] * 7 + [True])


@pytest.mark.parametrize("op", [OP, INPLACE], ids=str)
@pytest.mark.parametrize("runs", [[0, 2], [0, 2, 1], [0, 4, 1, -1], [-2, 3], [63, 3], [0, 4]], ids=str)
def test_the_ops_check_again(op, runs):
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        op(torch.zeros(2, 5, 3), runs)


def test_in_place_refuses_gradients_and_expanded_views():
    x = torch.randn(2, 5, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="x requires grad"):
        haar_pool_(x)
    with torch.no_grad():
        haar_pool_(x)
    with pytest.raises(ValueError, match="expanded"):
        haar_pool_(torch.randn(1, 5, 3).expand(2, -1, -1))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((-1, 5), ValueError, "dim must be >= 0, got -1"),
        ((4, -5), ValueError, "seqlen must be >= 0, got -5"),
        ((4.0, 5), TypeError, "dim must be an integer, got float"),
        ((4, 5, "cubic"), ValueError, "plan must be .dyadic. or .linear., got 'cubic'"),
    ],
)
def test_wrong_levels(args, error, message):
    with pytest.raises(error, match=message):
        haar_levels(*args)


# ---- which kernel runs


def test_triton_serves_from_sm_80_on(monkeypatch):
    for major, refused in ((7, "sm_7x is older than sm_80"), (8, ""), (12, "")):
        gpu = Gpu((major, 0), 132, 232448)
        monkeypatch.setattr(sys.modules["audiokernels.haar_pool"], "device_facts", lambda device, gpu=gpu: gpu)
        x = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
        assert refused_by_triton(x) == refused
        x.dtype = torch.float64
        assert refused_by_triton(x) == "float64 runs on the reference"


def test_explain(isa):
    x = torch.randn(2, 40, 64)
    answer = explain(haar_pool, x)
    assert answer.bytes == 2 * 4 * x.numel() and answer.flops == x.numel() // 2
    inplace = explain("haar_pool_", x)
    assert inplace.bytes == 4 * x.numel()  # the slow half, read and written
    if COMPILED:
        assert answer.kernel == inplace.kernel == f"cpu_{isa}"
        assert explain(haar_pool, x.double()).kernel == "cpu_loop"
    else:
        assert answer.kernel == REFERENCE


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_agrees(dtype, mode, norm, isa):
    x = torch.randn(2, 300, 50).to(dtype)
    options = {"causal": mode == "causal", "count": norm == "count"}
    want = haar_pool_ref(x, level_runs(None, 50, 300), **options)
    torch.testing.assert_close(
        haar_pool(x, mode=mode, norm=norm), want, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
    )

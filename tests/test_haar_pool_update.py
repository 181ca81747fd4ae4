"""haar_pool_update: the next row of causal haar_pool, over many windows; state, errors, torch's machinery."""

import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import UNCOMPILED, distinct_instruction_sets, in_use

from audiokernels import explain, haar_levels, haar_pool, haar_pool_state, haar_pool_update
from audiokernels._library import C
from audiokernels.backends import REFERENCE
from audiokernels.haar_levels import level_runs

OP = torch.ops.audiokernels.haar_pool_update.default
pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ISAS = distinct_instruction_sets("haar_pool_update")
COMPILED = ISAS != UNCOMPILED
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
LEVELS = (0, 0, 1, 2, 2, -1, 4, 3, 0, 5, 5, 5)


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this processor has, each in turn."""
    with in_use(request.param) as name:
        yield name


def make(batch=2, levels=LEVELS, dtype=torch.float32, device="cpu"):
    return {
        "x": torch.randn(batch, len(levels)).to(device, dtype),
        "state": haar_pool_state(batch, len(levels), levels=levels, dtype=dtype, device=device),
        "position": torch.zeros(batch, dtype=torch.int32, device=device),
        "levels": levels,
        "norm": "count",
        "seqlen": None,
    }


def stream(x, levels, norm, **columns):
    """All rows of x one by one."""
    args = make(x.shape[0], levels, x.dtype, x.device)
    args.update(norm=norm, seqlen=x.shape[1], **columns)
    out = []
    for step in range(x.shape[1]):
        out.append(haar_pool_update(**args | {"x": x[:, step]}))
        args["position"] += 1
        if step == 50:  # saved and restored in the middle
            args["state"] = args["state"].clone()
    return torch.stack(out, 1)


def bound(dtype, scale):
    eps = torch.finfo(dtype).eps
    return scale * (1e-14 if dtype == torch.float64 else max(1.01 * eps, 1e-6))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", ["window", "count"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_incremental_equals_full(dtype, norm, device, isa):
    """Over more than three windows of the slowest ring."""
    x = torch.randn(2, 117, len(LEVELS)).to(device, dtype)
    full = haar_pool(x, levels=LEVELS, mode="causal", norm=norm).double()
    assert float((stream(x, LEVELS, norm).double() - full).abs().max()) <= bound(dtype, float(full.abs().max()))


@pytest.mark.parametrize("kind", ["dyadic", "linear"])
def test_plans(kind):
    x = torch.randn(1, 80, 40)
    levels = haar_levels(40, 80, kind)
    full = haar_pool(x, levels=levels, mode="causal")
    torch.testing.assert_close(stream(x, levels, "window"), full, rtol=0, atol=1e-6)
    if kind == "dyadic":
        state, out = haar_pool_state(1, 40, seqlen=80), []
        for step in range(80):
            position = torch.tensor([step], dtype=torch.int32)
            out.append(haar_pool_update(x[:, step], state, position, seqlen=80))
        torch.testing.assert_close(torch.stack(out, 1), full, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "levels"),
    [(1500, (8, -1, 1)), pytest.param(65536, (13, -1), marks=() if COMPILED else pytest.mark.slow)],
)
def test_nothing_drifts(steps, levels):
    x = torch.randn(1, steps, len(levels), generator=torch.Generator().manual_seed(0)) + 3
    want = haar_pool(x.double(), levels=levels, mode="causal", norm="count")
    assert float((stream(x, levels, "count").double() - want).abs().max()) < 1e-5


def test_small_values_after_a_large_one_are_not_lost(isa):
    """float32 alone rounds 2^24 + 1 to 2^24."""
    x = torch.ones(1, 200, 2)
    x[:, 0] = 2.0**24
    sums = stream(x, (-1, 8), "count") * torch.arange(1, 201)[:, None]
    assert float((sums[0, 199] / (2.0**24 + 199) - 1).abs().max()) < 1e-6


def test_rows_at_other_positions(isa):
    """Each row of a batch may be at another step."""
    levels, x = (0, 1, 3, -1, 2), torch.randn(3, 60, 5)
    want = haar_pool(x, levels=levels, mode="causal", norm="count")
    late = torch.tensor([0, 7, 13], dtype=torch.int32)
    args = make(3, levels)
    for step in range(60):
        row = (step - late).clamp(min=0)
        if (step < late).any():  # not begun: its state stays as it is
            for i in (step >= late).nonzero()[:, 0].tolist():
                out = haar_pool_update(
                    x[i : i + 1, row[i]], args["state"][i : i + 1], row[i : i + 1], levels=levels, norm="count"
                )
                torch.testing.assert_close(out[0], want[i, row[i]], rtol=0, atol=1e-6)
        else:
            out = haar_pool_update(x[torch.arange(3), row.long()], args["state"], row, levels=levels, norm="count")
            torch.testing.assert_close(out, want[torch.arange(3), row.long()], rtol=0, atol=1e-6)


def test_what_is_not_finite_leaves_with_its_window(isa):
    levels = (0, 1, 2, 4, 5, -1)
    for value in (math.nan, math.inf, -math.inf):
        x = torch.randn(1, 120, 6)
        x[0, 37] = value
        want = haar_pool(x, levels=levels, mode="causal", norm="count")
        out = stream(x, levels, "count")
        torch.testing.assert_close(out, want, rtol=0, atol=1e-6, equal_nan=True)
        assert want[0, 90, :5].isfinite().all() and not want[0, 90, 5].isfinite()


def test_any_strides_inside_nan(isa):
    args = make(3, LEVELS)
    args["state"].normal_()
    args["position"] += torch.tensor([31, 7, 100], dtype=torch.int32)
    plain = {**args, "state": args["state"].clone()}
    want = haar_pool_update(**plain)
    views, buffers = {}, {}
    for name in ("x", "state", "position"):
        tensor = args[name]
        fill = -5 if name == "position" else math.nan
        buffers[name] = tensor.new_full([2 * n + 3 for n in tensor.shape[::-1]], fill)
        views[name] = buffers[name].permute(*reversed(range(tensor.ndim)))[(slice(1, -1, 2),) * tensor.ndim]
        views[name] = views[name][tuple(slice(0, n) for n in tensor.shape)].copy_(tensor)
    outside = buffers["state"].isnan().sum()
    assert torch.equal(haar_pool_update(**args | views), want)
    assert torch.equal(views["state"], plain["state"]) and buffers["state"].isnan().sum() == outside


@pytest.mark.parametrize("device", DEVICES)
def test_zero_sizes(device):
    for batch, levels in ((0, LEVELS), (2, ()), (2, (0, 0)), (0, ())):
        args = make(batch, levels, device=device)
        assert torch.equal(haar_pool_update(**args), args["x"])


def test_large_positions(isa):
    """Position counts to 2^31 - 1; only norm "count" and the phases see it."""
    args = make(2, (1, 3, 0))
    args["state"].normal_()
    other = {**args, "state": args["state"].clone(), "position": args["position"] + 2**31 - 8}
    args["position"] += 8
    assert torch.equal(haar_pool_update(**args | {"norm": "window"}), haar_pool_update(**other | {"norm": "window"}))
    assert torch.equal(args["state"], other["state"])


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    levels=st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4]), min_size=1, max_size=30),
    steps=st.integers(1, 40),
    norm=st.sampled_from(["window", "count"]),
    dtype=st.sampled_from(DTYPES),
    isa_name=st.sampled_from(ISAS),
)
def test_any_shape(batch, levels, steps, norm, dtype, isa_name):
    with in_use(isa_name):
        x = torch.randn(batch, steps, len(levels)).to(dtype)
        full = haar_pool(x, levels=levels, mode="causal", norm=norm).double()
        error = float((stream(x, levels, norm).double() - full).abs().max())
        assert error <= bound(dtype, float(x.double().abs().max()))


# ---- torch's own machinery


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    args = make(device=device)
    tensors = (args["x"], args["state"], args["position"], level_runs(LEVELS, len(LEVELS), None))
    torch.library.opcheck(OP, tensors, {"count": True})
    torch.library.opcheck(OP, tensors, {"seqlen": 100})


def test_compile_fullgraph_dynamic():
    def step(x, state, position):
        first = haar_pool_update(x, state, position, levels=LEVELS, norm="count")
        return haar_pool_update(first.tanh(), state, position + 1, levels=LEVELS, norm="count")

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="inductor" if C else "aot_eager")
    for batch in (2, 3, 5):
        args = make(batch)
        tensors = (args["x"], args["state"], args["position"])
        twins = deepcopy(tensors)
        torch.testing.assert_close(compiled(*tensors), step(*twins))
        torch.testing.assert_close(tensors[1], twins[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_vmap():
    calls = [make() for _ in range(3)]
    stacked = [torch.stack([call[name] for call in calls]) for name in ("x", "state", "position")]

    def step(*args):
        return haar_pool_update(*args, levels=LEVELS, norm="count")

    out = torch.vmap(step)(*stacked)
    for i, call in enumerate(calls):
        assert torch.equal(out[i], haar_pool_update(**call)) and torch.equal(stacked[1][i], call["state"])
    with pytest.raises(ValueError, match="state must be mapped"):
        torch.vmap(step, in_dims=(0, None, None))(stacked[0], calls[0]["state"], calls[0]["position"])


def test_refuses_gradients():
    for name in ("x", "state"):
        args = make()
        args[name].requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name} requires grad"):
            haar_pool_update(**args)
        with torch.no_grad():
            assert not haar_pool_update(**args).requires_grad


@gpu
def test_cuda_graph():
    args = make(device="cuda")
    eager = deepcopy(args)
    haar_pool_update(**deepcopy(args))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = haar_pool_update(**args)
        args["position"] += 1
    for _ in range(70):
        graph.replay()
        assert torch.equal(out, haar_pool_update(**eager))
        eager["position"] += 1


# ---- wrong calls

Z = torch.zeros
WRONG = {
    "x has three dimensions": ({"x": Z(2, 1, 12)}, ValueError, "x must have 2 dimensions"),
    "state is short": ({"state": Z(2, 7)}, ValueError, r"state must have shape \(batch, slots\).*got \(2, 7\)"),
    "state is float16": ({"state": Z(2, 7).half()}, TypeError, "state must be torch.float32.*float16"),
    "state is a list": ({"state": []}, TypeError, "state must be a tensor, got list"),
    "state is elsewhere": ({"state": Z(2, 7, device="meta")}, ValueError, "on the device of x .cpu.*meta"),
    "position is int64": ({"position": Z(2).long()}, TypeError, "position must be int32.*int64"),
    "position is a number": ({"position": 3}, TypeError, "position must be a tensor, got int"),
    "position is sparse": ({"position": Z(2).int().to_sparse()}, TypeError, "position must be a dense tensor.*sparse"),
    "position is short": ({"position": Z(1).int()}, ValueError, r"position must have shape \(batch,\)"),
    "position is negative": ({"position": torch.tensor([3, -1]).int()}, ValueError, "position must be >= 0, got -1"),
    "seqlen is missing": ({"norm": "window"}, ValueError, "seqlen is needed"),
    "seqlen is 0": ({"norm": "window", "seqlen": 0}, ValueError, "seqlen is needed"),
    "seqlen is negative": ({"seqlen": -3}, ValueError, "seqlen must be >= 0, got -3"),
    "seqlen is a float": ({"seqlen": 3.0}, TypeError, "seqlen must be an integer or None, got float"),
    "norm is unknown": ({"norm": "sum"}, ValueError, "norm must be"),
    "levels are few": ({"levels": (0,)}, ValueError, "one number for each of the 12 channels, got 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_call(case):
    change, error, message = WRONG[case]
    args = make() | change
    before = args["state"].clone() if torch.is_tensor(args["state"]) else None
    with pytest.raises(error, match=message):
        haar_pool_update(**args)
    if before is not None and before.device.type == "cpu":
        assert torch.equal(args["state"], before)


def test_an_expanded_state_is_refused():
    args = make()
    with pytest.raises(ValueError, match="expanded"):
        haar_pool_update(**args | {"state": args["state"][:1].expand(2, -1)})


def test_a_wrong_state_is_refused_before_it_is_made():
    for error, arguments, options in ((ValueError, (-1, 4), {}), (TypeError, (1, 4), {"dtype": torch.int32})):
        with pytest.raises(error, match="^(batch|dtype) must be"):
            haar_pool_state(*arguments, **options)


def test_explain():
    answer = explain(haar_pool_update, **make())
    assert answer.flops > 0 and answer.bytes > 0
    assert answer.kernel.startswith("cpu_") if COMPILED else answer.kernel == REFERENCE

"""dilated_conv_update: values, incremental = full, opcheck, compile, export, vmap, strides, errors, which kernel."""

from copy import deepcopy

import pytest
import torch
from cuda_on_host import COMPILER, build
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import in_use, instruction_sets
from torch.nn import functional as F

from audiokernels import backends, dilated_conv_update, explain
from audiokernels._library import C
from audiokernels.dilated_conv_update import dilated_conv_update_ref

OP = torch.ops.audiokernels.dilated_conv_update.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ISAS = instruction_sets("dilated_conv_update")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SIZES = [  # batch, dim_in, dim_out, width, dilation
    (1, 64, 64, 2, 16),
    (3, 1, 1, 1, 1),
    (2, 63, 100, 2, 1),
    (5, 7, 13, 3, 4),
    (1, 1000, 63, 2, 3),
    (2, 33, 1000, 5, 2),
]


def assert_same(out, expected):
    """Bit-equal from the kernels; the reference's matmul may sum in another order for another shape."""
    tolerance = 0 if C else 1e-4
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this processor has, each in turn."""
    with in_use(request.param) as name:
        yield name


def make(batch, dim_in, dim_out, width, dilation, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    return {
        "x": randn(batch, dim_in),
        "conv_state": randn(batch, (width - 1) * dilation, dim_in),
        "weight": randn(dim_out, dim_in, width),
        "bias": randn(dim_out),
        "position": torch.randint(0, 10_000, (batch,), generator=g, dtype=torch.int32).to(device),
        "dilation": dilation,
    }


def copy(args):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in args.items()}


def conv1d_step(args, dtype):
    """The same step by conv1d over the whole ring, in `dtype`, and the state after it."""
    x, state, weight, bias = (args[name].to(dtype) for name in ("x", "conv_state", "weight", "bias"))
    length = state.shape[1]
    slots = [int(p) % length if length else 0 for p in args["position"]]
    rings = [torch.cat([row.roll(-slot, 0), now[None]]) for row, slot, now in zip(state, slots, x, strict=True)]
    out = F.conv1d(torch.stack(rings).transpose(1, 2), weight, bias, dilation=args["dilation"])[:, :, -1]
    after = args["conv_state"].clone()
    if length:
        after[torch.arange(len(slots)), slots] = args["x"]
    return out, after


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size, dtype, device, isa):
    args = make(*size, dtype, device)
    expected, after = conv1d_step(args, torch.float64)
    plain, _ = conv1d_step(args, dtype)
    out = dilated_conv_update(**args)
    assert out.dtype == dtype and out.is_contiguous()
    bound = 2 * (plain.double() - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max()
    if dtype == torch.float64:  # the expectation is rounded as well
        bound += 1e-13 * expected.abs().max()
    assert (out.double() - expected).abs().max() <= bound
    assert torch.equal(args["conv_state"], after)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("width", "dilation"), [(1, 1), (2, 1), (2, 7), (3, 4)])
def test_incremental_equals_full(width, dilation, device, isa):
    """Over three wraps of the ring, from an empty one: the convolution of the whole sequence, zeros before it."""
    length = (width - 1) * dilation
    time_steps, batch, dim_in, dim_out = 3 * length + 5, 2, 19, 23
    args = make(batch, dim_in, dim_out, width, dilation, device=device)
    args["conv_state"].zero_()
    args["position"].zero_()
    sequence = torch.randn(batch, time_steps, dim_in, generator=torch.Generator().manual_seed(1)).to(device)
    padded = F.pad(sequence.double().transpose(1, 2), (length, 0))
    expected = F.conv1d(padded, args["weight"].double(), args["bias"].double(), dilation=dilation).transpose(1, 2)
    out = []
    for step in range(time_steps):
        out.append(dilated_conv_update(**{**args, "x": sequence[:, step]}))
        args["position"] += 1
        if step == length:  # saved and restored in the middle
            args["conv_state"] = args["conv_state"].clone()
    error = (torch.stack(out, 1).double() - expected).abs().max()
    assert error <= 1e-5 * max(1, float(expected.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_do_not_depend_on_the_batch(device, isa):
    args = make(9, 50, 70, 3, 5, device=device)
    alone = [
        dilated_conv_update(
            args["x"][b : b + 1], args["conv_state"][b : b + 1].clone(), args["weight"], args["bias"],
            args["position"][b : b + 1], dilation=5,
        )
        for b in range(9)
    ]  # fmt: skip
    assert_same(dilated_conv_update(**args), torch.cat(alone))


def test_threads_do_not_change_a_bit():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(dilated_conv_update(**make(3, 256, 700, 2, 3)))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_offsets_inside_nan(dtype, device, isa):
    """Every tensor a view with odd strides in memory filled with NaN: nothing beside it is read or written."""
    args = make(3, 17, 21, 3, 2, dtype, device)
    expected = dilated_conv_update(**copy(args))
    views, buffers = {}, {}
    for name in ("x", "conv_state", "weight", "bias", "position"):
        tensor = args[name]
        fill = -(2**31) if name == "position" else float("nan")
        shape = [3 * size + 2 for size in reversed(tensor.shape)]
        buffers[name] = torch.full(shape, fill, dtype=tensor.dtype, device=device)
        view = buffers[name].permute(*reversed(range(tensor.ndim)))[(slice(1, -1, 3),) * tensor.ndim]
        views[name] = view.copy_(tensor)
        assert not view.is_contiguous()
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    out = dilated_conv_update(**views, dilation=2)
    assert_same(out, expected)
    for name, buffer in buffers.items():
        changed = ~((buffer == before[name]) | (buffer.isnan() & before[name].isnan()))
        if name == "conv_state":
            _, after = conv1d_step(args, torch.float64)
            assert torch.equal(views[name], after)
            assert int(changed.sum()) == int((after != args[name]).sum())
        else:
            assert not changed.any()


def test_result_memory_is_fully_written():
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        for size in SIZES:
            assert not dilated_conv_update(**make(*size)).isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "size", [(0, 4, 5, 2, 3), (2, 0, 5, 2, 3), (2, 4, 0, 2, 3), (0, 0, 0, 1, 1), (2, 4, 5, 1, 9)], ids=str
)
def test_zero_sizes(size, device):
    args = make(*size, device=device)
    expected, after = conv1d_step(args, torch.float64) if 0 not in size[:3] else (None, None)
    out = dilated_conv_update(**args)
    assert out.shape == (size[0], size[2])
    if size[1] == 0:
        assert torch.equal(out, args["bias"].expand(size[0], -1))
    elif expected is not None:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(args["conv_state"], after)


def test_zero_outputs_still_move_the_ring():
    args = make(2, 4, 0, 2, 3)
    dilated_conv_update(**args)
    for b, position in enumerate(args["position"]):
        assert torch.equal(args["conv_state"][b, int(position) % 3], args["x"][b])


def test_no_bias():
    args = make(2, 8, 9, 2, 3)
    zero = copy(args) | {"bias": torch.zeros(9)}
    assert torch.equal(dilated_conv_update(**args | {"bias": None}), dilated_conv_update(**zero))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_agrees(dtype, device):
    args = make(4, 31, 37, 3, 5, dtype, device)
    other = copy(args)
    out, reference = dilated_conv_update(**args), dilated_conv_update_ref(**other)
    scale = float(reference.double().abs().max())
    assert float((out.double() - reference.double()).abs().max()) <= 4 * torch.finfo(dtype).eps * scale
    assert torch.equal(args["conv_state"], other["conv_state"])


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, n) for n in (5, 70, 70, 4, 9)]),
    dtype=st.sampled_from(DTYPES),
    position=st.integers(0, 2**31 - 1),
    isa_name=st.sampled_from(ISAS),
)
def test_any_shape(size, dtype, position, isa_name):
    with in_use(isa_name):
        args = make(*size, dtype, seed=position % 1000)
        args["position"].fill_(position)
        expected, after = conv1d_step(args, torch.float64)
        absolute = {name: value.abs() for name, value in args.items() if name in ("x", "conv_state", "weight", "bias")}
        scale = float(conv1d_step(args | absolute, torch.float64)[0].max())  # sum of |weight| |tap|, and |bias|
        out = dilated_conv_update(**args)
        assert float((out.double() - expected).abs().max()) <= 2 * torch.finfo(dtype).eps * scale
        assert torch.equal(args["conv_state"], after)


# ---- torch's own machinery


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(2, 5, 7, 2, 3), (1, 4, 4, 1, 2), (0, 4, 4, 2, 1)], ids=str)
def test_opcheck(size, device):
    args = make(*size, device=device)
    dilation = args.pop("dilation")
    torch.library.opcheck(OP, tuple(args.values()), {"dilation": dilation})


class Layer(torch.nn.Module):
    """Two steps of a causal Conv1d that keeps its ring in buffers."""

    def __init__(self, dim=8, width=2, dilation=3):
        super().__init__()
        self.conv = torch.nn.Conv1d(dim, dim, width, dilation=dilation).requires_grad_(False)
        self.dilation = dilation
        self.register_buffer("state", torch.zeros(2, (width - 1) * dilation, dim))

    def forward(self, x, position):
        args = (self.conv.weight, self.conv.bias)
        first = dilated_conv_update(x, self.state, *args, position, dilation=self.dilation)
        return dilated_conv_update(first.tanh(), self.state, *args, position + 1, dilation=self.dilation)


def test_compile_fullgraph_dynamic():
    def step(x, conv_state, weight, bias, position, dilation):
        return 2 * dilated_conv_update(x, conv_state, weight, bias, position, dilation=dilation)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = "inductor" if C else "aot_eager"  # inductor needs a compiler too
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for size in ((4, 5, 7, 3, 10), (6, 11, 9, 3, 8), (5, 12, 16, 3, 20)):
        args = make(*size)
        eager = copy(args)
        assert torch.equal(compiled(**args), step(**eager))
        assert torch.equal(args["conv_state"], eager["conv_state"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_refuses_bad_arguments():
    args = make(2, 5, 7, 2, 3)
    compiled = torch.compile(dilated_conv_update, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="weight must have dim_in = 5"):
        compiled(**args | {"weight": torch.randn(7, 6, 2)})


def test_export():
    layer, args = Layer(), (torch.randn(2, 8), torch.tensor([0, 4], dtype=torch.int32))
    exported = torch.export.export(deepcopy(layer), args).module()
    assert torch.equal(exported(*args), layer(*args))
    assert torch.equal(exported.state, layer.state) and layer.state.count_nonzero() > 0


def test_vmap():
    """Over models and streams: every mapped argument differs."""
    calls = [make(2, 5, 7, 2, 3, seed=i) for i in range(4)]
    stacked = [torch.stack([call[name] for call in calls]) for name in list(calls[0])[:5]]

    def step(*args):
        return dilated_conv_update(*args, dilation=3)

    out = torch.vmap(step)(*stacked)
    for i, call in enumerate(calls):
        assert torch.equal(out[i], dilated_conv_update(**call))
        assert torch.equal(stacked[1][i], call["conv_state"])
    with pytest.raises(ValueError, match="conv_state must be mapped"):
        torch.vmap(step, in_dims=(0, None, None, None, None))(stacked[0], *[t[0] for t in stacked[1:]])


def test_refuses_gradients():
    for name in ("x", "conv_state", "weight", "bias"):
        args = make(2, 5, 7, 2, 3)
        args[name].requires_grad_()
        before = args["conv_state"].detach().clone()
        with pytest.raises(RuntimeError, match=f"{name} requires grad"):
            dilated_conv_update(**args)
        assert torch.equal(args["conv_state"], before)
        with torch.no_grad():
            assert not dilated_conv_update(**args).requires_grad


# ---- wrong calls

Z = torch.zeros
WRONG = {
    "x is a list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x has one dimension": ({"x": Z(5)}, ValueError, r"x must have 2 dimensions, got shape \(5,\)"),
    "x is int64": ({"x": Z(2, 5).long()}, TypeError, "x must be float32.*torch.int64"),
    "x is sparse": ({"x": Z(2, 5).to_sparse()}, TypeError, "x must be a dense tensor.*sparse_coo"),
    "x is elsewhere": ({"x": Z(2, 5, device="meta")}, ValueError, "on the device of x .meta.*cpu"),
    "weight is float64": ({"weight": Z(7, 5, 2).double()}, TypeError, "weight must be torch.float32.*float64"),
    "weight has two dimensions": ({"weight": Z(7, 5)}, ValueError, r"weight must have 3 dim.*\(7, 5\)"),
    "weight has other inputs": ({"weight": Z(7, 6, 2)}, ValueError, r"weight must have dim_in = 5.*\(7, 6, 2\)"),
    "weight has no width": ({"weight": Z(7, 5, 0)}, ValueError, r"width >= 1, got shape \(7, 5, 0\)"),
    "conv_state is short": ({"conv_state": Z(2, 2, 5)}, ValueError, r"conv_state.*\(2, 3, 5\), got \(2, 2, 5\)"),
    "conv_state has another batch": ({"conv_state": Z(1, 3, 5)}, ValueError, r"conv_state.*got \(1, 3, 5\)"),
    "conv_state is expanded": ({"conv_state": Z(1, 3, 5).expand(2, 3, 5)}, ValueError, "expanded.*0, 5, 1"),
    "conv_state is float16": ({"conv_state": Z(2, 3, 5).half()}, TypeError, "conv_state must be.*float16"),
    "conv_state is None": ({"conv_state": None}, TypeError, "conv_state must be a tensor, got NoneType"),
    "bias is short": ({"bias": Z(6)}, ValueError, r"bias must have shape \(dim_out,\) = \(7,\), got \(6,\)"),
    "bias is a number": ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    "position is int64": ({"position": Z(2).long()}, TypeError, "position must be int32.*int64"),
    "position is a number": ({"position": 3}, TypeError, "position must be a tensor, got int"),
    "position has another batch": ({"position": Z(3).int()}, ValueError, r"position.*got \(3,\)"),
    "position is negative": ({"position": torch.tensor([4, -1]).int()}, ValueError, "position.*>= 0, got -1"),
    "dilation is 0": ({"dilation": 0}, ValueError, "dilation must be >= 1.*got 0"),
    "dilation is negative": ({"dilation": -3}, ValueError, "dilation must be >= 1.*got -3"),
    "dilation is huge": ({"dilation": 2**62}, ValueError, "dilation must be .*got 4611686018427387904"),
    "dilation is a float": ({"dilation": 3.0}, TypeError, "dilation must be an integer, got float"),
    "dilation does not fit": ({"dilation": 4}, ValueError, r"conv_state.*\(2, 4, 5\), got \(2, 3, 5\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_call(case):
    change, error, message = WRONG[case]
    args = make(2, 5, 7, 2, 3)
    states = [t for t in (args["conv_state"], change.get("conv_state")) if t is not None]
    before = [t.clone() for t in states]
    with pytest.raises(error, match=message):
        dilated_conv_update(**args | change)
    assert all(torch.equal(state, old) for state, old in zip(states, before, strict=True))
    with pytest.raises((RuntimeError, TypeError, ValueError)):  # the op itself rechecks everything
        OP(**args | change)
    assert all(torch.equal(state, old) for state, old in zip(states, before, strict=True))


@gpu
def test_any_position_is_safe_on_a_gpu():
    args = make(4, 5, 7, 3, 3, device="cuda")
    args["position"].copy_(torch.tensor([-1, -(2**31), 2**31 - 1, 5]))
    expected, after = conv1d_step(args, torch.float64)
    torch.testing.assert_close(dilated_conv_update(**args).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(args["conv_state"], after)


@gpu
@pytest.mark.parametrize("size", [(4, 64, 64, 2, 16), (2, 512, 512, 2, 4)], ids=str)
def test_cuda_graph_and_side_stream(size):
    args = make(*size, device="cuda")
    eager = copy(args)
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        dilated_conv_update(**copy(args))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = dilated_conv_update(**args)
            args["position"] += 1
        for _ in range(5):
            graph.replay()
            expected = dilated_conv_update(**eager)
            eager["position"] += 1
            assert torch.equal(out, expected)
    assert torch.equal(args["conv_state"], eager["conv_state"])


# ---- which kernel runs


def test_explain_names_the_kernel(isa):
    args = make(2, 64, 32, 2, 4)
    answer = explain(dilated_conv_update, **args)
    assert answer.flops == 2 * 2 * 32 * 128
    assert answer.bytes == 4 * (32 * 128 + 32 + 2 * (3 * 64 + 32))
    assert answer == explain("dilated_conv_update", **args)
    if C is None:
        assert answer.kernel == backends()["dilated_conv_update"]["cpu"].split(":")[0] == "reference (plain torch)"
        return
    assert answer.kernel == f"cpu_{isa}"
    assert explain(dilated_conv_update, **make(2, 64, 32, 2, 4, torch.float64)).kernel == "cpu_loop"


@pytest.mark.skipif(C is None or len(ISAS) == 1, reason="one instruction set only")
def test_each_instruction_set_runs_its_own_code():
    """Sums in 4, 8 and 16 lanes differ in the last bits; in the same lanes they do not."""
    args, results, before = make(1, 1000, 400, 2, 1), {}, C.isa()
    for name in ISAS:
        C.set_isa(name)
        results[name] = dilated_conv_update(**copy(args))
    C.set_isa(before)
    assert not torch.equal(results["generic"], results["avx2"])
    if "avx512" in results:
        assert not torch.equal(results["avx512"], results["avx2"])


@pytest.mark.skipif(C is None, reason="nothing is compiled")
def test_cuda_plan():
    def plan(batch, dim_out, taps, multiprocessors=132, float64=False):
        return C.dilated_conv_update_plan(True, float64, batch, dim_out, taps, multiprocessors)[0]

    assert plan(1, 64, 128) == "cuda_fused"
    assert plan(1, 1024, 2048) == "cuda_split"  # many weights, one row
    assert plan(132, 1024, 2048) == "cuda_fused"  # a row for every multiprocessor
    assert plan(132, 8, 12289) == "cuda_split"  # taps beyond 48 KB of shared memory
    assert plan(132, 8, 12288) == "cuda_fused"
    assert plan(132, 8, 6145, float64=True) == "cuda_split"


# ---- the CUDA kernels, run on the host

ON_HOST = """
#include "dilated_conv_update_cuda.cu"
CUDA_ON_HOST_EXPORT int update(const int64_t* s, void** data, int64_t kernel, int64_t dtype) {
  using namespace audiokernels;
  DilatedConvUpdate c{s[0], s[1], s[2], s[3], s[4], s[1] * s[3], (s[3] - 1) * s[4]};
  c.x = data[0], c.conv_state = data[1], c.weight = data[2], c.bias = data[3];
  c.position = static_cast<const int32_t*>(data[4]), c.out = data[5];
  c.x_stride[0] = c.dim_in, c.state_stride[0] = c.length * c.dim_in, c.state_stride[1] = c.dim_in;
  c.x_stride[1] = c.state_stride[2] = c.bias_stride = c.position_stride = 1;
  c.weight_stride = c.taps;
  return dilated_conv_update_cuda(c, DilatedConvUpdateKernel(kernel), Dtype(dtype), nullptr);
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("kernel", [2, 3], ids=["fused", "split"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_for_a_gpu_on_the_host(dtype, kernel):
    """The same source as on a GPU, its threads in random order; several steps, so that a ring wraps."""
    for seed, size in enumerate([*SIZES[:4], (7, 33, 9, 3, 2), (2, 100, 40, 5, 1)]):
        args = make(*size, dtype, seed=seed)
        out = torch.full((size[0], size[2]), torch.nan, dtype=dtype)
        for _ in range(4):
            expected, after = conv1d_step(args, torch.float64)
            plain, _ = conv1d_step(args, dtype)
            tensors = [args[name] for name in ("x", "conv_state", "weight", "bias", "position")] + [out]
            pointers = torch.tensor([t.data_ptr() for t in tensors])
            build(ON_HOST).call("update", torch.tensor(size), pointers, kernel, DTYPES.index(dtype), seed=seed)
            bound = 2 * (plain.double() - expected).abs().max() + torch.finfo(dtype).eps * expected.abs().max()
            assert (out.double() - expected).abs().max() <= bound + 1e-13 * expected.abs().max()
            assert torch.equal(args["conv_state"], after)
            args["x"] = torch.randn(args["x"].shape).to(dtype)
            args["position"] += 1

"""haar_dwt and haar_idwt: PyWavelets' values, inverses and transposes of each other, padding, torch's machinery."""

import functools
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import UNCOMPILED, distinct_instruction_sets, in_use

from audiokernels import explain, haar_dwt, haar_idwt, haar_pool
from audiokernels._library import C
from audiokernels.backends import REFERENCE
from audiokernels.haar_dwt import haar_dwt_ref, haar_idwt_ref

DWT = torch.ops.audiokernels.haar_dwt.default
IDWT = torch.ops.audiokernels.haar_idwt.default
pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ISAS = distinct_instruction_sets("haar_dwt")
COMPILED = ISAS != UNCOMPILED
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CASES = [(1, 1, 1, 0), (2, 1, 3, 2), (1, 63, 5, 1), (3, 100, 7, 3), (2, 1000, 4, 5), (1, 1031, 9, 10), (2, 64, 33, 6)]
cases = pytest.mark.parametrize("case", CASES, ids=str)
pads = pytest.mark.parametrize("pad", ["zero", "edge"])


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this processor has, each in turn."""
    with in_use(request.param) as name:
        yield name


def make(case, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case[:3], generator=generator, dtype=torch.float64).to(device, dtype)


@functools.cache
def matrix(length, n_levels):
    """The packed transform as an orthonormal float64 (length, length), by the definition of the Haar functions."""
    rows = [(n_levels, k, 1.0) for k in range(length >> n_levels)]  # sums, then differences from slow to fast
    rows += [(level, k, -1.0) for level in range(n_levels, 0, -1) for k in range(length >> level)]
    result = torch.zeros(length, length, dtype=torch.float64)
    for i, (level, k, sign) in enumerate(rows):
        size = 1 << level
        result[i, k * size : (k + 1) * size] = 2 ** (-level / 2)
        if level:
            result[i, k * size + size // 2 : (k + 1) * size] *= sign
    return result


def padded(x, n_levels, pad):
    more = -x.shape[1] % (1 << n_levels)
    last = x[:, -1:].expand(-1, more, -1)
    return torch.cat([x, last if pad == "edge" else torch.zeros_like(last)], 1)


def tolerance(dtype, scale):
    return scale * max(torch.finfo(dtype).eps / 2, 1e-14 if dtype == torch.float64 else 1e-6)


@cases
@pads
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_values(case, device, dtype, pad, isa):
    x = make(case, dtype, device)
    out = haar_dwt(x, case[3], pad=pad)
    whole = padded(x.cpu().double(), case[3], pad)
    want = torch.einsum("ij,bjc->bic", matrix(whole.shape[1], case[3]), whole)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == want.shape
    assert float((out.cpu().double() - want).abs().max()) <= tolerance(dtype, float(want.abs().max()))
    back = haar_idwt(out, case[3], seqlen=case[1])
    assert back.shape == x.shape and back.is_contiguous() and back.dtype == dtype
    want = torch.einsum("ji,bjc->bic", matrix(whole.shape[1], case[3]), out.cpu().double())[:, : case[1]]
    assert float((back.cpu().double() - want).abs().max()) <= tolerance(dtype, float(want.abs().max()))
    assert float((back - x).abs().max()) <= 8 * torch.finfo(dtype).eps * max(1.0, float(out.abs().max()))


@pads
@pytest.mark.parametrize("case", [case for case in CASES if case[3]], ids=str)
def test_equals_pywavelets(case, pad, isa):
    if importlib.util.find_spec("pywt") is None:
        pytest.skip("PyWavelets is not installed")
    pywt = importlib.import_module("pywt")
    x = make(case, torch.float64)
    signal = padded(x, case[3], pad)
    parts = pywt.wavedec(signal.numpy(), "haar", level=case[3], axis=1, mode="periodization")
    want = torch.cat([torch.from_numpy(part) for part in parts], 1)
    torch.testing.assert_close(haar_dwt(x, case[3], pad=pad), want, rtol=0, atol=1e-13)


def test_block_means_are_scaled_sums():
    x = torch.randn(2, 64, 3, dtype=torch.float64)
    for level in range(1, 7):
        coeffs = haar_dwt(x, level)
        blocks = 64 >> level
        means = haar_pool(x, levels=(level,) * 3)
        torch.testing.assert_close(coeffs[:, :blocks] * 2 ** (-level / 2), means[:, :: 1 << level])
        coeffs[:, blocks:] = 0  # keep the sums only
        torch.testing.assert_close(haar_idwt(coeffs, level), means)


@pads
def test_gradients(pad):
    x = torch.randn(2, 13, 2, dtype=torch.float64, requires_grad=True)
    coeffs = torch.randn(2, 16, 2, dtype=torch.float64, requires_grad=True)
    for n_levels in (0, 1, 3):

        def forward(x, n=n_levels):
            return haar_dwt(x, n, pad=pad)

        def inverse(coeffs, n=n_levels):
            return haar_idwt(coeffs, n, seqlen=13 if n == 3 else None)

        for f, arg in ((forward, x), (inverse, coeffs)):
            assert torch.autograd.gradcheck(f, (arg,)) and torch.autograd.gradgradcheck(f, (arg,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_is_the_backward_of_the_other(dtype, isa):
    x = make((2, 100, 5), dtype).requires_grad_()
    coeffs = haar_dwt(x, 3)
    grad = torch.randn(2, 104, 5).to(dtype)
    coeffs.backward(grad)
    assert torch.equal(x.grad, haar_idwt(grad, 3, seqlen=100))
    inverse = grad.clone().requires_grad_()
    haar_idwt(inverse, 3, seqlen=100).backward(x.detach())
    assert torch.equal(inverse.grad, haar_dwt(x.detach(), 3))


@pytest.mark.parametrize("device", DEVICES)
def test_zero_sizes(device):
    for shape in ((0, 5, 4), (2, 0, 4), (2, 5, 0)):
        for pad in ("zero", "edge"):
            x = torch.zeros(shape, device=device, requires_grad=True)
            out = haar_dwt(x, 2, pad=pad)
            assert out.shape == (shape[0], -(-shape[1] // 4) * 4, shape[2])
            back = haar_idwt(out, 2, seqlen=shape[1])
            back.sum().backward()
            assert back.shape == x.grad.shape == shape


def test_what_is_not_finite_stays_inside(isa):
    x = torch.randn(1, 64, 2)
    x[0, 21, 0] = math.nan
    out = haar_dwt(x, 4)
    touched = matrix(64, 4)[:, 21] != 0
    assert torch.equal(out[0, :, 0].isnan(), touched) and out[0, :, 1].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_inside_nan(dtype, device, isa):
    x = make((2, 61, 7), dtype, device)
    want = haar_dwt(x, 3, pad="edge")
    back = haar_idwt(want, 3, seqlen=61)
    for tensor, op, result in (
        (x, lambda v: haar_dwt(v, 3, pad="edge"), want),
        (want, lambda v: haar_idwt(v, 3, seqlen=61), back),
    ):
        for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0)):
            shape = [tensor.shape[i] for i in order]
            buffer = torch.full([2 * n + 3 for n in shape], math.nan, dtype=dtype, device=device)
            view = buffer[tuple(slice(1, 1 + 2 * n, 2) for n in shape)].permute(*(order.index(i) for i in range(3)))
            assert torch.equal(op(view.copy_(tensor)), result)


def test_result_memory_is_fully_written():
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        for case in CASES:
            out = haar_dwt(make(case), case[3])
            assert not out.isnan().any() and not haar_idwt(out, case[3]).isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("batch", [1, 16])
def test_rows_do_not_depend_on_threads(batch):
    x = torch.randn(batch, 1000, 70)
    out = haar_dwt(x, 5)
    back = haar_idwt(out, 5)
    torch.set_num_threads(2)
    assert torch.equal(out, haar_dwt(x, 5)) and torch.equal(back, haar_idwt(out, 5))
    torch.set_num_threads(1)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    seqlen=st.integers(1, 200),
    dim=st.integers(1, 40),
    n_levels=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    pad=st.sampled_from(["zero", "edge"]),
    isa_name=st.sampled_from(ISAS),
)
def test_any_shape(batch, seqlen, dim, n_levels, dtype, pad, isa_name):
    with in_use(isa_name):
        x = make((batch, seqlen, dim), dtype, seed=seqlen)
        out = haar_dwt(x, n_levels, pad=pad)
        want = haar_dwt_ref(x.double(), n_levels, edge=pad == "edge")
        assert float((out.double() - want).abs().max()) <= tolerance(dtype, float(want.abs().max()))
        want = haar_idwt_ref(out.double(), n_levels, seqlen=seqlen)
        back = haar_idwt(out, n_levels, seqlen=seqlen).double()
        assert float((back - want).abs().max()) <= tolerance(dtype, 2 * float(out.double().abs().max()))


# ---- torch's own machinery


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(2, 13, 5), (0, 3, 5), (1, 0, 5)], ids=str)
def test_opcheck(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    for edge in (False, True):
        torch.library.opcheck(DWT, (x, 2), {"edge": edge})
    coeffs = haar_dwt(x, 2).detach().requires_grad_()
    torch.library.opcheck(IDWT, (coeffs, 2), {"seqlen": shape[1]})
    torch.library.opcheck(IDWT, (coeffs, 2))


def test_compile_fullgraph_dynamic():
    def step(x):
        coeffs = haar_dwt(x.sin(), 3, pad="edge")
        return haar_idwt(coeffs.cos(), 3, seqlen=x.shape[1])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="inductor" if C else "aot_eager")
    for shape in ((2, 70, 5), (3, 91, 6), (4, 133, 7)):
        x = torch.randn(shape, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        out, want = compiled(x), step(twin)
        torch.testing.assert_close(out, want)
        out.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Layer(torch.nn.Module):
    """There and back."""

    def forward(self, x):
        return haar_idwt(haar_dwt(x, 2), 2)


def test_export():
    x = torch.randn(2, 40, 8)
    assert torch.equal(torch.export.export(Layer(), (x,)).module()(x), Layer()(x))


def test_vmap():
    x = torch.randn(3, 4, 30, 8)
    coeffs = torch.vmap(lambda v: haar_dwt(v, 2))(x)
    assert torch.equal(coeffs, haar_dwt(x.flatten(0, 1), 2).unflatten(0, (3, 4)))
    back = torch.vmap(lambda v: haar_idwt(v, 2, seqlen=30), in_dims=1, out_dims=1)(coeffs.transpose(0, 1))
    torch.testing.assert_close(back, x.transpose(0, 1))


def test_integers_of_numpy_are_integers():
    x = torch.randn(1, 8, 4)
    coeffs = haar_dwt(x, np.int32(2))
    assert torch.equal(coeffs, haar_dwt(x, 2))
    assert torch.equal(haar_idwt(coeffs, np.int64(2), seqlen=np.int64(7)), haar_idwt(coeffs, 2, seqlen=7))


def test_autocast_keeps_the_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert haar_dwt(torch.randn(1, 8, 4), 1).dtype == haar_idwt(torch.randn(1, 8, 4), 1).dtype == torch.float32


@gpu
def test_cuda_graph():
    x = torch.randn(2, 4096, 64, device="cuda")
    haar_idwt(haar_dwt(x, 10), 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = haar_idwt(haar_dwt(x, 10), 10)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, x)


@gpu
@pytest.mark.slow
def test_offsets_beyond_2_to_the_31():
    x = torch.randn(3, 704, 33, device="cuda").bfloat16()
    base = torch.empty(2**31 + 2**28, dtype=torch.bfloat16, device="cuda")
    want = haar_dwt(x, 6)
    back = haar_idwt(want, 6)
    for strides in ((2**30, 33, 1), (1, 3 * 10**6, 3)):
        assert torch.equal(haar_dwt(base.as_strided(x.shape, strides).copy_(x), 6), want)
        assert torch.equal(haar_idwt(base.as_strided(x.shape, strides).copy_(want), 6), back)


# ---- wrong calls

Z = torch.zeros
WRONG = [
    (haar_dwt, ([1.0], 2), {}, TypeError, "x must be a tensor, got list"),
    (haar_dwt, (Z(3, 4), 2), {}, ValueError, "x must have 3 dimensions"),
    (haar_dwt, (Z(1, 3, 4).int(), 2), {}, TypeError, "x must be float32.*int32"),
    (haar_dwt, (Z(1, 3, 4), 2.0), {}, TypeError, "n_levels must be an integer, got float"),
    (haar_dwt, (Z(1, 3, 4), -1), {}, ValueError, r"n_levels must be 0..30, got -1"),
    (haar_dwt, (Z(1, 3, 4), 31), {}, ValueError, r"n_levels must be 0..30, got 31"),
    (haar_dwt, (Z(1, 3, 4), 2), {"pad": "wrap"}, ValueError, "pad must be .zero. or .edge., got 'wrap'"),
    (haar_idwt, (Z(1, 6, 4), 2), {}, ValueError, "coeffs must have a multiple of 2.n_levels = 4 steps, got 6"),
    (haar_idwt, (Z(1, 8, 4), 2), {"seqlen": 4}, ValueError, "seqlen must give 8 steps when padded.*got 4"),
    (haar_idwt, (Z(1, 8, 4), 2), {"seqlen": 9}, ValueError, "seqlen must give 8 steps when padded.*got 9"),
    (haar_idwt, (Z(1, 8, 4), 2), {"seqlen": -1}, ValueError, "seqlen must give 8 steps.*got -1"),
    (haar_idwt, (Z(1, 8, 4), 2), {"seqlen": 7.0}, TypeError, "seqlen must be an integer or None, got float"),
]


@pytest.mark.parametrize(("op", "args", "options", "error", "message"), WRONG)
def test_wrong_call(op, args, options, error, message):
    with pytest.raises(error, match=message):
        op(*args, **options)


@pytest.mark.parametrize(("op", "args"), [(DWT, (Z(1, 3, 4), 31)), (DWT, (Z(3, 4), 1)), (IDWT, (Z(1, 6, 4), 2))])
def test_the_ops_check_again(op, args):
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        op(*args)


def test_explain(isa):
    x = torch.randn(2, 40, 64)
    for answer in (explain(haar_dwt, x, 3), explain("haar_idwt", x, 3)):
        assert answer.bytes == 8 * x.numel() and answer.flops == 4 * (x.numel() - x.numel() // 8)
        assert answer.kernel == (f"cpu_{isa}" if COMPILED else REFERENCE)

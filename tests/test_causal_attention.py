"""causal_attention: values, gradients, causality, NaN, strides, merging by lse, torch's machinery, errors, explain."""

import importlib
import importlib.util
import sys
import types
from itertools import product

import pytest
import torch
from attention_cases import (
    DTYPES,
    Errors,
    dense,
    expanded,
    gpu,
    gradients,
    in_turn,
    kernels,
    main_kernels,
    make,
    mask,
    plain,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from audiokernels import _library, backends, causal_attention, explain
from audiokernels._library import C
from audiokernels.causal_attention import (
    causal_attention_backward,
    causal_attention_backward_ref,
    causal_attention_ref,
    visible_pairs,
)

pytestmark = pytest.mark.usefixtures("one_thread")

OP = torch.ops.audiokernels.causal_attention.default
BACKWARD = torch.ops.audiokernels.causal_attention_backward.default
KERNELS = kernels("causal_attention")
SIZES = [  # (batch, nheads, nheads_kv, seqlen_q, seqlen_k, headdim), window
    ((1, 2, 2, 1, 1, 8), None),
    ((2, 4, 2, 63, 63, 16), None),
    ((1, 3, 1, 100, 131, 24), None),
    ((1, 2, 2, 129, 129, 32), 17),
    ((1, 2, 2, 70, 201, 64), 100),
    ((1, 1, 1, 150, 150, 13), 1),
    ((1, 2, 1, 65, 65, 128), None),
    ((1, 1, 1, 33, 47, 256), 40),
]
SEEDS = range(3)


@pytest.fixture(params=main_kernels("causal_attention"))
def kernel(request):
    if request.param == "cuda_sm90" and request.node.callspec.params.get("dtype") != torch.bfloat16:
        pytest.skip("CUDA C++ takes bfloat16 alone")
    yield from in_turn(request.param)


@pytest.fixture(params=KERNELS)
def every_kernel(request):
    yield from in_turn(request.param)


def random_like(*tensors):
    return [torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x) for x in tensors]


# ---- values and gradients


@pytest.mark.parametrize("scaled", [1, 3, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(kernel, dtype, scaled):
    accumulate = torch.promote_types(dtype, torch.float32)
    errors, lse_errors = Errors(dtype, 64 * scaled**2), Errors(accumulate, 64 * scaled**2)
    if kernel.device == "cuda" and dtype in (torch.bfloat16, torch.float16):  # their exponentials may be rounded
        lse_errors.ulp += torch.finfo(dtype).eps / 4
    for (size, window), seed in product(SIZES, SEEDS):
        q, k, v = make(size, dtype, kernel.device, scale=scaled, seed=seed)
        right, right_lse = dense(q.double(), k.double(), v.double(), window=window)
        out, lse = kernel(q, k, v, window=window)
        assert (out.dtype, lse.dtype) == (dtype, accumulate) and out.is_contiguous()
        errors.add(out, plain(q, k, v, window=window), right)
        lse_errors.add(lse, dense(*(x.to(accumulate) for x in (q, k, v)), window=window)[1], right_lse)
    errors.check()
    lse_errors.check()


@pytest.mark.parametrize("scaled", [1, 3, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(kernel, dtype, scaled):
    errors = [Errors(dtype, 256 * scaled**2) for _ in range(3)]
    for (size, window), seed in product(SIZES, SEEDS):
        inputs = make(size, dtype, kernel.device, scale=scaled, grad=True, seed=seed)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        (grad,) = random_like(inputs[0].detach())
        right = gradients([dense(*exact, window=window)[0]], exact, [grad.double()])
        peers = gradients([plain(*inputs, window=window)], inputs, [grad])
        results = gradients(kernel(*inputs, window=window), inputs, [grad, None])
        for error, *each in zip(errors, results, peers, right, strict=True):
            assert each[0].dtype == dtype
            error.add(*each, at_least=scaled)
    for error in errors:
        error.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", ["both", "lse"])
def test_gradients_of_lse(kernel, dtype, which):
    errors = [Errors(dtype, 64) for _ in range(3)]
    for size, window in SIZES:
        inputs = make(size, dtype, kernel.device, grad=True)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        results = kernel(*inputs, window=window)
        grads = random_like(*(x.detach() for x in results))
        if which == "lse":
            grads[0] = torch.zeros_like(grads[0])
        right = gradients(dense(*exact, window=window), exact, [grad.double() for grad in grads])
        peers = gradients(dense(*inputs, window=window), inputs, grads)
        for error, *each in zip(errors, gradients(results, inputs, grads), peers, right, strict=True):
            error.add(*each, at_least=1)
    for error in errors:
        error.check()


def test_any_lengths_and_windows(every_kernel):
    check_lengths_and_windows(every_kernel, 50, seed=99)


@pytest.mark.parametrize("seed", range(7))
def test_lengths_and_windows(kernel, seed):
    check_lengths_and_windows(kernel, 50, seed)


def check_lengths_and_windows(kernel, draws, seed):
    """Values and gradients of random small calls against a dense mask."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    for _ in range(draws):
        group, nheads_kv, seqlen_k, headdim = draw(1, 2), draw(1, 2), draw(1, 90), draw(8, 24)
        if kernel.device == "cuda":
            headdim = 16  # Triton would compile others anew for nearly every draw
        size = (1, group * nheads_kv, nheads_kv, draw(1, seqlen_k), seqlen_k, headdim)
        window = None if draw(0, 3) == 0 else draw(1, seqlen_k + 5)
        scale = None if draw(0, 1) else draw(-20, 20) / 20
        inputs = make(size, torch.float32, kernel.device, seed=draw(0, 999), grad=True)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        results, expected = kernel(*inputs, scale, window), dense(*exact, scale, window)
        grads = random_like(*(x.detach() for x in results))
        for result, truth in zip(
            [*results, *gradients(results, inputs, grads)],
            [*expected, *gradients(expected, exact, [grad.double() for grad in grads])],
            strict=True,
        ):
            error = (result.detach().double() - truth.detach()).abs().max()
            assert float(error) <= 2e-5 * max(1, float(truth.detach().abs().max())), size


@settings(max_examples=40, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)),
    lengths=st.tuples(st.integers(1, 150), st.integers(0, 150)),
    headdim=st.integers(8, 256),
    window=st.none() | st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
    transposed=st.booleans(),
    name=st.sampled_from(KERNELS),
)
def test_any_shape(heads, lengths, headdim, window, dtype, seed, transposed, name):
    batch, group, nheads_kv = heads
    size = (batch, group * nheads_kv, nheads_kv, lengths[0], sum(lengths), headdim)
    for kernel in in_turn(name):
        q, k, v = make(size, dtype, kernel.device, seed=seed)
        expected, _ = dense(q.double(), k.double(), v.double(), window=window)
        if transposed:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        out, _ = kernel(q, k, v, window=window)
        sums = float((q.double().norm(dim=-1).amax() * k.double().norm(dim=-1).amax()) * headdim**-0.5)
        bound = 3 * torch.finfo(dtype).eps + sums * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert float((out.double() - expected).abs().max()) <= bound * float(v.abs().max())


def test_gradcheck(kernel):
    for size, window, scale in [
        ((1, 2, 1, 3, 4, 8), 2, 0.7),
        ((2, 4, 2, 5, 7, 8), 3, None),
        ((2, 2, 2, 6, 6, 9), None, None),
        ((2, 3, 1, 4, 20, 8), 2, -0.3),
    ]:
        inputs = make(size, torch.float64, kernel.device, grad=True)
        assert gradcheck(lambda *args, o=(scale, window): kernel(*args, *o), inputs, fast_mode=size[0] > 1)


@pytest.mark.parametrize("device", sorted({"cuda" if name == "cuda" else "cpu" for name in KERNELS}))
def test_gradgradcheck(device):
    for size, window, scale in [((2, 4, 2, 3, 5, 8), 3, 0.7), ((1, 2, 2, 4, 4, 8), None, None)]:
        inputs = make(size, torch.float64, device, grad=True)
        options = {"scale": scale, "window": window}
        assert gradgradcheck(
            lambda *args, o=options: causal_attention(*args, return_lse=True, **o), inputs, fast_mode=True
        )
        assert gradgradcheck(lambda *args, o=options: causal_attention(*args, **o), inputs, fast_mode=True)


def test_third_derivative():
    inputs = make((1, 2, 1, 3, 4, 8), torch.float64, grad=True)

    def gradient_norm(function, *args):
        out, lse = function(*args)
        first = torch.autograd.grad(out.sin().sum() + lse.square().sum(), args, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), args, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in second), args)

    def op(*args):
        return causal_attention(*args, window=3, return_lse=True)

    expected = gradient_norm(lambda *args: dense(*args, window=3), *inputs)
    for result, truth in zip(gradient_norm(op, *inputs), expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", sorted({"cuda" if name == "cuda" else "cpu" for name in KERNELS}))
def test_double_backward_through_every_kernel(dtype, device):
    inputs = make((1, 4, 2, 140, 150, 16), dtype, device, grad=True)
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def penalty(function, args):
        first = torch.autograd.grad(function(*args, window=70)[0].double().square().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(x.double().square().sum() for x in first), args)

    results = penalty(lambda *args, window: causal_attention(*args, window=window, return_lse=True), inputs)
    for result, truth in zip(results, penalty(dense, exact), strict=True):
        error = float((result.double() - truth).abs().max() / truth.abs().max())
        assert error <= (0.03 if dtype == torch.bfloat16 else 1e-5)


# ---- who sees what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 50])
def test_the_future_changes_no_bit(kernel, dtype, window):
    size = (1, 2, 1, 200, 230, 16)
    q, k, v = make(size, dtype, kernel.device)
    out, lse = kernel(q, k, v, window=window)
    for t, factor in product((1, 64, 100, 128, 199), (1, 1000)):
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[:, :, x.shape[2] - 200 + t :] = factor * torch.randn_like(x[:, :, x.shape[2] - 200 + t :])
        changed, changed_lse = kernel(*other, window=window)
        assert torch.equal(changed[:, :, :t], out[:, :, :t]) and torch.equal(changed_lse[:, :, :t], lse[:, :, :t])
        assert not torch.equal(changed[:, :, t:], out[:, :, t:])


@pytest.mark.parametrize("window", [None, 50])
def test_the_past_changes_no_bit_backward(kernel, window):
    """Gradients of the keys from t on do not depend on the queries before t."""
    inputs = make((1, 2, 1, 200, 200, 16), torch.float32, kernel.device, grad=True)
    (grad,) = random_like(inputs[0].detach())
    _, dk, dv = gradients(kernel(*inputs, window=window), inputs, [grad, None])
    for t in (1, 64, 100, 199):
        q, other = inputs[0].detach().clone(), grad.clone()
        q[:, :, :t] += 3
        other[:, :, :t] -= 5
        changed = [q.requires_grad_(), *inputs[1:]]
        _, dk2, dv2 = gradients(kernel(*changed, window=window), changed, [other, None])
        assert torch.equal(dk2[:, :, t:], dk[:, :, t:]) and torch.equal(dv2[:, :, t:], dv[:, :, t:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("window", "where"), [(None, 77), (30, 77), (30, 128), (None, 199), (1, 5), (90, 0)])
def test_what_is_not_finite_stays_where_causality_allows(kernel, window, where, bad):
    clean = make((2, 4, 2, 180, 200, 16), torch.float32, kernel.device)
    before, redone = kernel(*clean, window=window), 5e-6 if kernel.device == "cuda" else 0  # in another order
    seeing = mask(180, 200, window)[:, where].to(kernel.device)
    for which in range(3):
        inputs = [x.clone() for x in clean]
        row = where - 20 if which == 0 else where
        if row < 0:
            continue
        inputs[which][1, 1, row, 3] = bad
        out, lse = kernel(*inputs, window=window)
        reached = torch.zeros(2, 4, 180, dtype=torch.bool, device=kernel.device)
        if which == 0:
            reached[1, 1, row] = True
        else:
            reached[1, 2:] = seeing
        for result, old in zip((out, lse[..., None]), (before[0], before[1][..., None]), strict=True):
            assert torch.equal(result[~reached], old[~reached])
        if which == 2:  # one column of v
            for result, old in ((lse, before[1]), (out[..., :3], before[0][..., :3])):
                assert torch.allclose(result, old, rtol=redone, atol=redone)
            assert not out[reached][:, 3].isfinite().any()
        elif bad != bad:
            assert out[reached].isnan().all() and lse[reached].isnan().all()


@pytest.mark.parametrize(("window", "where"), [(None, 77), (30, 77), (30, 128), (1, 5)])
def test_nan_stays_where_causality_allows_backward(kernel, window, where):
    clean = make((2, 4, 2, 180, 200, 16), torch.float32, kernel.device)
    grads = [torch.randn_like(clean[0]), None]
    before = None
    for which in [None, *range(4)]:  # nothing, q, k, v, grad_out
        tensors = [x.clone() for x in (*clean, grads[0])]
        if which is not None:
            tensors[which][1, 1, where - 20 if which in (0, 3) else where, 3] = torch.nan
        inputs = [x.requires_grad_() for x in tensors[:3]]
        results = gradients(kernel(*inputs, window=window), inputs, [tensors[3], None])
        if which is None:
            before = results
            continue
        seen = mask(180, 200, window).to(kernel.device)
        touched = torch.zeros(180, dtype=torch.bool, device=kernel.device)  # rows of dS and P that are NaN
        if which in (0, 3):
            if where < 20:
                continue
            touched[where - 20] = True
            heads = torch.tensor([False, True, False, False])
        else:
            touched |= seen[:, where]
            heads = torch.tensor([False, False, True, True])
        reach_q = torch.zeros(2, 4, 180, dtype=torch.bool, device=kernel.device)
        reach_q[1, heads.to(kernel.device)] = touched
        reach_k = torch.zeros(2, 2, 200, dtype=torch.bool, device=kernel.device)
        reach_k[1, 0 if which in (0, 3) else 1] = seen[touched].any(0)
        for result, old, reach in zip(results, before, (reach_q, reach_k, reach_k), strict=True):
            assert torch.equal(result[~reach], old[~reach])
        assert results[0][reach_q].isnan().any(-1).all() and results[1][reach_k].isnan().any(-1).all()


# ---- memory


@pytest.mark.parametrize("size", [(0, 2, 1, 3, 4, 8), (2, 0, 1, 3, 4, 8), (2, 0, 0, 3, 4, 8), (2, 2, 1, 0, 4, 8),
                                  (2, 2, 1, 0, 0, 8)], ids=str)  # fmt: skip
def test_zero_sizes(kernel, size):
    inputs = make(size, torch.float32, kernel.device, grad=True)
    results = kernel(*inputs)
    assert results[0].shape == inputs[0].shape and results[1].shape == inputs[0].shape[:3]
    for grad, x in zip(gradients(results, inputs, random_like(*results)), inputs, strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_offsets_inside_nan(kernel, dtype):
    """Every tensor a view with odd strides in memory filled with NaN: nothing beside it is read."""
    inputs = make((2, 4, 2, 37, 50, 16), dtype, kernel.device)
    grads = random_like(inputs[0])
    out, lse = kernel(*inputs, window=20)
    backward = causal_attention_backward_ref if kernel.name == "reference" else causal_attention_backward
    expected = backward(grads[0], lse, *inputs, out, lse, window=20)

    def view(tensor):
        buffer = torch.full([3 * n + 2 for n in reversed(tensor.shape)], torch.nan, dtype=tensor.dtype)
        inside = (slice(1, -1, 3),) * tensor.ndim
        return buffer.to(tensor.device).permute(*reversed(range(tensor.ndim)))[inside].copy_(tensor)

    views = [view(x) for x in (*grads, lse, *inputs, out, lse)]
    assert not any(x.is_contiguous() for x in views)
    assert all(torch.equal(x, y) for x, y in zip(kernel(*views[2:5], window=20), (out, lse), strict=True))
    results = backward(*views, window=20)
    if kernel.name == "reference":  # its sums are torch's
        tolerance = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)
    else:
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
    for offset in range(1, 4):  # misaligned by some elements
        shifted = [torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape) for x in inputs]
        assert torch.equal(kernel(*shifted, window=20)[0], out)


def test_expanded_inputs(kernel):
    q, k, v = make((2, 4, 2, 20, 20, 16), torch.float32, kernel.device)
    q, k, v = q[:, :1].expand(2, 4, 20, 16), k[:1, :, :1].expand(2, 2, 20, 16), v[..., :1].expand(2, 2, 20, 16)
    out, lse = kernel(q, k, v)
    assert torch.equal(out, kernel(q.contiguous(), k.contiguous(), v.contiguous())[0])
    inputs = [x.contiguous().requires_grad_() for x in (q, k, v)]
    (grad,) = random_like(q)
    wide = torch.ones(1, device=kernel.device).expand_as(out)
    for g in (grad, wide):
        a = gradients(kernel(*inputs), inputs, [g, None])
        b = gradients(kernel(*inputs), inputs, [g.contiguous(), None])
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_memory_order_is_kept(kernel):
    """A model's (batch, seqlen, nheads, headdim) needs no copy on either side."""
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in make((2, 4, 2, 9, 12, 8), device=kernel.device)]
    inputs = [x.requires_grad_() for x in inputs]
    results = kernel(*inputs)
    assert results[0].transpose(1, 2).is_contiguous() and results[1].is_contiguous()
    for grad in gradients(results, inputs, random_like(*results)):
        assert grad.transpose(1, 2).is_contiguous()
    fused = torch.randn(2, 9, 3, 4, 8, device=kernel.device).unbind(2)  # views of one projection
    assert kernel(*(x.transpose(1, 2) for x in fused))[0].is_contiguous()


def test_result_memory_is_fully_written(kernel):
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        for size, window in SIZES:
            inputs = make(size, torch.float32, kernel.device, grad=True)
            results = kernel(*inputs, window=window)
            assert not any(x.isnan().any() for x in (*results, *gradients(results, inputs, random_like(*results))))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_bit_equal(kernel, dtype):
    inputs = make((2, 4, 2, 150, 190, 16), dtype, kernel.device, grad=True)
    (grad,) = random_like(inputs[0].detach())
    first = None
    for _ in range(250 if kernel.device == "cuda" else 5):
        results = kernel(*inputs, window=100)
        results = [*results, *gradients(results, inputs, [grad, None])]
        first = first or results
        assert all(torch.equal(x, y) for x, y in zip(results, first, strict=True))


def test_threads_do_not_change_a_bit(kernel):
    before, outcomes = torch.get_num_threads(), []
    inputs = make((2, 3, 1, 190, 190, 16), torch.float32, kernel.device, grad=True)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results = kernel(*inputs)
            outcomes.append([*results, *gradients(results, inputs, random_like(*results))])
    finally:
        torch.set_num_threads(before)
    if kernel.name == "reference":  # its sums are torch's
        torch.testing.assert_close(*outcomes)
    else:
        assert all(torch.equal(x, y) for x, y in zip(*outcomes, strict=True))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_memory_of_the_reference_grows_with_the_length_only():
    q, k, v = make((1, 1, 1, 4096, 4096, 8))
    for window, bound in ((None, 128 * 4096), (256, 128 * (256 + 128))):
        with Largest() as largest:
            out, lse = causal_attention_ref(q, k, v, window=window)
            causal_attention_backward_ref(q, None, q, k, v, out, lse, window=window)
        assert 0 < largest.elements <= bound


# ---- log-sum-exp


def over_all(kernel, q, k, v):
    """Every query over every key: as single queries of many heads, each of which sees all keys."""
    batch, nheads, seqlen, headdim = q.shape
    out, lse = kernel(q.reshape(batch, nheads * seqlen, 1, headdim), k, v)
    return out.reshape(q.shape), lse.reshape(batch, nheads, seqlen)


def test_blocks_of_keys_merge_by_lse(kernel):
    inputs = make((2, 4, 2, 40, 100, 16), torch.float32, kernel.device, grad=True)
    q, k, v = inputs
    parts = [over_all(kernel, q, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 25), (25, 60))]
    parts.append(kernel(q, k[:, :, 60:], v[:, :, 60:]))
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    out = sum((part_lse - lse).exp()[..., None] * part for part, part_lse in parts)
    whole = kernel(q, k, v)
    grads = random_like(*(x.detach() for x in whole))
    merged = [out, lse, *gradients((out, lse), inputs, grads)]
    torch.testing.assert_close(merged, [*whole, *gradients(whole, inputs, grads)], rtol=1e-4, atol=1e-5)


def test_return_lse():
    q, k, v = make((1, 2, 2, 5, 5, 8))
    out = causal_attention(q, k, v)
    assert isinstance(out, torch.Tensor) and torch.equal(out, causal_attention(q, k, v, return_lse=True)[0])


# ---- torch's own machinery


@pytest.mark.parametrize("device", sorted({"cuda" if name == "cuda" else "cpu" for name in KERNELS}))
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused"])
def test_opcheck(layout, device):
    everything = layout == "contiguous"
    forward = torch.library.opcheck.__kwdefaults__["test_utils"] if everything else "test_faketensor"
    backward = forward[:3] if everything else forward  # torch does not compile backward of backward
    for size, options in [((2, 4, 2, 5, 7, 8), {"window": 3}), ((1, 1, 1, 3, 3, 9), {"scale": 0.5})]:
        inputs = make(size, torch.float32, device)
        if layout == "transposed":
            inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        if layout == "fused":
            inputs = [torch.cat([x, x], 1)[:, ::2] for x in inputs]
        out, lse = OP(*inputs, **options)
        inputs = [x.requires_grad_() for x in inputs]
        torch.library.opcheck(OP, tuple(inputs), options, test_utils=forward)
        grad_lse = lse.clone() if "window" in options else None
        torch.library.opcheck(BACKWARD, (out.clone(), grad_lse, *inputs, out, lse), options, test_utils=backward)


def test_compile_fullgraph_dynamic():
    """Forward and backward, one graph for every size."""

    def loss(q, k, v):
        out, lse = causal_attention(2 * q, k, v, window=q.shape[2] // 2 + 1, return_lse=True)
        return (out.sin().sum() + lse.square().sum()) / out.numel()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = "inductor" if C else "aot_eager"  # inductor needs a compiler too
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for size in ((2, 4, 2, 20, 31, 16), (3, 6, 3, 7, 50, 24), (4, 8, 4, 3, 10, 40)):
        inputs = make(size, grad=True)
        results, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_refuses_bad_arguments():
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    q, k, v = make((1, 3, 2, 5, 5, 8))
    with pytest.raises(Exception, match="q must have a multiple of the heads of k"):
        compiled(q, k, v)


class Layer(torch.nn.Module):
    """Attention of one projection with itself."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return causal_attention(q, k, v, window=6).transpose(1, 2).flatten(2)


def test_export():
    layer, x = Layer(), torch.randn(2, 15, 32)
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({1: length},)).module()
    for other in (x, torch.randn(2, 40, 32)):
        torch.testing.assert_close(exported(other), layer(other))


@pytest.mark.parametrize("device", sorted({"cuda" if name == "cuda" else "cpu" for name in KERNELS}))
def test_vmap(device):
    """Over models: q mapped along its third dimension, k along its first, v shared."""
    stacked = [make((2, 4, 2, 9, 11, 8), torch.float32, device, seed=i, grad=True) for i in range(3)]
    q, k = torch.stack([s[0] for s in stacked], 2), torch.stack([s[1] for s in stacked])
    v = stacked[0][2]

    def call(q, k, v):
        return causal_attention(q, k, v, window=4, return_lse=True)

    out, lse = torch.vmap(call, in_dims=(2, 0, None))(q, k, v)
    each = [call(s[0], s[1], v) for s in stacked]
    torch.testing.assert_close([out, lse], [torch.stack(x) for x in zip(*each, strict=True)])
    grads = random_like(out.detach(), lse.detach())
    leaves = [s[i] for s in stacked for i in (0, 1)] + [v]
    expected = [(x * g[i]).sum() for i, pair in enumerate(each) for x, g in zip(pair, grads, strict=True)]
    torch.testing.assert_close(
        torch.autograd.grad(((out * grads[0]).sum() + (lse * grads[1]).sum()), leaves, retain_graph=True),
        torch.autograd.grad(sum(expected), leaves),
    )

    def vjp(q, k, v, out, lse, grad):
        return causal_attention_backward(grad, None, q, k, v, out, lse, window=4)

    with torch.no_grad():
        results = torch.vmap(vjp, in_dims=(2, 0, None, 0, 0, 0))(q, k, v, out, lse, grads[0])
        for i, s in enumerate(stacked):
            one = vjp(s[0], s[1], v, out[i], lse[i], grads[0][i])
            torch.testing.assert_close([x[i] for x in results], list(one))


@pytest.mark.parametrize("device", sorted({"cuda" if name == "cuda" else "cpu" for name in KERNELS}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    q, k, v = make((1, 4, 2, 20, 20, 16), torch.float32, device, grad=True)
    with torch.autocast(device, dtype=dtype):
        out, lse = causal_attention(q, k.to(torch.bfloat16), v, return_lse=True)  # mixed, as a model mixes them
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        assert torch.equal(out, causal_attention(q.to(dtype), k.to(torch.bfloat16).to(dtype), v.to(dtype)))
        wide = causal_attention(q.double(), k.double(), v.double())
        compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")(q, k, v)
        first = torch.autograd.grad(wide.square().sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    right = torch.autograd.grad(dense(*exact)[0].square().sum(), exact, create_graph=True)
    right += torch.autograd.grad(sum(x.square().sum() for x in right), exact)
    for result, truth in zip((*first, *second), right, strict=True):  # gradients inside of autocast: not narrowed
        error, scale = (result.detach().double() - truth.detach()).abs().max(), truth.detach().abs().max()
        assert float(error) <= 1e-6 * float(scale)
    assert wide.dtype == torch.float64 and compiled.dtype == dtype
    out.float().sum().backward()
    assert q.grad.dtype == k.grad.dtype == torch.float32 and q.grad.any() and v.grad.any()


def test_only_one_input_requires_grad(kernel):
    for which in range(3):
        inputs = make((1, 2, 1, 9, 9, 8), torch.float32, kernel.device)
        inputs[which].requires_grad_()
        out, _ = kernel(*inputs)
        (result,) = torch.autograd.grad(out.sum(), inputs[which])
        exact = [x.detach().double().requires_grad_() for x in inputs]
        expected = torch.autograd.grad(dense(*exact)[0].sum(), exact[which])
        torch.testing.assert_close(result.double(), *expected, rtol=1e-4, atol=1e-5)


# ---- wrong calls

Z = torch.zeros
WRONG = {
    "q is a list": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "q is None": ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
    "q has three dimensions": ({"q": Z(4, 5, 8)}, ValueError, r"q must have 4 dimensions, got shape \(4, 5, 8\)"),
    "q is int64": ({"q": Z(2, 4, 5, 8).long()}, TypeError, "q must be float32.*torch.int64"),
    "q is sparse": ({"q": Z(2, 4, 5, 8).to_sparse()}, TypeError, "q must be a dense tensor.*sparse_coo"),
    "k is elsewhere": ({"k": Z(2, 2, 6, 8, device="meta")}, ValueError, "k must be on the device of q .cpu.*meta"),
    "k is float64": ({"k": Z(2, 2, 6, 8).double()}, TypeError, "k must be torch.float32, the dtype of q.*float64"),
    "v is bfloat16": ({"v": Z(2, 2, 6, 8).bfloat16()}, TypeError, "v must be torch.float32.*bfloat16"),
    "k has another batch": ({"k": Z(1, 2, 6, 8)}, ValueError, r"k must have shape.*batch 2.*got \(1, 2, 6, 8\)"),
    "k has another headdim": ({"k": Z(2, 2, 6, 9)}, ValueError, r"k must have shape.*headdim 8.*got \(2, 2, 6, 9\)"),
    "v is shorter": ({"v": Z(2, 2, 5, 8)}, ValueError, r"v must have the shape of k, \(2, 2, 6, 8\), got"),
    "heads do not divide": ({"q": Z(2, 3, 5, 8)}, ValueError, "q must have a multiple of the heads of k, got 3 .* 2"),
    "no key heads": ({"k": Z(2, 0, 6, 8), "v": Z(2, 0, 6, 8)}, ValueError, "multiple of the heads of k, got 4 .* 0"),
    "q is longer": ({"q": Z(2, 4, 7, 8)}, ValueError, "k must be at least as long as q.*got 7 and 6"),
    "headdim 7": ({n: Z(2, 2, 6, 7) for n in "qkv"}, ValueError, r"q must have a headdim of 8..256.*\(2, 2, 6, 7\)"),
    "headdim 257": ({n: Z(1, 1, 1, 257) for n in "qkv"}, ValueError, "headdim of 8..256, got.*257"),
    "headdim 0": ({n: Z(2, 2, 6, 0) for n in "qkv"}, ValueError, "headdim of 8..256"),
    "window 0": ({"window": 0}, ValueError, "window must be >= 1.*got 0"),
    "window negative": ({"window": -3}, ValueError, "window must be >= 1.*got -3"),
    "window beyond int64": ({"window": 2**63}, ValueError, "window must be >= 1 .*got 9223372036854775808"),
    "window is a float": ({"window": 3.0}, TypeError, "window must be an integer or None, got float"),
    "scale is text": ({"scale": "x"}, TypeError, "scale must be a number or None, got str"),
    "scale is NaN": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "scale is infinite": ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_call(case):
    change, error, message = WRONG[case]
    args = dict(zip("qkv", make((2, 4, 2, 5, 6, 8)), strict=True)) | change
    for function in (causal_attention, causal_attention_ref):
        with pytest.raises(error, match=message):
            function(**args)
    with pytest.raises((RuntimeError, TypeError, ValueError)):  # the op itself rechecks everything
        OP(**args)


WRONG_BACKWARD = {
    "grad_out is None": ({"grad_out": None}, TypeError, "grad_out must be a tensor, got NoneType"),
    "grad_out is short": (
        {"grad_out": Z(2, 4, 4, 8)},
        ValueError,
        r"grad_out must have the shape of q.*\(2, 4, 4, 8\)",
    ),
    "out is float64": ({"out": Z(2, 4, 5, 8).double()}, TypeError, "out must be torch.float32.*float64"),
    "lse is flat": ({"lse": Z(40)}, ValueError, r"lse must have shape \(2, 4, 5\), got \(40,\)"),
    "lse is bfloat16": ({"lse": Z(2, 4, 5).bfloat16()}, TypeError, "lse must be a dense torch.float32.*bfloat16"),
    "grad_lse is elsewhere": (
        {"grad_lse": Z(2, 4, 5, device="meta")},
        ValueError,
        "grad_lse must be on the device of q",
    ),
    "grad_lse is a number": ({"grad_lse": 1.0}, TypeError, "grad_lse must be a tensor, got float"),
    "k is short": ({"k": Z(2, 2, 4, 8), "v": Z(2, 2, 4, 8)}, ValueError, "k must be at least as long as q"),
    "window 0": ({"window": 0}, ValueError, "window must be >= 1"),
}


@pytest.mark.parametrize("case", WRONG_BACKWARD)
def test_wrong_backward_call(case):
    change, error, message = WRONG_BACKWARD[case]
    q, k, v = make((2, 4, 2, 5, 6, 8))
    args = {"grad_out": q, "grad_lse": None, "q": q, "k": k, "v": v, "out": q, "lse": Z(2, 4, 5)} | change
    with pytest.raises(error, match=message):
        causal_attention_backward(**args)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        BACKWARD(**args)


# ---- which kernel runs


def test_explain(kernel):
    q, k, v = make((2, 4, 2, 50, 70, 16), torch.bfloat16, kernel.device)
    for window in (None, 1, 30, 69, 100):
        answer = explain(causal_attention, q, k, v, window=window)
        pairs = int(mask(50, 70, window).sum())
        assert visible_pairs(50, 70, window) == pairs and answer.flops == 4 * 8 * 16 * pairs
        assert answer.bytes == 2 * (2 * q.numel() + 2 * k.numel()) + 4 * 400
    out, lse = kernel(q, k, v)
    backward = explain("causal_attention_backward", out, None, q, k, v, out, lse)
    assert backward.flops == 10 * 8 * 16 * int(mask(50, 70).sum())
    if len(KERNELS) == 1:
        name = backends()["causal_attention"]["cpu"].split(":")[0]
        assert answer.kernel == backward.kernel == name == "reference (plain torch)"
    elif kernel.name != "reference":
        assert "reference" not in answer.kernel + backward.kernel


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sanitize_every_size_on_a_gpu(dtype):
    """What compute-sanitizer watches: few calls of every form."""
    for size, window in SIZES:
        inputs = make(size, dtype, "cuda", grad=True)
        results = causal_attention(*inputs, window=window, return_lse=True)
        assert all(x.isfinite().all() for x in gradients(results, inputs, random_like(*results)))


@gpu
@pytest.mark.parametrize("window", [None, 100])
def test_cuda_graph_and_side_stream(window):
    inputs = make((1, 4, 2, 300, 300, 16), torch.bfloat16, "cuda", grad=True)
    (grad,) = random_like(inputs[0].detach())
    eager = gradients([causal_attention(*inputs, window=window)], inputs, [grad])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients([causal_attention(*inputs, window=window)], inputs, [grad])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = gradients([causal_attention(*inputs, window=window)], inputs, [grad])
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(captured, eager, strict=True))


@gpu
def test_offsets_beyond_2_31_on_a_gpu():
    """A row of a head at an offset that does not fit in 32 bits."""
    buffer = torch.randn(2**31 + 2**22, device="cuda", dtype=torch.bfloat16)
    far = torch.as_strided(buffer, (2, 2, 300, 16), (2**31, 2**20, 16, 1))
    near = far.contiguous()
    for inputs in ((far, near, near), (near, far, far)):
        result, expected = causal_attention(*inputs), causal_attention(near, near, near)
        assert torch.equal(result, expected)


def test_triton_serves_cuda_where_it_is_installed(monkeypatch):
    installed = importlib.util.find_spec("triton") is not None and torch.version.hip is None
    for op in ("causal_attention", "causal_attention_backward", "causal_attention_decode", "kv_cache_update"):
        assert backends()[op]["cuda"].startswith("Triton" if installed else "reference")
    made, checked = {}, []
    library = types.SimpleNamespace(impl=lambda op, function, key: made.update({(op, key): function}))
    monkeypatch.setattr(_library, "lib", library)
    kernels = types.SimpleNamespace(an_op=lambda x, *, window: x + window)
    monkeypatch.setitem(sys.modules, "audiokernels.a_module", kernels)
    for spec, hip in ((None, None), ("found", "7.0")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        monkeypatch.setattr(torch.version, "hip", hip)
        _library.triton_launcher("an_op", "a_module", checked.append)
    assert not made
    monkeypatch.setattr(torch.version, "hip", None)
    _library.triton_launcher("an_op", "a_module", lambda x, *, window: checked.append((x, window)))
    assert made["an_op", "CUDA"](3, window=4) == 7 and checked == [(3, 4)]


def test_a_window_longer_than_the_keys_is_none(kernel):
    q, k, v = make((1, 2, 1, 40, 44, 16), torch.float32, kernel.device)
    for window in (44, 45, 2**31, 2**63 - 1):
        assert torch.equal(kernel(q, k, v, window=window)[0], kernel(q, k, v)[0])


def test_expanded_heads_equal_grouped(kernel):
    q, k, v = make((2, 6, 2, 40, 44, 16), torch.float32, kernel.device)
    torch.testing.assert_close(kernel(q, k, v)[0], kernel(*expanded(q, k, v))[0], rtol=1e-5, atol=1e-6)

"""causal_attention's CUDA C++ kernel for small heads, run on the host and on a GPU where there is one, and when a call
takes it."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from attention_cases import SM90_COMPILED, Errors, dense, expanded, make, mask, plain
from attention_on_host import LOG2_E, exponentials, on_gpu, on_host
from cuda_on_host import COMPILER, LaunchError

from audiokernels import causal_attention_plan as plans
from audiokernels.causal_attention import causal_attention_backward_ref, causal_attention_ref
from audiokernels.causal_attention_plan import SM90, Device, causal_attention_plan, runs_on, unmapped

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.timeout(600),
]
SIZES = [  # (batch, nheads, nheads_kv, seqlen_q, seqlen_k, headdim), window
    ((1, 2, 2, 1, 1, 16), None),
    ((2, 4, 2, 63, 63, 16), None),
    ((1, 3, 1, 100, 131, 8), None),
    ((1, 2, 2, 129, 129, 16), 17),
    ((1, 2, 1, 70, 201, 16), 100),
    ((1, 1, 1, 150, 150, 8), 1),
    ((1, 1, 1, 261, 320, 16), 190),
    ((1, 1, 1, 130, 1500, 16), None),  # six tiles: twice round the stages
    ((1, 1, 1, 5, 1111, 16), 900),
    ((1, 1, 1, 79, 79, 16), None),
]
BFLOAT16 = torch.bfloat16


def inputs(size, scale=1.0, seed=0):
    return make(size, BFLOAT16, scale=scale, seed=seed)


on_any_host = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
on_a_gpu = pytest.mark.skipif(
    not SM90_COMPILED, reason="no GPU of sm_90 or later, or the kernel is not compiled for it"
)


@pytest.fixture(params=[pytest.param("host", marks=on_any_host), pytest.param("gpu", marks=on_a_gpu)])
def attend(request):
    return on_host if request.param == "host" else on_gpu


def same(results, expected):
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(results, expected, strict=True))


# ---- values


def check_values(attend, sizes, scaled, **options):
    """As tests/test_causal_attention.py checks every kernel."""
    errors, lse_errors = Errors(BFLOAT16, 64 * scaled**2), Errors(torch.float32, 64 * scaled**2)
    lse_errors.ulp += torch.finfo(BFLOAT16).eps / 4  # the exponentials may be rounded
    for seed, (size, window) in enumerate(sizes):
        q, k, v = inputs(size, scaled, seed)
        right, right_lse = dense(q.double(), k.double(), v.double(), window=window)
        out, lse = attend(q, k, v, window=window, seed=seed, **options)
        errors.add(out, plain(q, k, v, window=window), right)
        lse_errors.add(lse, dense(q.float(), k.float(), v.float(), window=window)[1], right_lse)
    errors.check()
    lse_errors.check()


@pytest.mark.parametrize("scaled", [1, 3, 30])
def test_values(attend, scaled):
    check_values(attend, SIZES, scaled)


@pytest.mark.parametrize("scaled", [1, 3, 30])
def test_gradients_from_its_results(attend, scaled):
    """The backward pass takes out and lse from it."""
    errors = [Errors(BFLOAT16) for _ in range(3)]
    for seed, (size, window) in enumerate(SIZES[1:5]):
        tensors = [x.requires_grad_() for x in inputs(size, scaled, seed)]
        exact = [x.detach().double().requires_grad_() for x in tensors]
        grad = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(seed)).to(BFLOAT16)
        right = torch.autograd.grad(dense(*exact, window=window)[0], exact, grad.double())
        peers = torch.autograd.grad(plain(*tensors, window=window), tensors, grad)
        q, k, v = (x.detach() for x in tensors)
        out, lse = attend(q, k, v, window=window)
        results = causal_attention_backward_ref(grad, None, q, k, v, out, lse, window=window)
        for error, *each in zip(errors, results, peers, right, strict=True):
            error.add(*each, at_least=scaled)
    for error in errors:
        error.check()


def test_error_of_the_whole_is_that_of_torch(attend):
    """The scale is not rounded to bfloat16, nor are sums."""
    q, k, v = inputs((1, 1, 1, 256, 1024, 16), seed=3)
    right = dense(q.double(), k.double(), v.double())[0]
    ours, torchs = ((x.double() - right).norm() / right.norm() for x in (attend(q, k, v)[0], plain(q, k, v)))
    assert ours < 1.2 * torchs and ours < 2.5e-3


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 8))])
def test_lengths_and_windows(attend, seed):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    for _ in range(50):
        group, nheads_kv, seqlen_k, headdim = draw(1, 2), draw(1, 2), draw(1, 300), draw(1, 2) * 8
        size = (draw(1, 2), group * nheads_kv, nheads_kv, draw(1, seqlen_k), seqlen_k, headdim)
        window = None if draw(0, 3) == 0 else draw(1, seqlen_k + 5)
        scale = None if draw(0, 1) else draw(-20, 20) / 20
        q, k, v = inputs(size, seed=draw(0, 999))
        out, lse = attend(q, k, v, scale=scale, window=window, seed=draw(0, 99))
        right, right_lse = dense(q.double(), k.double(), v.double(), scale, window)
        assert (out.double() - right).abs().max() <= 0.012 * v.abs().max(), (size, window, scale)
        assert (lse.double() - right_lse).abs().max() <= 0.005, (size, window, scale)


@on_any_host
def test_polynomial():
    s, scale, m = torch.linspace(-480, 440, 100_000), 0.25 * LOG2_E, 37.0
    got, want = exponentials(s, scale, m), torch.exp2(s.double() * scale - m)
    normal = want > 2.0**-125
    error = ((got - want) / want)[normal]
    plain = ((want.to(BFLOAT16).double() - want) / want)[normal]
    assert normal.sum() > 50_000 and error.abs().max() < 2**-7.5
    assert error.square().mean() < 2 * plain.square().mean()
    assert not got[~normal].gt(2.0**-124).any()
    huge = torch.tensor([128.0, 300, 4e4, 70_000, 2e6, 1.3e7, 1e30, torch.inf, torch.nan, 1e38])
    assert not (exponentials(huge, 1.0, 0.0) < 2.0**126).any(), "the row must be done again"
    small = exponentials(torch.tensor([-127.0, -200, -4e4, -65_536, -70_000, -1e6]), 1.0, 0.0)
    assert not small.any()
    tiny = exponentials(torch.tensor([-9e6, -1.2e7, -1.3e7, -1e9, -1e30, -torch.inf]), 1.0, 0.0)
    assert ((tiny == 0) | ~(tiny < 2.0**126)).all(), "nothing, or done again"


def test_any_order_gives_the_same_bits(attend):
    q, k, v = inputs((1, 2, 1, 140, 900, 16))
    first = attend(q, k, v, window=800)
    assert all(same(attend(q, k, v, window=800, seed=seed), first) for seed in range(1, 7))


def test_grouped_heads_and_strides(attend):
    q, k, v = inputs((2, 4, 2, 70, 90, 16))
    expected = attend(q, k, v, window=50)
    assert same(attend(*expanded(q, k, v), window=50), expected)
    for ways in ("heads inside", "fused", "query spread"):
        if ways == "heads inside":
            others = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        elif ways == "fused":
            wide = torch.full((2, 90, 2, 3, 24), torch.nan, dtype=BFLOAT16)
            wide[..., 0, :16], wide[..., 1, :16] = k.transpose(1, 2), v.transpose(1, 2)
            others = [q, wide[..., 0, :16].transpose(1, 2), wide[..., 1, :16].transpose(1, 2)]
        else:
            others = [torch.stack([q, q + 1], -1)[..., 0], k, v]
        assert unmapped(*others[1:]) == "" and not all(x.is_contiguous() for x in others)
        assert same(attend(*others, window=50), expected), ways


# ---- what is out of range, and who sees what


def rising(factor, n=256):
    """The steps on the diagonal have small scores, a key far before them a large one."""
    q, k, v = inputs((1, 1, 1, n, n, 16))
    q = q.abs()
    k[:, :, 3] = factor
    return q, k, v


@pytest.mark.parametrize("factor", [15, 60, 200, 3e4])
def test_a_fixed_maximum_that_is_too_small(attend, factor):
    q, k, v = rising(factor)
    out, lse = attend(q, k, v)
    right, right_lse = dense(q.double(), k.double(), v.double())
    peer = plain(q, k, v).double()
    assert out.isfinite().all()
    assert (out.double() - right).abs().max() <= 2 * (peer - right).abs().max() + 0.01
    assert ((lse - right_lse).abs() <= 0.005 + 2e-6 * right_lse.abs()).all()


@on_any_host
@pytest.mark.slow
def test_what_is_done_again():
    """Without the second pass: rows out of range are wrong, and below that nothing changes."""
    edit = ("if (!__any_sync(kAll, wrong != 0 || cleaned)) return;", "return;")
    broken = on_host(*rising(200), edit=edit)[0]
    assert not broken.isfinite().all()
    assert same(on_host(*rising(10), edit=edit), on_host(*rising(10)))


def check_large_values(attend, **options):
    """Sums in range, weights times values are not: only those numbers are done again."""
    q, k, v = rising(19)
    v[..., 5] = 3e38 * v[..., 5].sign()
    out, lse = attend(q, k, v, **options)
    right = dense(q.double(), k.double(), v.double())[0]
    assert out.isfinite().all() and (out.double() - right).abs().amax((0, 1, 2))[5] < 0.01 * 3e38
    v[..., 5] = 0
    others = [i for i in range(16) if i != 5]
    assert same((out[..., others], lse), (attend(q, k, v, **options)[0][..., others], lse))


def test_values_that_are_too_large_for_the_weights(attend):
    check_large_values(attend)


def check_causality(attend, times, **options):
    for (size, window), factor in product((((1, 2, 1, 200, 230, 16), None), ((1, 1, 1, 200, 230, 8), 50)), (1, 1000)):
        q, k, v = inputs(size)
        out, lse = attend(q, k, v, window=window, **options)
        for t in times:
            other = [x.clone() for x in (q, k, v)]
            for i, x in enumerate(other):
                future = x[:, :, x.shape[2] - 200 + t :]
                future.copy_(factor * torch.randn(future.shape, generator=torch.Generator().manual_seed(i)))
                if factor > 1 and t % 2:
                    future[:, :, ::3] = (torch.nan, torch.inf, -torch.inf)[i]
            changed, changed_lse = attend(*other, window=window, seed=t, **options)
            assert torch.equal(changed[:, :, :t], out[:, :, :t])
            assert torch.equal(changed_lse[:, :, :t], lse[:, :, :t])
            assert not torch.equal(changed[:, :, t:], out[:, :, t:])


def test_the_future_changes_no_bit(attend):
    check_causality(attend, (1, 13, 64, 99, 128, 199))


def check_not_finite(attend, places, **options):
    """Only those who see it, and of values only their number; to the bit."""
    clean = inputs((2, 4, 2, 180, 200, 16))
    for window, where in places:
        before = attend(*clean, window=window, **options)
        seeing = mask(180, 200, window)[:, where]
        for which, bad in product(range(3), (torch.nan, torch.inf, -torch.inf)):
            tensors, row = [x.clone() for x in clean], where - 20 if which == 0 else where
            if row < 0:
                continue
            tensors[which][1, 1, row, 3] = bad
            out, lse = attend(*tensors, window=window, seed=where, **options)
            reached = torch.zeros(2, 4, 180, dtype=torch.bool)
            if which == 0:
                reached[1, 1, row] = True
            else:
                reached[1, 2:] = seeing
            assert same((out[~reached], lse[~reached]), (before[0][~reached], before[1][~reached]))
            right, right_lse = causal_attention_ref(*(x.double() for x in tensors), window=window)
            if which == 2:
                others = [i for i in range(16) if i != 3]
                assert torch.equal(lse, before[1]) and torch.equal(out[..., others], before[0][..., others])
                assert torch.equal(out[reached][:, 3].isnan(), right[reached][:, 3].isnan())
                assert torch.equal(out[reached][:, 3].isposinf(), right[reached][:, 3].isposinf())
                assert not out[reached][:, 3].isfinite().any()
            else:  # what a weight of 0 times something is may differ; where nothing is finite may not
                finite = right[reached].isfinite().all(-1)
                assert torch.equal(out[reached].isfinite().all(-1), finite)
                assert (
                    (out[reached][finite].double() - right[reached][finite]).abs().max() < 0.03 if finite.any() else 1
                )
                if bad != bad:
                    assert out[reached].isnan().all() and lse[reached].isnan().all()


def test_what_is_not_finite_stays_where_causality_allows(attend):
    check_not_finite(attend, [(None, 77), (30, 128), (90, 0)])


@pytest.mark.slow
def test_what_is_not_finite_anywhere(attend):
    check_not_finite(attend, [(window, where) for window in (None, 100) for where in range(0, 200, 7)])


def test_scores_of_minus_infinity_on_the_whole_diagonal(attend):
    q, k, v = inputs((1, 1, 1, 192, 192, 16))
    q, k[:, :, 128:] = q.abs() + 0.1, -torch.inf
    out, lse = attend(q, k, v)
    right, right_lse = dense(q.double(), k.double(), v.double())
    assert (out.double() - right).abs().max() < 0.02 and (lse - right_lse).abs().max() < 0.005


# ---- faults planted on purpose

FAULTS = {
    "a wait for a tile": ("      wait(full(base, stage), round);\n", ""),
    "the first wait": ("    wait(full(base, 0), 0);\n", ""),
    "the wait for room": ("if (round > 0) wait(", "if (round > 99) wait("),
    "the swizzle": ("(at ^ (at >> 3 & 16))", "at"),
    "the swizzle's bit": ("(at ^ (at >> 3 & 16))", "(at ^ (at >> 4 & 16))"),
    "halves of a key": ("lane / 16 * 8 + lane % 8, lane / 8 % 2);", "lane / 8 % 2 * 8 + lane % 8, lane / 16);"),
    "the second 8 keys": ("ptx::mma_first(s[1], q, {keys.z, keys.w}", "ptx::mma_first(s[1], q, {keys.x, keys.w}"),
    "columns of values": ("weights, {values.z, values.w}", "weights, {values.w, values.z}"),
    "fragments of q": ("load_query(block, low, number), load_query(block, top, number + 8)",
                       "load_query(block, top, number + 8), load_query(block, low, number)"),
    "fragments of weights": ("exp2_pair(x[0][2], x[0][3], scale, m1)", "exp2_pair(x[1][0], x[1][1], scale, m1)"),
    "another row's maximum": ("exp2_pair(x[1][2], x[1][3], scale, m1)", "exp2_pair(x[1][2], x[1][3], scale, m0)"),
    "sums of odd columns": ("ones = lane / 4 % 2 ? 0 : kOnes", "ones = kOnes"),
    "sees itself": ("return key <= position &&", "return key < position &&"),
    "sees the next": ("return key <= position &&", "return key <= position + 1 &&"),
    "the window's first": ("key > position - c.window", "key >= position - c.window"),
    "the window's second": ("key > position - c.window", "key > position - c.window + 1"),
    "the key of a mask": ("key + j / 4 * 8 + lane % 4 * 2 + j % 2", "key + j / 4 * 8 + lane % 4 * 2"),
    "where the diagonal begins": ("full_end = down(low)", "full_end = up(low + 1)"),
    "where the edge ends": ("full_begin = min(up(max(0, last", "full_begin = min(down(max(0, last"),
    "where the edge begins": ("first = down(max(0, low - c.window + 1))", "first = up(max(0, low - c.window + 1))"),
    "an exponent": ("127 - 0x4b400000, 254);  // exponent", "126 - 0x4b400000, 254);  // exponent"),
    "half an exponent": ("uint32_t(e1) * 0x800000u", "uint32_t(e0) * 0x800000u"),
    "rescaling": ("out[0][i] *= factor, out[1][i] *= factor, sum[i] *= factor;", "sum[i] *= factor;"),
    "a maximum of the quad": ("      most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));\n", ""),
    "values not cleaned": ("v = finite_all(raw)", "v = raw"),
    "cleaned values forgotten": ("cleaned |= differ(raw, v);", ""),
    "nothing done again": ("if (!__any_sync(kAll, wrong != 0 || cleaned)) return;", "return;"),
    "neighbours done again": ("store(block, i, h, wrong, part.out)", "store(block, i, h, 0xffu, part.out)"),
    "a sum that is too large": ("sum < 0x1p100f)) wrong", "true)) wrong"),
    "numbers that are not finite": ("if (!is_finite(number)) wrong", "if (false) wrong"),
    "which of them": ("0x33u << 2 * h", "0x33u << h"),
    "infinities of the second pass": ("if (count >> 5 & 31) total -= kInfinity;", ""),
    "keys of the second pass": ("pair(key + one + 8, two),", "pair(key + one, two),"),
    "values of the second pass": ("pairs(key + two, one + 8)", "pairs(key + two, one)"),
    "the sign of the scale": ("c.scale < 0 ? word ^ 0x80008000u : word", "word"),
    "a scale of 0": ("fmaxf(fabsf(c.scale), 0x1p-100f)", "fabsf(c.scale)"),
    "the head of the keys": ("blockIdx.x / unsigned(c.group)", "blockIdx.x"),
}  # fmt: skip


@on_any_host
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault):
    edit = FAULTS[fault]
    with pytest.raises((AssertionError, LaunchError)):
        for scaled in (1, 30):
            check_values(on_host, SIZES, scaled, edit=edit)
        out, _ = on_host(*rising(200), edit=edit)
        right = dense(*(x.double() for x in rising(200)))[0]
        assert (out.double() - right).abs().max() < 0.02
        check_large_values(on_host, edit=edit)
        check_not_finite(on_host, [(None, 77), (None, 199), (30, 128)], edit=edit)
        check_causality(on_host, (13, 99), edit=edit)
        for scale in (-0.3, 0.0):
            q, k, v = inputs((1, 4, 2, 70, 90, 16))
            right = dense(q.double(), k.double(), v.double(), scale)[0]
            assert (on_host(q, k, v, scale=scale, edit=edit)[0].double() - right).abs().max() < 0.02


# ---- when a call takes it

SHAPE = (2, 8, 4096, 16)
H100 = Device(asked=True, compiled=True)


def plan(q_shape=SHAPE, k_shape=SHAPE, dtype=BFLOAT16, device=H100, unmapped="", window=None):
    return causal_attention_plan(q_shape, k_shape, dtype, window, device, unmapped)


def test_plan():
    assert plan().kernel == SM90 and "AUDIOKERNELS_ATTENTION_CUDA asks for it" in plan().why
    assert plan(window=10**9).window == 4096 and plan(window=5).window == 5
    assert plan((2, 8, 4096, 8), (2, 2, 4096, 8)).kernel == SM90
    for text, options in {
        "AUDIOKERNELS_ATTENTION_CUDA=1 would ask for CUDA C++": {"device": Device(compiled=True)},
        "CUDA C++ is asked for, but not compiled for this GPU": {"device": Device(asked=True)},
        "CUDA C++ is asked for, but k has rows": {"unmapped": "k has rows that are not dense"},
        "CUDA C++ is asked for, but the call is too large": {"q_shape": (70000, 8, 4096, 16)},
    }.items():
        made = plan(**options)
        assert made.kernel == "Triton" and text in made.why and made.tile is not None
    for options in (
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"q_shape": (2, 8, 4096, 32), "k_shape": (2, 8, 4096, 32)},
        {"q_shape": (2, 8, 4096, 13), "k_shape": (2, 8, 4096, 13)},
        {"device": H100._replace(capability=8)},
        {"device": Device()},
    ):
        assert plan(**options).kernel == "Triton" and "CUDA C++" not in plan(**options).why


def test_code_for_a_gpu():
    assert runs_on(9, ("sm_80", "sm_90a")) and runs_on(10, ("sm_100",)) and runs_on(12, ("compute_90",))
    assert not runs_on(9, ("sm_80", "compute_80", "sm_100")) and not runs_on(8, ("sm_80",)) and not runs_on(9, ())


@on_any_host
def test_tensors_that_tensor_maps_do_not_take():
    q, k, v = inputs((2, 4, 2, 70, 90, 16))
    odd = torch.zeros(2, 2, 90, 20, dtype=BFLOAT16)[..., :16]
    for wrong in (odd, k[..., ::2], k[:1].expand(2, 2, 90, 16), k.transpose(2, 3), torch.cat([k, k], 3)[..., 1:17]):
        assert unmapped(wrong, v).startswith("k has rows") and unmapped(k, wrong).startswith("v has rows")
    assert unmapped(k[:1, :1], v[:1, :1]) == ""
    for wrong in (odd, torch.cat([k, k], 3)[..., 1:17], k[:1].expand(2, 2, 90, 16)):  # the launcher sees it as well
        with pytest.raises(LaunchError):
            on_host(q, wrong, v)


@on_any_host
def test_the_op_takes_it_where_it_is_asked_for(monkeypatch):
    """The launcher of GPUs with the kernel of the host behind the private op."""
    triton = pytest.importorskip("audiokernels.causal_attention_triton")
    library = torch.library.Library("audiokernels", "IMPL")
    calls = []

    def kernel(q, k, v, out, lse, scale, window):
        calls.append(window)
        results = on_host(q, k, v, scale=scale / LOG2_E, window=window)
        out.copy_(results[0]), lse.copy_(results[1])

    library.impl("_causal_attention_sm90", kernel, "CPU")
    monkeypatch.setattr(plans, "device_facts", lambda device: H100)
    try:
        q, k, v = inputs((1, 4, 2, 70, 90, 8))
        out, lse = triton.causal_attention(q, k, v, scale=0.2, window=40)
        assert same((out, lse), on_host(q, k, v, scale=0.2, window=40)) and calls == [40]
        assert same(triton.causal_attention(q, k, v), on_host(q, k, v)) and calls == [40, 90]
        assert triton.causal_attention(q[:0], k[:0], v[:0])[0].shape == (0, 4, 70, 8) and len(calls) == 2
    finally:
        library._destroy()


def test_who_asks():
    code = "from audiokernels.causal_attention_plan import *; print(device_facts(torch.device('cpu')).asked)"
    environment = os.environ | {"AUDIOKERNELS_ATTENTION_CUDA": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "True"
    assert plans.device_facts(torch.device("cpu")).asked == (os.environ.get("AUDIOKERNELS_ATTENTION_CUDA") == "1")

"""The Triton kernels of causal attention, run by Triton's interpreter: test_causal_attention_triton.py starts this.

The interpreter has no inline assembly and no split precisions: kernels leave the polynomial out and multiply float32
numbers exactly there. bfloat16 is wrong in it without a word: float32 and float16 only. What only a GPU can show is
those three, the pipelines, and everything about time.
"""

import pytest
import torch

from audiokernels import causal_attention_backward_triton as backward_room
from audiokernels import causal_attention_decode_triton as decode_room
from audiokernels import causal_attention_triton as room
from audiokernels._triton import is_wide
from audiokernels.causal_attention import causal_attention_backward_ref, causal_attention_ref, lse_like, output_like
from audiokernels.causal_attention_decode import kv_cache_update_ref
from audiokernels.causal_attention_plan import Device, causal_attention_decode_plan, causal_attention_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")  # of numpy, at inf and NaN
SHAPES = [  # batch, nheads, nheads_kv, seqlen_q, seqlen_k, headdim, window, scale
    (1, 1, 1, 1, 1, 8, None, None),
    (1, 3, 1, 63, 63, 16, None, None),
    (1, 1, 1, 100, 211, 24, 17, None),
    (1, 2, 2, 67, 131, 32, 70, -0.3),
    (1, 1, 1, 97, 97, 128, None, None),
]
SLOW_SHAPES = [
    (1, 2, 1, 5, 257, 64, 200, 0.0),
    (1, 1, 1, 200, 259, 16, 1, None),
    (2, 4, 2, 331, 467, 16, None, 0.4),
    (1, 2, 1, 500, 509, 32, 129, None),
    (1, 1, 1, 150, 150, 256, 64, None),
    (1, 2, 1, 193, 400, 48, 128, None),
]
shapes = pytest.mark.parametrize("shape", SHAPES + [pytest.param(s, marks=pytest.mark.slow) for s in SLOW_SHAPES])
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3}


def inputs(shape, dtype, seed=0):
    batch, nheads, nheads_kv, seqlen_q, seqlen_k, headdim, *_ = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, nheads, seqlen_q, headdim, generator=generator)
    k, v = torch.randn(2, batch, nheads_kv, seqlen_k, headdim, generator=generator)
    return [x.to(dtype) for x in (q, k, v)]


def dense(q, k, v, window, scale):
    """(out, lse) by the formula, in float64, with all N x N logits."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    position = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    key = torch.arange(k.shape[2])
    seen = (key <= position) & (key > position - (window or k.shape[2]))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    logits = (scale * q @ k.transpose(2, 3)).where(seen, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def launch(q, k, v, window=None, scale=None, optimistic=None, **constants):
    """(out, lse) of the kernel, with the scheme or some constants changed; room is poisoned with NaN."""
    plan = causal_attention_plan(q.shape, k.shape, q.dtype, window, Device())
    plan = plan._replace(optimistic=plan.optimistic if optimistic is None else optimistic)
    out, lse = output_like(q).fill_(torch.nan), lse_like(q).fill_(torch.nan)
    call = room.forward_launch(plan, q, k, v, (out, lse), q.shape[3] ** -0.5 if scale is None else scale)
    call.constants.update(constants)
    call.run(q)
    return out, lse


def assert_same(got, want, tolerance):
    """Equal up to tolerance, inf and NaN at the same places."""
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance, equal_nan=True)


# ---- forward


@shapes
@pytest.mark.parametrize(
    ("dtype", "optimistic"), [(torch.float32, False), (torch.float32, True), (torch.float16, False)]
)
def test_forward(shape, dtype, optimistic):
    *_, window, scale = shape
    q, k, v = inputs(shape, dtype)
    out, lse = launch(q, k, v, window, scale, optimistic)
    want, want_lse = dense(q, k, v, window, scale)
    assert_same(out, want, TOLERANCE[dtype])
    assert_same(lse, want_lse, 5e-6)


@pytest.mark.parametrize(("block", "window"), [((16, 64), 33), ((64, 16), None), ((64, 128), 50), ((128, 32), None)])
def test_blocks_of_any_shape(block, window):
    q, k, v = inputs((1, 1, 1, 130, 187, 16), torch.float32)
    plan = causal_attention_plan(q.shape, k.shape, q.dtype, window, Device())
    plan = plan._replace(tile=plan.tile._replace(block_m=block[0], block_n=block[1], ones=True), optimistic=True)
    out, lse = output_like(q), lse_like(q)
    room.forward_launch(plan, q, k, v, (out, lse), 0.25).run(q)
    want, want_lse = dense(q, k, v, window, 0.25)
    assert_same(out, want, 5e-6)
    assert_same(lse, want_lse, 5e-6)


@pytest.mark.parametrize(("factor", "dtype"), [(3, torch.float32), (30, torch.float32), (30, torch.float16)])
def test_large_logits(factor, dtype):
    q, k, v = (factor * x for x in inputs((1, 1, 1, 200, 200, 16), dtype))
    out, lse = launch(q, k, v, optimistic=dtype == torch.float32)
    want, want_lse = causal_attention_ref(q, k, v)
    assert_same(out, want, factor * TOLERANCE[dtype] * 5)
    assert_same(lse, want_lse, 1e-5)


def rising(factor):
    """The masked tiles of the last block have small scores, a key far before them a large one."""
    q, k, v = inputs((1, 1, 1, 256, 256, 16), torch.float32)
    q = q.abs()
    k[:, :, 3] = factor
    return q, k, v


def test_a_fixed_maximum_that_is_too_small_is_found_and_done_again():
    q, k, v = rising(200)
    want, want_lse = causal_attention_ref(q.double(), k.double(), v.double())
    out, lse = launch(q, k, v, optimistic=True)
    assert_same(out, want, 1e-5)
    assert_same(lse, want_lse, 1e-5)
    broken, _ = launch(q, k, v, optimistic=True, REDO=0)
    assert not broken.isfinite().all()


def test_a_row_that_is_done_again_changes_no_bit_of_the_others():
    q, k, v = rising(200)
    q[:, :, :-1] *= 1e-3  # the last query alone is out of range
    small = q.clone()
    small[:, :, -1] *= 1e-3
    (out, lse), (other, other_lse) = launch(q, k, v, optimistic=True), launch(small, k, v, optimistic=True)
    assert torch.equal(out[:, :, :-1], other[:, :, :-1]) and torch.equal(lse[:, :, :-1], other_lse[:, :, :-1])
    want, want_lse = causal_attention_ref(q.double(), k.double(), v.double())
    assert_same(out, want, 1e-5)
    assert_same(lse, want_lse, 1e-5)


def test_below_the_threshold_nothing_is_done_again_and_nothing_is_lost():
    q, k, v = rising(15)  # weights up to 2^80
    want, _ = causal_attention_ref(q.double(), k.double(), v.double())
    out, _ = launch(q, k, v, optimistic=True)
    assert torch.equal(out, launch(q, k, v, optimistic=True, REDO=0)[0])
    assert_same(out, want, 2e-5)


def test_scores_of_minus_infinity_in_all_masked_tiles():
    q, k, v = inputs((1, 1, 1, 192, 192, 16), torch.float32)
    q, k[:, :, 128:] = q.abs() + 0.1, -torch.inf
    for optimistic in (False, True):
        out, lse = launch(q, k, v, optimistic=optimistic)
        want, want_lse = causal_attention_ref(q, k, v)
        assert_same(out, want, 1e-5)
        assert_same(lse, want_lse, 1e-5)


@pytest.mark.parametrize(
    ("which", "window", "optimistic"),
    [(0, None, True), (1, None, True), (2, None, True), (2, 40, True), (2, 40, False)],
)
def test_what_is_not_finite_stays_where_causality_allows_it(which, window, optimistic):
    tensors = inputs((1, 1, 1, 150, 150, 16), torch.float32)
    clean, clean_lse = launch(*tensors, window=window, optimistic=optimistic)
    tensors[which][0, 0, 77, 3] = torch.nan
    if which == 2:
        tensors[2][0, 0, 100, 5], tensors[2][0, 0, 120, 5], tensors[2][0, 0, 90, 6] = torch.inf, -torch.inf, torch.inf
    out, lse = launch(*tensors, window=window, optimistic=optimistic)
    want, want_lse = causal_attention_ref(*tensors, window=window)
    assert_same(out, want, 5e-6)
    assert_same(lse, want_lse, 5e-6)
    last = 77 if which == 0 else 149 if window is None else 120 + window - 1  # query that sees something of it
    for apart in (slice(77), slice(last + 1, None)):
        assert torch.equal(out[:, :, apart], clean[:, :, apart])
        assert torch.equal(lse[:, :, apart], clean_lse[:, :, apart])


def test_strides():
    want = None
    for way in ("contiguous", "heads inside", "spread", "transposed", "wide"):
        q, k, v = inputs((2, 2, 2, 70, 90, 24), torch.float32)
        if way == "heads inside":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        elif way == "spread":
            q, k, v = (torch.stack([x, x + 1], -1)[..., 0] for x in (q, k, v))
        elif way == "transposed":
            q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
        got = torch.cat([x.flatten() for x in launch(q, k, v, **({"WIDE": True} if way == "wide" else {}))])
        want = got if want is None else want
        assert torch.equal(got, want), way


def test_offsets_are_wide_where_a_tile_spans_2_to_the_31():
    """And only there: 64-bit offsets are another kernel, with other registers than the table's."""
    for strides, wide in {
        (1 << 27, 1 << 24, 128, 1): False,  # (2, 8, 131072, 128)
        (1 << 40, 1 << 40, 128, 1): False,
        (1, 1, 1 << 23, 1): True,
        (1, 1, 1, 1 << 23): True,
        (1, 1, 8 * (1 << 20) - 8, 1 << 20): True,  # neither a row nor a column alone
    }.items():
        x = torch.empty_strided((1, 1, 256, 128), strides, device="meta")
        assert is_wide(*room.LARGEST_TILE, x) == wide, strides


def test_the_op_itself():
    q, k, v = inputs((2, 2, 1, 40, 50, 16), torch.float32)
    out, lse = room.causal_attention(q, k.expand(2, 1, 50, 16), v, window=20)
    want, want_lse = dense(q, k, v, 20, None)
    assert_same(out, want, 5e-6)
    assert_same(lse, want_lse, 5e-6)
    assert out.shape == q.shape and room.causal_attention(q[:0], k[:0], v[:0])[0].shape == (0, 2, 40, 16)
    assert_same(room.causal_attention(q.double(), k.double(), v.double(), window=20)[0], want, 1e-12)


# ---- backward


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_backward(shape, dtype):
    *_, window, scale = shape
    tensors = [x.requires_grad_() for x in inputs(shape, dtype)]
    out, lse = dense(*tensors, window, scale)
    grad_out, grad_lse = torch.randn_like(tensors[0]), torch.randn_like(lse).float()
    for given in (grad_lse, None):
        total = (out * grad_out).sum() + (0 if given is None else (lse * given).sum())
        want = torch.autograd.grad(total, tensors, retain_graph=True)
        kept = (out.detach().to(dtype), lse.detach().float())
        with torch.no_grad():
            got = backward_room.causal_attention_backward(grad_out, given, *tensors, *kept, window=window, scale=scale)
        for x, y in zip(got, want, strict=True):
            assert_same(x, y, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("window", [33, pytest.param(None, marks=pytest.mark.slow)])
def test_backward_in_blocks_of_any_shape(window, monkeypatch):
    q, k, v = inputs((1, 2, 1, 75, 140, 16), torch.float32)
    out, lse = causal_attention_ref(q, k, v, window=window)
    grad_out = torch.randn_like(q)
    want = causal_attention_backward_ref(grad_out, None, q, k, v, out, lse, window=window)
    planned = backward_room.causal_attention_backward_plan
    for block_m, block_n in ((16, 64), (64, 16), (128, 32)):

        def plan(*args, m=block_m, n=block_n):
            made = planned(*args)
            changed = made.dq._replace(block_m=m, block_n=n)
            return made._replace(dq=changed, dkdv=changed)

        monkeypatch.setattr(backward_room, "causal_attention_backward_plan", plan)
        got = backward_room.causal_attention_backward(grad_out, None, q, k, v, out, lse, window=window)
        for x, y in zip(got, want, strict=True):
            assert_same(x, y, 2e-5)


def test_backward_keeps_what_is_not_finite_from_those_that_do_not_see_it():
    good = [*inputs((1, 1, 1, 150, 150, 16), torch.float32)]
    good.append(torch.randn_like(good[0]))
    kept = launch(*good[:3], optimistic=True)
    clean = backward_room.causal_attention_backward(good[3], None, *good[:3], *kept)
    for which in range(4):
        tensors = [x.clone() for x in good]
        tensors[which][0, 0, 77, 3] = torch.nan
        q, k, v, grad_out = tensors
        out, lse = launch(q, k, v, optimistic=True)
        got = backward_room.causal_attention_backward(grad_out, None, q, k, v, out, lse)
        want = causal_attention_backward_ref(grad_out, None, q, k, v, out, lse)
        for name, x, y, before in zip(("dq", "dk", "dv"), got, want, clean, strict=True):
            rows = y.isfinite().all(-1)  # within a row NaN may spread
            assert torch.equal(x.isfinite().all(-1), rows)
            if (which, name) == (2, "dv"):  # it depends on v by the last bits of lse alone
                assert_same(x, before, 2e-5)
            else:
                assert torch.equal(x[rows], before[rows])


def test_backward_of_nothing():
    q, k, v = inputs((1, 1, 1, 0, 9, 16), torch.float32)
    grads = backward_room.causal_attention_backward(q, None, q, k, v, q, q[..., 0])
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape] and not grads[1].any() and not grads[2].any()


# ---- decoding


@pytest.mark.parametrize(
    ("nheads", "nheads_kv", "capacity", "window", "steps", "headdim", "dtype"),
    [
        (2, 2, 5, None, 1, 16, torch.float32),
        (4, 1, 17, 9, 3, 8, torch.float32),
        pytest.param(6, 2, 150, 130, 17, 24, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_decoding_over_three_wraps_equals_the_whole(nheads, nheads_kv, capacity, window, steps, headdim, dtype):
    n = -(-(3 * capacity + 5) // steps) * steps
    shape = (2, nheads, nheads_kv, n, n, headdim)
    q, k, v = inputs(shape, dtype)
    want, _ = dense(q, k, v, window or capacity - steps + 1, None)
    caches = torch.full((2, 2, nheads_kv, capacity, headdim), torch.nan, dtype=dtype).unbind(0)
    for step in range(0, n, steps):
        lens = torch.tensor([step, max(0, step - steps)], dtype=torch.int32)  # the second is a step behind
        new = [torch.stack([x[i, :, p : p + steps] for i, p in enumerate(lens.tolist())]) for x in (q, k, v)]
        decode_room.kv_cache_update(*caches, *new[1:], lens)
        out = decode_room.causal_attention_decode(new[0], *caches, lens, window=window)
        for i, p in enumerate(lens.tolist()):
            assert_same(out[i], want[i, :, p : p + steps], TOLERANCE[dtype])


@pytest.mark.parametrize("splits", [1, 3, 16])
def test_keys_shared_out(splits):
    q = torch.randn(2, 4, 2, 16)
    k, v = torch.randn(2, 2, 1, 700, 16)
    lens = torch.tensor([30, 4000], dtype=torch.int32)
    plan = causal_attention_decode_plan(q.shape, k.shape, q.dtype, None, Device())
    plan = plan._replace(splits=splits, block_keys=32)
    out = output_like(q)
    launches = decode_room.decode_launches(plan, q, (k, v), lens, out, 0.25)
    assert len(launches) == (1 if splits == 1 else 2)
    for call in launches:
        call.run(q)
    for i, n in enumerate(lens.tolist()):
        slots = torch.arange(max(0, n + 2 - 700), n + 2) % 700
        want, _ = dense(q[i : i + 1], k[i : i + 1, :, slots], v[i : i + 1, :, slots], 699, 0.25)
        assert_same(out[i : i + 1], want, 5e-6)


@pytest.mark.slow
def test_a_query_whose_numbers_lie_apart():
    """Its last ones beyond 2^31 numbers, in 4 GiB of which next to nothing is touched."""
    apart = (1 << 23) + (1 << 17)
    q = torch.empty(256 * apart, dtype=torch.float16).as_strided((1, 1, 1, 256), (1, 1, 1, apart))
    q.copy_(torch.randn(1, 1, 1, 256))
    cache, lens = torch.randn(1, 1, 20, 256).half(), torch.tensor([19], dtype=torch.int32)
    out, want = (decode_room.causal_attention_decode(x, cache, cache, lens) for x in (q, q.contiguous()))
    assert torch.equal(out, want)


def test_cache_update():
    k, v = torch.randn(2, 2, 2, 19, 24)
    caches = torch.zeros(2, 2, 2, 23, 24)
    wanted = caches.clone()
    lens = torch.tensor([20, 2**31 - 5], dtype=torch.int32)
    decode_room.kv_cache_update(*caches, k, v, lens)
    kv_cache_update_ref(*wanted, k, v, lens)
    assert torch.equal(caches, wanted) and wanted.any()


def test_bad_lengths_stay_inside():
    caches = torch.zeros(2, 1, 1, 23, 16)
    decode_room.kv_cache_update(*caches, *torch.ones(2, 1, 1, 3, 16), torch.tensor([-30], dtype=torch.int32))
    assert caches[0].sum() == 3 * 16
    out = decode_room.causal_attention_decode(torch.ones(1, 1, 3, 16), *caches, torch.tensor([-30], dtype=torch.int32))
    assert out.shape == (1, 1, 3, 16)

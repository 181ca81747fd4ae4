"""causal_attention_decode, kv_cache_update: steps equal the whole, rings, unseen slots, torch's machinery, errors."""

from itertools import product

import pytest
import torch
from attention_cases import DTYPES, Errors, dense, gpu, in_turn, kernels, main_kernels, make, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from audiokernels import backends, causal_attention, causal_attention_decode, explain, kv_cache_update
from audiokernels._library import C
from audiokernels.causal_attention_decode import causal_attention_decode_ref, kv_cache_update_ref

pytestmark = pytest.mark.usefixtures("one_thread")

DECODE = torch.ops.audiokernels.causal_attention_decode.default
UPDATE = torch.ops.audiokernels.kv_cache_update.default
KERNELS = kernels("causal_attention_decode")


class Kernel:
    """The two ops of one of kernels()."""

    def __init__(self, name):
        self.name, self.device = name, "cuda" if name == "cuda" else "cpu"
        reference = name == "reference"
        self.decode = causal_attention_decode_ref if reference else causal_attention_decode
        self.update = kv_cache_update_ref if reference else kv_cache_update


@pytest.fixture(params=main_kernels("causal_attention_decode"))
def kernel(request):
    yield from in_turn(request.param, Kernel)


@pytest.fixture(params=KERNELS)
def every_kernel(request):
    yield from in_turn(request.param, Kernel)


def caches(k, capacity, fill=float("nan")):
    """Two empty rings for keys like k."""
    shape = (k.shape[0], k.shape[1], capacity, k.shape[3])
    return [torch.full(shape, fill, dtype=k.dtype, device=k.device) for _ in range(2)]


def step_by_step(kernel, q, k, v, capacity, chunks, window=None, scale=None):
    """The whole sequence through a ring, in chunks of these sizes in turn; saved and restored after each."""
    k_cache, v_cache = caches(k, capacity)
    seqlens = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device)
    out, t, n = [], 0, k.shape[2]
    while t < n:
        stop = min(n, t + chunks[len(out) % len(chunks)])
        kernel.update(k_cache, v_cache, k[:, :, t:stop], v[:, :, t:stop], seqlens)
        out.append(kernel.decode(q[:, :, t:stop], k_cache, v_cache, seqlens, scale=scale, window=window))
        seqlens += stop - t
        t, k_cache, v_cache = stop, k_cache.clone(), v_cache.clone()
    return torch.cat(out, 2)


# ---- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_equal_the_whole_over_three_wraps(every_kernel, dtype):
    """The rings start out as NaN: what was not written, and what no query sees, is not used."""
    errors = Errors(dtype, 64)
    for chunks, window, capacity in [([1], 9, 9), ([1], 4, 11), ([3], 9, 11), ([1, 5, 2], 8, 13), ([7], 1, 7)]:
        q, k, v = make((2, 4, 2, 3 * capacity + 6, 3 * capacity + 6, 16), dtype, every_kernel.device, seed=capacity)
        out = step_by_step(every_kernel, q, k, v, capacity, chunks, window)
        right = dense(q.double(), k.double(), v.double(), window=window)[0]
        errors.add(out, plain(q, k, v, window=window), right)
        assert out.dtype == dtype
    errors.check()


def test_a_counter_may_be_set_back_by_the_capacity(kernel):
    """A stream outlives its int32: less a multiple of the capacity, with at least the capacity left, is the same."""
    capacity, m, window = 12, 2, 9
    q, k, v = make((2, 4, 2, m, m, 16), torch.float32, kernel.device)
    old = [torch.randn(2, 2, capacity, 16, device=kernel.device) for _ in range(2)]
    results = []
    for positions in (2**31 - 1 - m - 5, 5 * capacity + (2**31 - 1 - m - 5) % capacity, capacity + 3, 4 * capacity + 3):
        seqlens = torch.full((2,), positions, dtype=torch.int32, device=kernel.device)
        rings = [x.clone() for x in old]
        kernel.update(*rings, k, v, seqlens)
        results.append((*rings, kernel.decode(q, *rings, seqlens, scale=None, window=window)))
    for first, second in (results[:2], results[2:]):
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("chunk", [*range(1, 18)])
def test_any_chunk_size(kernel, chunk):
    capacity, window = 40, 24
    q, k, v = make((1, 2, 1, 130, 130, 8), torch.float32, kernel.device)
    out = step_by_step(kernel, q, k, v, capacity, [chunk], window, scale=0.5)
    torch.testing.assert_close(out, causal_attention(q, k, v, window=window, scale=0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaled", [1, 3, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(kernel, dtype, scaled):
    """Against a long full cache; rows at different positions."""
    errors = Errors(dtype, 64 * scaled**2)
    for (heads, headdim, m, capacity, window), seed in product(
        [((4, 2), 16, 1, 300, None), ((2, 2), 64, 3, 257, 200), ((6, 1), 24, 2, 70, None), ((1, 1), 128, 1, 65, 1)],
        range(3),
    ):
        q, k, v = make((3, *heads, m, capacity, headdim), dtype, kernel.device, scale=scaled, seed=seed)
        seqlens = torch.tensor([capacity - m, 5 * capacity + 7, 2**31 - 1 - m], dtype=torch.int32, device=k.device)
        rings = [torch.empty_like(x) for x in (k, v)]
        for b, n in enumerate(seqlens.tolist()):  # k and v are the newest `capacity` positions
            slots = torch.arange(n + m - capacity, n + m, device=k.device) % capacity
            rings[0][b, :, slots], rings[1][b, :, slots] = k[b], v[b]
        out = kernel.decode(q, *rings, seqlens, window=window)
        seen = window or capacity - m + 1
        right = dense(q.double(), k.double(), v.double(), window=seen)[0]
        errors.add(out, plain(q, k, v, window=seen), right)
    errors.check()


@settings(max_examples=40, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2)),
    m=st.integers(1, 20),
    window=st.integers(1, 150),
    spare=st.integers(0, 20),
    headdim=st.integers(8, 256),
    positions=st.lists(st.integers(0, 2**31 - 100), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(KERNELS),
)
def test_any_shape(heads, m, window, spare, headdim, positions, dtype, name):
    batch, group, nheads_kv = heads
    capacity = window + m - 1 + spare
    for kernel in in_turn(name, Kernel):
        q, k, v = make((batch, group * nheads_kv, nheads_kv, m, m, headdim), dtype, kernel.device)
        g = torch.Generator().manual_seed(3)
        rings = [torch.randn(batch, nheads_kv, capacity, headdim, generator=g).to(k) for _ in range(2)]
        others = [x.clone() for x in rings]
        seqlens = torch.tensor([p % (1 + 3 * capacity) if p % 2 else p for p in positions[:batch]], dtype=torch.int32)
        seqlens = seqlens.to(kernel.device)
        kernel.update(*rings, k, v, seqlens)
        kv_cache_update_ref(*others, k, v, seqlens)
        assert all(torch.equal(x, y) for x, y in zip(rings, others, strict=True))
        out = kernel.decode(q, *rings, seqlens, window=window)
        right = causal_attention_decode_ref(q.double(), *(x.double() for x in rings), seqlens, window=window)
        sums = float(q.double().norm(dim=-1).amax() * rings[0].double().norm(dim=-1).amax()) * headdim**-0.5
        bound = 3 * torch.finfo(dtype).eps + sums * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert float((out.double() - right).abs().max()) <= bound * float(rings[1].abs().max())


def test_update_writes_its_slots_only(every_kernel):
    _, k, v = make((3, 1, 2, 5, 5, 8), torch.bfloat16, every_kernel.device)
    for seqlens in ([0, 3, 6], [7, 14, 2**31 - 6]):
        rings, before = caches(k, 7, 1.5), caches(k, 7, 1.5)
        every_kernel.update(*rings, k, v, torch.tensor(seqlens, dtype=torch.int32, device=k.device))
        for b, n in enumerate(seqlens):
            for i in range(5):
                before[0][b, :, (n + i) % 7], before[1][b, :, (n + i) % 7] = k[b, :, i], v[b, :, i]
        assert all(torch.equal(x, y) for x, y in zip(rings, before, strict=True))


@pytest.mark.parametrize("seqlen", [0, 3, 30])
def test_unseen_slots_may_hold_anything(kernel, seqlen):
    """Keys outside of the window, of later queries, and never written: NaN there changes no bit."""
    q, k, v = make((2, 4, 2, 3, 20, 16), torch.float32, kernel.device)
    seqlens = torch.full((2,), seqlen, dtype=torch.int32, device=k.device)
    rings = [k.clone(), v.clone()]
    out = kernel.decode(q, *rings, seqlens, window=6)
    for i in range(3):
        own = seqlen + i
        seen = {p % 20 for p in range(max(0, own - 5), own + 1)}
        unseen = [slot for slot in range(20) if slot not in seen]
        poisoned = [x.clone() for x in rings]
        for bad, x in zip((torch.nan, torch.inf), poisoned, strict=True):
            x[:, :, unseen] = bad
        assert torch.equal(kernel.decode(q, *poisoned, seqlens, window=6)[:, :, i], out[:, :, i])
        poisoned = [x.clone() for x in rings]
        poisoned[1][1, 1, own % 20, 3] = torch.nan
        result = kernel.decode(q, *poisoned, seqlens, window=6)
        assert result[1, 2:, i, 3].isnan().all() and torch.equal(result[0], out[0])


def test_rows_do_not_depend_on_the_batch(kernel):
    q, k, v = make((5, 4, 2, 2, 50, 16), torch.float32, kernel.device)
    seqlens = torch.tensor([0, 7, 48, 60, 1000], dtype=torch.int32, device=k.device)
    together = kernel.decode(q, k, v, seqlens)
    alone = [kernel.decode(*(x[b : b + 1] for x in (q, k, v, seqlens))) for b in range(5)]
    if kernel.name == "reference":  # its sums are torch's
        torch.testing.assert_close(together, torch.cat(alone))
    else:
        assert torch.equal(together, torch.cat(alone))


# ---- memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_offsets_inside_nan(kernel, dtype):
    """Every tensor a view with odd strides in memory filled with NaN: nothing beside it is read or written."""
    q, k, v = make((2, 4, 2, 3, 3, 16), dtype, kernel.device)
    g = torch.Generator().manual_seed(4)
    rings = [torch.randn(2, 2, 19, 16, generator=g).to(k) for _ in range(2)]
    seqlens = torch.tensor([4, 100], dtype=torch.int32, device=k.device)
    buffers = []

    def view(tensor):
        fill = -(2**31) if tensor.dtype == torch.int32 else torch.nan
        buffers.append(torch.full([3 * n + 2 for n in reversed(tensor.shape)], fill, dtype=tensor.dtype).to(k.device))
        return buffers[-1].permute(*reversed(range(tensor.ndim)))[(slice(1, -1, 3),) * tensor.ndim].copy_(tensor)

    views = [view(x) for x in (*rings, q, k, v, seqlens)]
    before = [x.clone() for x in buffers]
    kernel.update(*rings, k, v, seqlens)
    expected = kernel.decode(q, *rings, seqlens, window=10)
    k_cache, v_cache, *rest, positions = views
    kernel.update(k_cache, v_cache, *rest[1:], positions)
    out = kernel.decode(rest[0], k_cache, v_cache, positions, window=10)
    assert torch.equal(k_cache, rings[0]) and torch.equal(v_cache, rings[1])
    for i, (x, y) in enumerate(zip(buffers, before, strict=True)):
        changed = int((~((x == y) | (x.isnan() & y.isnan()))).sum())
        assert changed <= k.numel() if i < 2 else changed == 0
    if kernel.name == "reference":
        torch.testing.assert_close(out, expected)
    else:
        assert torch.equal(out, expected)


def test_memory_order_is_kept(kernel):
    q, k, v = make((2, 4, 2, 3, 9, 8), torch.float32, kernel.device)
    seqlens = torch.zeros(2, dtype=torch.int32, device=k.device)
    out = kernel.decode(q, k, v, seqlens)
    other = kernel.decode(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, seqlens)
    assert out.is_contiguous() and other.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, other)


@pytest.mark.parametrize(
    "size",
    [(0, 2, 1, 3, 4, 8), (2, 0, 1, 3, 4, 8), (2, 0, 0, 3, 4, 8), (2, 2, 1, 0, 4, 8), (2, 2, 1, 0, 0, 8)],
    ids=str,
)
def test_zero_sizes(kernel, size):
    q, k, v = make(size, torch.float32, kernel.device)
    seqlens = torch.zeros(size[0], dtype=torch.int32, device=k.device)
    assert kernel.decode(q, k, v, seqlens).shape == q.shape
    before = k.clone()
    kernel.update(k, v, k[:, :, :0], v[:, :, :0], seqlens)
    assert torch.equal(k, before)


# ---- torch's own machinery


def arguments(size=(2, 4, 2, 3, 20, 16), device="cpu", seed=0):
    q, k, v = make(size, torch.float32, device, seed=seed)
    m = size[3]
    seqlens = torch.tensor([7 * (b + 1) for b in range(size[0])], dtype=torch.int32, device=device)
    return {"q": q, "k_cache": k, "v_cache": v, "k": k[:, :, :m] + 1, "v": v[:, :, :m] - 1, "cache_seqlens": seqlens}


def update_of(args):
    return tuple(args[name] for name in ("k_cache", "v_cache", "k", "v", "cache_seqlens"))


def decode_of(args):
    return tuple(args[name] for name in ("q", "k_cache", "v_cache", "cache_seqlens"))


@pytest.mark.parametrize("device", sorted({"cuda" if name == "cuda" else "cpu" for name in KERNELS}))
def test_opcheck(device):
    for size in ((2, 4, 2, 3, 20, 16), (1, 1, 1, 1, 1, 8), (0, 2, 1, 3, 4, 8)):
        args = arguments(size, device)
        torch.library.opcheck(UPDATE, update_of(args))
        torch.library.opcheck(DECODE, decode_of(args), {"window": 1})


def step(q, k_cache, v_cache, k, v, cache_seqlens, window=4):
    kv_cache_update(k_cache, v_cache, k, v, cache_seqlens)
    out = causal_attention_decode(q, k_cache, v_cache, cache_seqlens, window=window)
    kv_cache_update(k_cache, v_cache, 2 * k, 2 * v, cache_seqlens + k.shape[2])
    return out + causal_attention_decode(q, k_cache, v_cache, cache_seqlens + k.shape[2], window=window)


def test_compile_fullgraph_dynamic():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = "inductor" if C else "aot_eager"  # inductor needs a compiler too
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for size in ((2, 4, 2, 3, 20, 16), (3, 6, 3, 2, 33, 24), (4, 8, 4, 5, 9, 40)):
        args, eager = arguments(size), arguments(size)
        torch.testing.assert_close(compiled(**args), step(**eager))
        assert torch.equal(args["k_cache"], eager["k_cache"]) and torch.equal(args["v_cache"], eager["v_cache"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_refuses_bad_arguments():
    compiled = torch.compile(causal_attention_decode, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="k_cache must have a capacity >= window"):
        compiled(*decode_of(arguments()), window=19)


class Layer(torch.nn.Module):
    """Two steps with rings in buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(2, 2, 11, 8))
        self.register_buffer("v_cache", torch.zeros(2, 2, 11, 8))

    def forward(self, q, k, v, seqlens):
        return step(q, self.k_cache, self.v_cache, k, v, seqlens)


def test_export():
    args = arguments((2, 4, 2, 3, 11, 8))
    inputs = (args["q"], args["k"], args["v"], args["cache_seqlens"])
    layer, other = Layer(), Layer()
    exported = torch.export.export(other, inputs).module()
    torch.testing.assert_close(exported(*inputs), layer(*inputs))
    assert torch.equal(exported.k_cache, layer.k_cache) and layer.v_cache.count_nonzero() > 0


def test_vmap():
    """Over models and streams: every mapped argument differs; the queries are shared."""
    calls = [arguments(seed=i) for i in range(3)]
    stacked = {name: torch.stack([call[name] for call in calls]) for name in calls[0]}
    stacked["q"] = calls[0]["q"]
    out = torch.vmap(step, in_dims=(None, 0, 0, 0, 0, 0))(*stacked.values())
    for i, call in enumerate(calls):
        torch.testing.assert_close(out[i], step(**call | {"q": stacked["q"]}))
        assert torch.equal(stacked["k_cache"][i], call["k_cache"])
    with pytest.raises(ValueError, match="k_cache must be mapped"):
        shared = [stacked["k_cache"][0], *(stacked[name] for name in ("v_cache", "k", "v", "cache_seqlens"))]
        torch.vmap(kv_cache_update, in_dims=(None, 0, 0, 0, 0))(*shared)


def test_autocast_narrows_nothing(kernel):
    q, k, v = make((2, 4, 2, 3, 20, 16), torch.float32, kernel.device)
    seqlens = torch.tensor([4, 50], dtype=torch.int32, device=k.device)
    expected = kernel.decode(q, k, v, seqlens)
    with torch.autocast(kernel.device, dtype=torch.bfloat16):
        assert torch.equal(kernel.decode(q, k, v, seqlens), expected)


def test_refuses_gradients():
    for function, of in ((kv_cache_update, update_of), (causal_attention_decode, decode_of)):
        for name in ("q", "k_cache", "v_cache", "k", "v"):
            args = arguments()
            before = args["k_cache"].clone()
            args[name].requires_grad_()
            if not any(x is args[name] for x in of(args)):
                continue
            with pytest.raises(RuntimeError, match=f"{name} requires grad"):
                function(*of(args))
            assert torch.equal(args["k_cache"].detach(), before)
            with torch.no_grad():
                function(*of(args))


# ---- wrong calls

Z = torch.zeros
WRONG_DECODE = {
    "q is a list": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "q has three dimensions": ({"q": Z(4, 3, 16)}, ValueError, r"q must have 4 dimensions, got shape \(4, 3, 16\)"),
    "q is int64": ({"q": Z(2, 4, 3, 16).long()}, TypeError, "q must be float32.*torch.int64"),
    "q has another batch": ({"q": Z(1, 4, 3, 16)}, ValueError, r"q must have shape.*batch 2.*got \(1, 4, 3, 16\)"),
    "q has another headdim": ({"q": Z(2, 4, 3, 8)}, ValueError, r"q must have shape.*headdim 16.*got \(2, 4, 3, 8\)"),
    "heads do not divide": ({"q": Z(2, 3, 3, 16)}, ValueError, "q must have a multiple of the heads of k_cache, got 3"),
    "k_cache is sparse": ({"k_cache": Z(2, 2, 20, 16).to_sparse()}, TypeError, "k_cache must be a dense tensor"),
    "k_cache is float64": ({"k_cache": Z(2, 2, 20, 16).double()}, TypeError, "k_cache must be torch.float32.*float64"),
    "k_cache is elsewhere": ({"k_cache": Z(2, 2, 20, 16, device="meta")}, ValueError, "k_cache must be on the device"),
    "v_cache is short": ({"v_cache": Z(2, 2, 19, 16)}, ValueError, r"v_cache must have the shape of k_cache.*19, 16\)"),
    "headdim 7": ({n: Z(2, 2, 3, 7) for n in ("q", "k_cache", "v_cache")}, ValueError, "k_cache must have a headdim"),
    "headdim 257": ({n: Z(2, 2, 3, 257) for n in ("q", "k_cache", "v_cache")}, ValueError, "headdim of 8..256"),
    "seqlens are int64": ({"cache_seqlens": Z(2).long()}, TypeError, "cache_seqlens must be int32, got torch.int64"),
    "seqlens are a number": ({"cache_seqlens": 3}, TypeError, "cache_seqlens must be a tensor, got int"),
    "seqlens of another batch": (
        {"cache_seqlens": Z(3).int()},
        ValueError,
        r"cache_seqlens must have shape.*got \(3,\)",
    ),
    "seqlens negative": (
        {"cache_seqlens": torch.tensor([4, -1]).int()},
        ValueError,
        "cache_seqlens must be >= 0, got -1",
    ),
    "window 0": ({"window": 0}, ValueError, "window must be >= 1.*got 0"),
    "window is a float": ({"window": 3.0}, TypeError, "window must be an integer or None, got float"),
    "window does not fit": ({"window": 19}, ValueError, "capacity >= window.*window 19, m = 3, capacity 20"),
    "window huge": ({"window": 2**63 - 1}, ValueError, "capacity >= window.*window 9223372036854775807, m = 3"),
    "window beyond int64": ({"window": 2**63}, ValueError, "window must be >= 1 "),
    "more than the ring": ({"q": Z(2, 4, 21, 16)}, ValueError, "capacity >= window.*m = 21, capacity 20"),
    "scale is NaN": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "scale is text": ({"scale": "x"}, TypeError, "scale must be a number or None, got str"),
}
WRONG_UPDATE = {
    "k is a list": ({"k": [1.0]}, TypeError, "k must be a tensor, got list"),
    "k is float16": ({"k": Z(2, 2, 3, 16).half()}, TypeError, "k must be torch.float32, the dtype of k_cache.*float16"),
    "k has another head": ({"k": Z(2, 1, 3, 16)}, ValueError, r"k must have shape \(2, 2, m, 16\).*\(2, 1, 3, 16\)"),
    "k is longer than the ring": ({"k": Z(2, 2, 21, 16)}, ValueError, "k must have shape.*m <= 20"),
    "v is shorter": ({"v": Z(2, 2, 2, 16)}, ValueError, r"v must have the shape of k, \(2, 2, 3, 16\), got"),
    "k_cache is None": ({"k_cache": None}, TypeError, "k_cache must be a tensor, got NoneType"),
    "k_cache is int8": ({"k_cache": Z(2, 2, 20, 16).char()}, TypeError, "k_cache must be float32.*int8"),
    "v_cache is expanded": ({"v_cache": Z(2, 2, 1, 16).expand(2, 2, 20, 16)}, ValueError, "must not be an expanded"),
    "v_cache is short": ({"v_cache": Z(2, 2, 19, 16)}, ValueError, "v_cache must have the shape of k_cache"),
    "seqlens are int64": ({"cache_seqlens": Z(2).long()}, TypeError, "cache_seqlens must be int32, got torch.int64"),
    "seqlens are elsewhere": (
        {"cache_seqlens": Z(2, device="meta").int()},
        ValueError,
        "seqlens must be on the device",
    ),
    "seqlens negative": ({"cache_seqlens": torch.tensor([4, -1]).int()}, ValueError, "must be >= 0, got -1"),
}


@pytest.mark.parametrize("case", WRONG_DECODE)
def test_wrong_decode(case):
    change, error, message = WRONG_DECODE[case]
    args = dict(zip(("q", "k_cache", "v_cache", "cache_seqlens"), decode_of(arguments()), strict=True)) | change
    for function in (causal_attention_decode, causal_attention_decode_ref):
        with pytest.raises(error, match=message):
            function(**args)
    with pytest.raises((RuntimeError, TypeError, ValueError)):  # the op itself rechecks everything
        DECODE(**args)


@pytest.mark.parametrize("case", WRONG_UPDATE)
def test_wrong_update(case):
    change, error, message = WRONG_UPDATE[case]
    names = ("k_cache", "v_cache", "k", "v", "cache_seqlens")
    args = dict(zip(names, update_of(arguments()), strict=True)) | change
    caches = [x for x in (args["k_cache"], args["v_cache"]) if x is not None]
    before = [x.clone() for x in caches]
    for function in (kv_cache_update, kv_cache_update_ref):
        with pytest.raises(error, match=message):
            function(**args)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        UPDATE(**args)
    assert all(torch.equal(x, y) for x, y in zip(caches, before, strict=True))


@gpu
def test_any_seqlens_are_safe_on_a_gpu():
    args = arguments((4, 4, 2, 3, 20, 16), "cuda")
    args["cache_seqlens"].copy_(torch.tensor([-1, -(2**31), 2**31 - 1, 5]))
    kv_cache_update(*update_of(args))
    assert causal_attention_decode(*decode_of(args))[3].isfinite().all()
    torch.cuda.synchronize()


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sanitize_every_form_on_a_gpu(dtype):
    """What compute-sanitizer watches: few calls of every form."""
    for chunks, window, capacity in [([1], 9, 9), ([1, 5, 2], 8, 13), ([40], 260, 300)]:
        q, k, v = make((2, 4, 2, capacity + 6, capacity + 6, 24), dtype, "cuda")
        assert step_by_step(Kernel("cuda"), q, k, v, capacity, chunks, window).isfinite().all()


@gpu
def test_cuda_graph_and_side_stream():
    args, eager = arguments(device="cuda"), arguments(device="cuda")
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        step(**arguments(device="cuda"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = step(**args)
            args["cache_seqlens"] += 3
        for _ in range(9):
            graph.replay()
            assert torch.equal(out, step(**eager))
            eager["cache_seqlens"] += 3
    assert torch.equal(args["k_cache"], eager["k_cache"])


# ---- which kernel runs


def test_explain(kernel):
    args = arguments(device=kernel.device)
    answer = explain(causal_attention_decode, *decode_of(args), window=5)
    assert answer.flops == 4 * 2 * 4 * 3 * 5 * 16
    assert answer.bytes == 4 * 16 * (2 * 2 * 4 * 3 + 2 * 2 * 2 * 7)
    update = explain("kv_cache_update", *update_of(args))
    assert update.flops == 0 and update.bytes == 4 * 4 * args["k"].numel()
    if len(KERNELS) == 1:
        name = backends()["causal_attention_decode"]["cpu"].split(":")[0]
        assert answer.kernel == update.kernel == name == "reference (plain torch)"
    elif kernel.name != "reference":
        assert "reference" not in answer.kernel + update.kernel

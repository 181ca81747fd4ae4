"""transformer_pack, transformer_state and transformer_generate: values, draws, and the guarantees of DESIGN 3."""

import threading

import pytest
import torch
from instruction_sets import in_use, instruction_sets
from transformer_cases import DTYPES, SHAPES, full_logits, options_of, pack_of, weights_of
from wavenet_cases import differing_draws

from audiokernels import (
    backends,
    explain,
    philox_uniform,
    transformer_generate,
    transformer_pack,
    transformer_position,
    transformer_state,
)
from audiokernels._library import C
from audiokernels.transformer_generate import transformer_generate_ref
from audiokernels.transformer_pack import TransformerShape, transformer_unpack

ISAS = instruction_sets("transformer_generate")
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.int8: 0.5 / 127}  # of a row's largest weight


def run(pack, batch, n, *, seed=1, state=None, **kwargs):
    state = transformer_state(pack, batch) if state is None else state
    return transformer_generate(pack, state, philox_uniform(seed, batch, n), **kwargs)


def reference(pack, state, uniforms, codes=None, condition=None, temperature=1.0):
    return transformer_generate_ref(
        pack.data, pack.shape.to_ints(), state, uniforms, codes, condition, temperature, True
    )


def random_codes(pack, batch, n, seed=3):
    return torch.randint(pack.shape.n_class, (batch, n), generator=torch.Generator().manual_seed(seed))


# ---- the pack


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_holds_the_weights_with_norms_folded_in(name, dtype):
    options, sizes = options_of(SHAPES[name])
    weights = weights_of(condition=3, **sizes)
    pack = transformer_pack(weights, **options, dtype=dtype)
    shape = pack.shape
    assert pack.data.numel() == shape.pack_bytes()
    assert TransformerShape.from_ints(shape.to_ints()) == shape
    unpacked = transformer_unpack(pack.data, shape)
    assert torch.equal(unpacked["embedding"][0], weights["embedding"])
    assert torch.equal(unpacked["condition"][0], weights["condition_weight"].T)
    for layer in range(shape.n_layer):
        for matrix, norm, rows in (("up", "norm2", shape.n_inner), ("down", None, shape.n_embd)):
            weight, bias = weights[f"{matrix}_weight"][layer], weights[f"{matrix}_bias"][layer]
            if norm:
                bias = bias + weight @ weights[f"{norm}_bias"][layer]
                weight = weight * weights[f"{norm}_weight"][layer]
            got, got_bias = unpacked[f"{matrix}.{layer}"]
            assert (got[:rows] - weight).abs().max() <= ROUNDED[dtype] * weight.abs().max() * 1.001
            assert torch.equal(got_bias[:rows], bias) and not got[rows:].any() and not got_bias[rows:].any()


def test_standard_model_has_the_expected_size():
    pack = pack_of(n_layer=3, n_embd=128, n_inner=512, n_head=4, window=1600, n_class=256)
    assert pack.shape.macs() == 3 * (12 * 128**2 + 2 * 1600 * 128) + 128 * 256
    assert pack.shape.cache_bytes() == 3 * 2 * 1600 * 128 * 4


# ---- values


@pytest.mark.parametrize("isa", [*dict.fromkeys([*ISAS, "reference"])])
@pytest.mark.parametrize("name", SHAPES)
def test_incremental_equals_full(name, isa):
    """Teacher-forced logits over three wraps of the ring against float64 attention over the whole sequence."""
    options, sizes = options_of(SHAPES[name])
    weights = weights_of(**sizes)
    pack = transformer_pack(weights, **options)
    n = 3 * pack.shape.capacity + 21
    codes, uniforms = random_codes(pack, 3, n), philox_uniform(1, 3, n)
    with in_use(isa):
        if isa == "reference":
            out, logits = reference(pack, transformer_state(pack, 3), uniforms, codes)
        else:
            out, logits = transformer_generate(
                pack, transformer_state(pack, 3), uniforms, codes=codes, return_logits=True
            )
    expected = full_logits(weights, codes, options)
    assert torch.equal(out.long(), codes) and out.dtype == (torch.uint8 if pack.shape.n_class <= 256 else torch.int16)
    error, largest = (logits - expected).abs().max(), float(expected.abs().max())
    assert error <= 1e-5 * max(1.0, largest)
    plain = full_logits(weights, codes, options, dtype=torch.float32)
    assert error <= 3 * (plain - expected).abs().max() + 2 * largest * 2.0**-23


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_narrow_packs_are_near_the_reference(dtype, isa):
    """The same pack in plain torch; int8 kernels also round their activations, avx512_bf16 too."""
    for name in ("odd sizes", "logits", "haar"):
        options, sizes = options_of(SHAPES[name])
        pack = transformer_pack(weights_of(**sizes), **options, dtype=dtype)
        n = pack.shape.capacity + 40
        codes, uniforms = random_codes(pack, 5, n), philox_uniform(1, 5, n)
        _, expected = reference(pack, transformer_state(pack, 5), uniforms, codes)
        with in_use(isa):
            _, logits = transformer_generate(
                pack, transformer_state(pack, 5), uniforms, codes=codes, return_logits=True
            )
        # A sum in another order may round a key or value to the other neighbour, 2^-8 away.
        difference = (logits - expected).abs() / expected.abs().max()
        exact = dtype == torch.bfloat16 and isa not in ("avx512_bf16", "avx512_amx")
        assert difference.max() <= (0.01 if exact else 0.06) and difference.mean() <= (2e-4 if exact else 0.01)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_has_a_dtype_of_its_own(cache, isa):
    """Float32 weights over either cache, against the reference over the same one, past a wrap of the ring."""
    options, sizes = options_of(SHAPES["odd sizes"])
    exact = transformer_pack(weights_of(**sizes), **options)
    pack = exact.with_cache(cache)
    assert pack.data is exact.data and pack.shape.cache_bytes() * 4 == exact.shape.cache_bytes() * cache.itemsize
    n = pack.shape.capacity + 40
    codes, uniforms = random_codes(pack, 2, n), philox_uniform(1, 2, n)
    _, expected = reference(pack, transformer_state(pack, 2), uniforms, codes)
    with in_use(isa):
        _, logits = transformer_generate(pack, transformer_state(pack, 2), uniforms, codes=codes, return_logits=True)
        _, float32 = transformer_generate(exact, transformer_state(exact, 2), uniforms, codes=codes, return_logits=True)
    largest = expected.abs().max()
    assert (logits - expected).abs().max() <= (1e-5 if cache == torch.float32 else 0.01) * largest
    rounding = (logits - float32).abs().max() / largest
    assert rounding == 0 if cache == torch.float32 else 1e-5 < rounding < 0.02
    kernel = explain(transformer_generate, pack, transformer_state(pack, 2), uniforms).kernel
    assert f"{str(cache).removeprefix('torch.')} cache" in kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, "bfloat16"])
def test_the_cache_is_float32_or_bfloat16(dtype):
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.bfloat16, got"):
        pack_of().with_cache(dtype)


@pytest.mark.parametrize("hop", [1, 7, 16])
@pytest.mark.parametrize("implementation", ["op", "reference"])
def test_condition_is_held_for_the_hop(hop, implementation):
    weights, n = weights_of(condition=5), 60
    pack = transformer_pack(weights, n_head=2, window=20, hop=hop)
    frames = torch.randn(2, (n - 1) // hop + 1, 5, generator=torch.Generator().manual_seed(1))
    codes, uniforms = random_codes(pack, 2, n), philox_uniform(0, 2, n)
    if implementation == "op":
        _, logits = transformer_generate(
            pack, transformer_state(pack, 2), uniforms, codes=codes, condition=frames, return_logits=True
        )
    else:
        _, logits = reference(pack, transformer_state(pack, 2), uniforms, codes, frames)
    expected = full_logits(weights, codes, {"n_head": 2, "window": 20}, frames=frames, hop=hop)
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_condition_in_chunks_begins_with_the_current_frame():
    hop, n = 7, 60
    pack = pack_of(condition=5, hop=hop)
    condition = torch.randn(2, (n - 1) // hop + 1, 5, generator=torch.Generator().manual_seed(1))
    whole = run(pack, 2, n, condition=condition)
    state, blocks = transformer_state(pack, 2), []
    for begin, end in ((0, 3), (3, 7), (7, 30), (30, 31), (31, 60)):
        frames = condition[:, begin // hop : (end - 1) // hop + 1]
        uniforms = philox_uniform(1, 2, end - begin, position=begin)
        blocks.append(transformer_generate(pack, state, uniforms, condition=frames))
    assert torch.equal(torch.cat(blocks, 1), whole)


# ---- draws


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_differ_from_the_reference_only_on_an_edge(dtype):
    """2,000 draws of the kernel, each repeated in float32 over the whole sequence under teacher forcing."""
    sizes = {"n_embd": 32, "n_inner": 64, "n_class": 256}
    weights, batch, n = weights_of(**sizes), 4, 500
    pack = transformer_pack(weights, n_head=2, window=50, dtype=dtype)
    uniforms = philox_uniform(5, batch, n)
    codes, logits = transformer_generate(pack, transformer_state(pack, batch), uniforms, return_logits=True)
    expected = full_logits(weights, codes.long(), {"n_head": 2, "window": 50}, dtype=torch.float32)
    largest = float((logits - expected).abs().max() / expected.abs().max())
    assert largest <= {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.int8: 0.12}[dtype]
    differ, off_edge = differing_draws(logits, expected, uniforms, codes)
    assert off_edge == 0
    if dtype == torch.float32:
        assert differ < 1 + batch * n / 10_000
    assert len(codes.unique()) > 100  # the draws do visit the distribution


def test_temperature_zero_takes_the_largest_logit_and_temperature_sharpens():
    pack = pack_of()
    greedy, logits = run(pack, 8, 40, temperature=0.0, return_logits=True)
    assert torch.equal(greedy.long(), logits.argmax(2))
    cold, hot = (run(pack, 4, 300, temperature=t, return_logits=True) for t in (0.3, 1.5))
    for temperature, (codes, logits) in ((0.3, cold), (1.5, hot)):
        scaled = logits / temperature
        differ, off_edge = differing_draws(scaled, scaled, philox_uniform(1, 4, 300), codes)
        assert differ <= 2 and off_edge == 0
    top = [float((codes.long() == logits.argmax(2)).float().mean()) for codes, logits in (cold, hot)]
    assert top[0] > top[1] + 0.1


# ---- guarantees


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "film, sinusoidal", "haar"])
def test_codes_do_not_depend_on_instruction_set_batch_or_threads(name, dtype):
    options, sizes = options_of(SHAPES[name])
    pack = transformer_pack(weights_of(**{**sizes, "n_class": 256}), **options, dtype=dtype)
    uniforms = philox_uniform(3, 21, 250)
    expected = transformer_generate(pack, transformer_state(pack, 21), uniforms)
    assert len(expected.unique()) > 100
    for isa in ISAS:
        if dtype == torch.bfloat16 and isa in ("avx512_bf16", "avx512_amx"):
            continue  # its instruction adds pairs
        if dtype == torch.bfloat16 and ISAS[-1] in ("avx512_bf16", "avx512_amx"):
            continue
        with in_use(isa):
            assert torch.equal(transformer_generate(pack, transformer_state(pack, 21), uniforms), expected), isa
    alone = [transformer_generate(pack, transformer_state(pack, 1), uniforms[i : i + 1]) for i in (0, 7, 20)]
    assert torch.equal(torch.cat(alone), expected[[0, 7, 20]])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(transformer_generate(pack, transformer_state(pack, 21), uniforms), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_a_stream_do_not_depend_on_the_batch(name, dtype, isa):
    """Bit for bit: kernels differ with the number of streams, and tiles take 16 of them at most."""
    options, sizes = options_of(SHAPES[name])
    pack = transformer_pack(weights_of(**sizes), **options, dtype=dtype)
    codes = torch.randint(pack.shape.n_class, (21, 30), generator=torch.Generator().manual_seed(5))
    with in_use(isa):
        _, expected = run(pack, 21, 30, codes=codes, return_logits=True)
        for batch in (1, 2, 3, 16, 17):
            _, logits = run(pack, batch, 30, codes=codes[:batch], return_logits=True)
            assert torch.equal(logits, expected[:batch]), batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "logits", "haar", "window over a block"])
def test_chunks_and_ring_wraps(name, dtype):
    """Chunks of 1 .. 17 samples over three wraps of the ring equal one call; so does a resume by file."""
    options, sizes = options_of(SHAPES[name])
    pack = transformer_pack(weights_of(**sizes), **options, dtype=dtype)
    n = 3 * pack.shape.capacity + 10
    whole = run(pack, 2, n)
    state, blocks, at, size = transformer_state(pack, 2), [], 0, 0
    while at < n:
        size = min(size % 17 + 1, n - at)
        blocks.append(transformer_generate(pack, state, philox_uniform(1, 2, size, position=at)))
        at += size
        assert transformer_position(state).tolist() == [at] * 2
        state = torch.from_numpy(state.numpy().copy())  # saved and loaded
    assert torch.equal(torch.cat(blocks, 1), whole)


def test_rows_are_independent_and_may_be_forked():
    pack = pack_of()
    uniforms = philox_uniform(2, 9, 100)
    whole = transformer_generate(pack, transformer_state(pack, 9), uniforms)
    state = transformer_state(pack, 9)
    first = transformer_generate(pack, state, uniforms[:, :40])
    later = transformer_generate(pack, state[3:8], uniforms[3:8, 40:])  # a view of some rows is advanced in place
    assert torch.equal(first, whole[:, :40]) and torch.equal(later, whole[3:8, 40:])
    assert transformer_position(state).tolist() == [40] * 3 + [100] * 5 + [40]
    fork = torch.cat([state[0:1], state[5:6]])  # rows of different positions in one batch
    both = transformer_generate(pack, fork, uniforms[[0, 0], 40:])
    assert torch.equal(both[0], whole[0, 40:])


def test_prompt_is_followed_and_costs_no_draw():
    pack = pack_of()
    uniforms = philox_uniform(3, 2, 90)
    free = transformer_generate(pack, transformer_state(pack, 2), uniforms)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        prompted = transformer_generate(pack, transformer_state(pack, 2), uniforms, codes=free[:, :50].to(dtype))
        assert torch.equal(prompted, free)
    strided = free[:, :50].repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(transformer_generate(pack, transformer_state(pack, 2), uniforms, codes=strided), free)
    other = transformer_generate(pack, transformer_state(pack, 2), uniforms, codes=(free[:, :50] + 1) % 64)
    assert not torch.equal(other[:, 50:], free[:, 50:])


def test_long_positions_stay_exact():
    """A stream moved to position 2^20 - 10 is the same but for the rounding of its angles."""
    pack, n = pack_of(fusion="logits"), 60
    codes = random_codes(pack, 1, 200)
    near = transformer_state(pack, 1)
    run(pack, 1, 140, state=near, codes=codes[:, :140])
    far = transformer_state(pack, 1)
    far[:, 0] = 2**20 - 192  # a multiple of the ring, so that keys lie where they lay
    run(pack, 1, 140, state=far, codes=codes[:, :140])
    expected = run(pack, 1, n, state=near, codes=codes[:, 140:], return_logits=True)[1]
    logits = run(pack, 1, n, state=far, codes=codes[:, 140:], return_logits=True)[1]
    assert transformer_position(far).tolist() == [2**20 - 192 + 200]
    assert (logits - expected).abs().max() <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_causality(name):
    """Another code at t0 changes no logit up to t0, and the one after it."""
    options, sizes = options_of(SHAPES[name])
    pack = transformer_pack(weights_of(**sizes), **options)
    codes = random_codes(pack, 1, 80)
    other = codes.clone()
    other[:, 40] = (codes[:, 40] + 7) % pack.shape.n_class
    a, b = (run(pack, 1, 80, codes=c, return_logits=True)[1] for c in (codes, other))
    assert torch.equal(a[:, :41], b[:, :41]) and not torch.equal(a[:, 41], b[:, 41])


def test_nothing_beyond_the_window_is_seen():
    """What lies in the slots of the ring that the window does not reach may be anything finite."""
    pack = pack_of(window=20)
    state = transformer_state(pack, 1)
    run(pack, 1, 200, state=state)
    changed, shape = state.clone(), pack.shape
    slots = [(200 - age) % shape.capacity for age in range(20, shape.capacity + 1)]
    for layer in range(shape.n_layer):
        size = shape.n_head * shape.capacity
        start = 16 + layer * size * (shape.headdim + shape.head_rows)
        keys = changed[:, start : start + size * shape.headdim].view(1, shape.n_head, -1, shape.headdim, 64)
        values = changed[:, start + size * shape.headdim :][:, : size * shape.head_rows]
        for slot in slots:
            keys[:, :, slot // 64, :, slot % 64] = 1000.0
            values.view(1, shape.n_head, -1, shape.head_rows)[:, :, slot] = -1000.0
    assert not torch.equal(changed, state)
    same, other = (run(pack, 1, 60, state=s, seed=2, return_logits=True)[1] for s in (state, changed))
    assert torch.equal(same, other)


def test_empty_batch_and_no_samples():
    pack = pack_of()
    assert run(pack, 0, 5).shape == (0, 5)
    state = transformer_state(pack, 2)
    before = state.clone()
    codes, logits = run(pack, 2, 0, state=state, return_logits=True)
    assert codes.shape == (2, 0) and logits.shape == (2, 0, 64) and torch.equal(state, before)


def test_weights_of_nan_or_infinity_neither_crash_nor_leave_the_range(unchecked_weights):
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        for dtype in DTYPES:
            weights = weights_of(fusion="film")
            weights["qkv_weight"][0, 0, 0] = value
            weights["out_bias"][3] = value
            pack = transformer_pack(weights, n_head=2, window=20, fusion="film", dtype=dtype)
            assert int(run(pack, 3, 40).max()) < 64


# ---- torch


@pytest.mark.parametrize("condition", [0, 3])
def test_opcheck(condition):
    pack = pack_of(condition=condition, hop=4)
    frames = torch.randn(2, 2, condition) if condition else None
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    args = (pack.data, pack.shape.to_ints(), transformer_state(pack, 2), philox_uniform(0, 2, 8), codes, frames, 1.0)
    torch.library.opcheck(torch.ops.audiokernels.transformer_generate.default, (*args, True))


def test_compiles_without_a_graph_break():
    pack = pack_of()

    def step(state, uniforms):
        codes, logits = torch.ops.audiokernels.transformer_generate.default(
            pack.data, pack.shape.to_ints(), state, uniforms, None, None, 1.0, True
        )
        return codes.float() * 2, torch.softmax(logits, 2)

    eager_state, compiled_state = transformer_state(pack, 2), transformer_state(pack, 2)
    uniforms = philox_uniform(0, 2, 30)
    expected = step(eager_state, uniforms)
    got = torch.compile(step, fullgraph=True, dynamic=True)(compiled_state, uniforms)
    assert torch.equal(got[0], expected[0]) and torch.allclose(got[1], expected[1], atol=1e-6)
    assert torch.equal(eager_state, compiled_state)


def test_explain_names_the_kernel_that_runs():
    pack = pack_of(dtype=torch.int8)
    told = explain("transformer_generate", pack, transformer_state(pack, 2), philox_uniform(0, 2, 10))
    assert told.flops == 2 * pack.shape.macs() * 20
    assert told.bytes == (pack.data.numel() + 2 * pack.shape.cache_bytes()) * 10
    if ISAS == ["reference"]:
        assert told.kernel.startswith("reference") and backends()["transformer_generate"]["cpu"].startswith("reference")
    else:
        assert told.kernel == f"C++ ({C.isa()}, int8, bfloat16 cache)"
        assert torch._C._dispatch_has_kernel_for_dispatch_key("audiokernels::transformer_generate", "CPU")


def test_autograd_is_refused_not_ignored():
    pack = pack_of(condition=2)
    condition = torch.zeros(1, 8, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="condition requires grad"):
        run(pack, 1, 8, condition=condition)
    with torch.no_grad():
        run(pack, 1, 8, condition=condition)


def test_eight_threads_at_once():
    pack = pack_of()
    expected, results = run(pack, 2, 50), []

    def work():
        for _ in range(5):
            results.append(run(pack, 2, 50))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40 and all(torch.equal(r, expected) for r in results)

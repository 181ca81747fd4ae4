"""wavenet_pack, wavenet_state and wavenet_generate: values, draws, and the guarantees of DESIGN 3."""

import multiprocessing
import threading

import pytest
import torch
from instruction_sets import in_use, instruction_sets
from wavenet_cases import DTYPES, differing_draws, full_logits, pack_of, weights_of

from audiokernels import (
    backends,
    explain,
    philox_uniform,
    wavenet_generate,
    wavenet_pack,
    wavenet_position,
    wavenet_state,
    wavenet_unpack,
)
from audiokernels._library import C
from audiokernels.wavenet_generate import wavenet_generate_ref

compiled = pytest.mark.skipif(C is None, reason="no compiled kernel in this installation")
SHAPES = {
    "plain": ([1, 2, 4, 8], {}),
    "odd sizes": ([1, 2, 4, 8], {"residual": 20, "hidden": 12, "skip": 40, "head": 24, "n_class": 50}),
    "tiny": ([3, 1], {"residual": 1, "hidden": 1, "skip": 1, "head": 1, "n_class": 2}),
    "width 3": ([1, 3, 9], {"width": 3, "residual": 33, "hidden": 17}),
    "width 1": ([1, 1], {"width": 1}),
    "width 5": ([2, 7], {"width": 5, "residual": 7}),
    "one layer": ([6], {}),
    "primes": ([5, 3, 7, 2], {"residual": 31, "hidden": 37, "skip": 61, "head": 67, "n_class": 127}),
    "int16 codes": ([1, 2], {"n_class": 300}),
}


@pytest.fixture
def each_isa():
    """The instruction sets to try; the one before is in use again afterwards."""
    if C is None:
        yield []
        return
    before = C.isa()
    yield C.supported_isas()
    C.set_isa(before)


def run(pack, batch, n, *, seed=1, state=None, **kwargs):
    state = wavenet_state(pack, batch) if state is None else state
    return wavenet_generate(pack, state, philox_uniform(seed, batch, n), **kwargs)


def reference(pack, state, uniforms, codes=None, condition=None, temperature=1.0, return_logits=True):
    return wavenet_generate_ref(
        pack.data, pack.shape.to_ints(), state, uniforms, codes, condition, temperature, return_logits
    )


# ---- the pack ----


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_holds_the_weights(name, dtype):
    dilations, sizes = SHAPES[name]
    weights = weights_of(len(dilations), condition=3, **sizes)
    pack = wavenet_pack(weights, dilations, dtype=dtype)
    assert pack.data.numel() == pack.shape.pack_bytes()
    unpacked = wavenet_unpack(pack.data, pack.shape)
    assert set(unpacked) == set(weights)
    for key, tensor in weights.items():
        exact = dtype == torch.float32 or "bias" in key or key in ("embedding", "condition_weight")
        largest = tensor.abs().amax() if tensor.numel() else torch.tensor(0.0)
        error = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.int8: 0.5 / 127}.get(dtype, 0.0)
        bound = 0.0 if exact else float(largest) * error * 1.001
        assert unpacked[key].shape == tensor.shape, key
        assert (unpacked[key] - tensor).abs().max().item() <= bound if tensor.numel() else True, key


def test_standard_model_has_the_published_size():
    pack = pack_of([2**i for i in range(10)] * 2, residual=64, hidden=64, skip=256, head=256, n_class=256)
    assert pack.shape.macs() == 868_352 - 64 * 64  # peers.md counts the last layer's residual, which nothing reads
    assert pack.shape.receptive_field == 2047


# ---- values ----


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", ["op", "reference"])
def test_incremental_equals_full(name, implementation):
    """Teacher-forced logits over more than two receptive fields against float64 convolutions over the sequence."""
    dilations, sizes = SHAPES[name]
    weights = weights_of(len(dilations), **sizes)
    pack = wavenet_pack(weights, dilations)
    n = 2 * pack.shape.receptive_field + 40
    codes = torch.randint(pack.shape.n_class, (3, n), generator=torch.Generator().manual_seed(3))
    uniforms = philox_uniform(1, 3, n)
    if implementation == "op":
        out, logits = wavenet_generate(pack, wavenet_state(pack, 3), uniforms, codes=codes, return_logits=True)
    else:
        out, logits = reference(pack, wavenet_state(pack, 3), uniforms, codes)
    expected = full_logits(weights, dilations, codes)
    assert torch.equal(out.long(), codes) and out.dtype == (torch.uint8 if pack.shape.n_class <= 256 else torch.int16)
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    plain = full_logits(weights, dilations, codes, dtype=torch.float32)
    ulp = float(expected.abs().max()) * 2.0**-23
    assert (logits - expected).abs().max() <= 2 * (plain - expected).abs().max() + 2 * ulp


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_right(dtype, each_isa):
    dilations, n = [1, 2, 4, 8, 16], 200
    weights = weights_of(5, residual=40, hidden=24, skip=48, head=40, n_class=96)
    pack = wavenet_pack(weights, dilations, dtype=dtype)
    codes = torch.randint(96, (7, n), generator=torch.Generator().manual_seed(0))
    # What the pack holds, in float64: int8 kernels also round their activations.
    expected = full_logits(wavenet_unpack(pack.data, pack.shape), dilations, codes)
    bound = (0.03 if dtype == torch.int8 else 1e-5) * max(1.0, float(expected.abs().max()))
    for isa in each_isa:
        C.set_isa(isa)
        _, logits = run(pack, 7, n, codes=codes, return_logits=True)
        error = float((logits - expected).abs().max())
        rounds_inputs = dtype == torch.bfloat16 and isa in ("avx512_bf16", "avx512_amx")
        assert error <= (0.03 * float(expected.abs().max()) if rounds_inputs else bound), (isa, error)


@pytest.mark.parametrize("hop", [1, 7, 16])
@pytest.mark.parametrize("implementation", ["op", "reference"])
def test_condition_is_held_for_the_hop(hop, implementation):
    dilations, n = [1, 2, 4], 60
    weights = weights_of(3, condition=5)
    pack = wavenet_pack(weights, dilations, hop=hop)
    g = torch.Generator().manual_seed(1)
    condition = torch.randn(2, (n - 1) // hop + 1, 5, generator=g)
    codes = torch.randint(64, (2, n), generator=g)
    uniforms = philox_uniform(0, 2, n)
    if implementation == "op":
        _, logits = wavenet_generate(
            pack, wavenet_state(pack, 2), uniforms, codes=codes, condition=condition, return_logits=True
        )
    else:
        _, logits = reference(pack, wavenet_state(pack, 2), uniforms, codes, condition)
    expected = full_logits(weights, dilations, codes, condition=condition, hop=hop)
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_condition_in_chunks_begins_with_the_current_frame():
    hop, n = 7, 60
    pack = pack_of([1, 2, 4], condition=5, hop=hop)
    condition = torch.randn(2, (n - 1) // hop + 1, 5, generator=torch.Generator().manual_seed(1))
    whole = run(pack, 2, n, condition=condition)
    state, blocks = wavenet_state(pack, 2), []
    for begin, end in ((0, 3), (3, 7), (7, 30), (30, 31), (31, 60)):
        frames = condition[:, begin // hop : (end - 1) // hop + 1]
        uniforms = philox_uniform(1, 2, end - begin, position=begin)
        blocks.append(wavenet_generate(pack, state, uniforms, condition=frames))
    assert torch.equal(torch.cat(blocks, 1), whole)


# ---- draws ----


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_differ_from_the_reference_only_on_an_edge(dtype):
    """10,000 draws of the kernel, each repeated by the float32 reference under teacher forcing."""
    dilations, n, batch = [1, 2, 4, 8, 16, 32], 2500, 4
    weights = weights_of(6, residual=32, hidden=32, skip=64, head=64, n_class=256)
    pack, exact = wavenet_pack(weights, dilations, dtype=dtype), wavenet_pack(weights, dilations)
    uniforms = philox_uniform(5, batch, n)
    codes, logits = wavenet_generate(pack, wavenet_state(pack, batch), uniforms, return_logits=True)
    expected = full_logits(weights, dilations, codes, dtype=torch.float32)
    largest = float((logits - expected).abs().max() / expected.abs().max())
    assert largest <= {torch.float32: 1e-5, torch.float16: 0.003, torch.bfloat16: 0.02, torch.int8: 0.05}[dtype]
    differ, off_edge = differing_draws(logits, expected, uniforms, codes)
    assert off_edge == 0
    if dtype == torch.float32:
        assert differ < 1 + batch * n / 10_000
        # The step-by-step reference itself, on a part of it, teacher-forced by the kernel's own draws.
        _, stepped = reference(exact, wavenet_state(exact, batch), uniforms[:, :150], codes[:, :150])
        assert (stepped - logits[:, :150]).abs().max() <= 1e-5 * float(expected.abs().max())
    assert len(codes.unique()) > 100  # the draws do visit the distribution


@pytest.mark.parametrize("implementation", ["op", "reference"])
def test_drawing_rule_by_hand(implementation):
    """A network whose logits are its output bias: the inverse CDF of a known distribution, in closed form."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in weights_of(1, n_class=4).items()}
    p = torch.tensor([0.5, 0.0, 0.25, 0.25])
    weights["out_bias"] = p.log()
    pack = wavenet_pack(weights, [1])
    below_one = 1 - 2.0**-24
    u = torch.tensor([[0.0, 0.499, 0.501, 0.749, 0.751, below_one]])
    call = run if implementation == "op" else lambda pack, *_: reference(pack, wavenet_state(pack, 1), u)[0]
    codes = wavenet_generate(pack, wavenet_state(pack, 1), u) if call is run else call(pack)
    assert codes.tolist() == [[0, 0, 2, 2, 3, 3]]
    weights["out_bias"] = torch.tensor([0.0, 5.0, 5.0, -torch.inf])  # the last class can never be drawn
    pack = wavenet_pack(weights, [1])
    greedy = {"temperature": 0.0}
    if implementation == "op":
        assert wavenet_generate(pack, wavenet_state(pack, 1), u, **greedy).tolist() == [[1] * 6]
        assert int(wavenet_generate(pack, wavenet_state(pack, 1), u).max()) == 2
    else:
        assert reference(pack, wavenet_state(pack, 1), u, **greedy)[0].tolist() == [[1] * 6]
        assert int(reference(pack, wavenet_state(pack, 1), u)[0].max()) == 2


def test_temperature_sharpens():
    pack = pack_of([1, 2, 4])
    cold, hot = (run(pack, 1, 3000, temperature=t, return_logits=True) for t in (0.3, 1.5))
    for temperature, (codes, logits) in ((0.3, cold), (1.5, hot)):
        scaled = logits / temperature
        differ, off_edge = differing_draws(scaled, scaled, philox_uniform(1, 1, 3000), codes)
        assert differ <= 2 and off_edge == 0, temperature
    top = [float((codes.long() == logits.argmax(2)).float().mean()) for codes, logits in (cold, hot)]
    assert top[0] > top[1] + 0.1


def test_temperature_zero_takes_the_largest_logit():
    pack = pack_of([1, 2, 4])
    state = wavenet_state(pack, pack.shape.n_class)
    state[:, 2] = torch.arange(pack.shape.n_class)  # a stream after each code: near ties among them
    greedy, logits = run(pack, len(state), 20, state=state, temperature=0.0, return_logits=True)
    assert torch.equal(greedy.long(), logits.argmax(2))
    second = logits.topk(2, dim=2).values
    assert float((second[..., 0] - second[..., 1]).min()) < 0.1, "no near tie: this proves little"


# ---- guarantees ----


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_codes_do_not_depend_on_instruction_set_batch_chunks_or_threads(dtype, each_isa):
    """16,000 samples of 20 seeds on a small model, bit for bit."""
    pack = pack_of([1, 2, 4, 8], dtype=dtype, residual=16, hidden=16, skip=32, head=32, n_class=256)
    n, seeds = 16_000, 20
    uniforms = torch.cat([philox_uniform(seed, 1, n) for seed in range(seeds)])
    expected = wavenet_generate(pack, wavenet_state(pack, seeds), uniforms)
    assert len(expected[0].unique()) > 50 and C.isa() == each_isa[-1]
    for isa in each_isa[:-1]:
        C.set_isa(isa)
        assert torch.equal(wavenet_generate(pack, wavenet_state(pack, seeds), uniforms), expected), isa
    C.set_isa(each_isa[-1])
    alone = torch.cat([wavenet_generate(pack, wavenet_state(pack, 1), uniforms[i : i + 1]) for i in range(seeds)])
    assert torch.equal(alone, expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(wavenet_generate(pack, wavenet_state(pack, seeds), uniforms), expected)
    finally:
        torch.set_num_threads(threads)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_codes_of_the_standard_model_do_not_depend_on_the_instruction_set(dtype, each_isa):
    pack = pack_of([2**i for i in range(10)] * 2, dtype=dtype, residual=64, hidden=64, skip=256, head=256, n_class=256)
    uniforms = philox_uniform(11, 1, 2000)
    expected = wavenet_generate(pack, wavenet_state(pack, 1), uniforms)
    assert C.isa() == each_isa[-1]
    for isa in each_isa[:-1]:
        C.set_isa(isa)
        assert torch.equal(wavenet_generate(pack, wavenet_state(pack, 1), uniforms), expected), isa


@compiled
@pytest.mark.parametrize("isa", instruction_sets("wavenet_generate"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_a_stream_do_not_depend_on_the_batch(name, dtype, isa):
    """Bit for bit: kernels differ with the number of streams, and tiles take 16 of them at most."""
    dilations, sizes = SHAPES[name]
    pack = pack_of(dilations, dtype=dtype, **sizes)
    codes = torch.randint(pack.shape.n_class, (37, 20), generator=torch.Generator().manual_seed(5))
    with in_use(isa):
        _, expected = run(pack, 37, 20, codes=codes, return_logits=True)
        for batch in (1, 2, 3, 7, 16, 17):
            _, logits = run(pack, batch, 20, codes=codes[:batch], return_logits=True)
            assert torch.equal(logits, expected[:batch]), batch


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", instruction_sets("wavenet_generate"))
def test_infinite_sums_stay_infinite(isa, dtype, unchecked_weights):
    """And do not disturb their neighbours, in a fused multiply-add made of doubles either."""
    weights = weights_of(1)
    codes = torch.randint(64, (2, 300), generator=torch.Generator().manual_seed(5))
    with in_use(isa):
        _, expected = run(wavenet_pack(weights, [1], dtype=dtype), 2, 300, codes=codes, return_logits=True)
        weights["out_bias"][3], weights["out_bias"][40] = -torch.inf, torch.inf
        _, logits = run(wavenet_pack(weights, [1], dtype=dtype), 2, 300, codes=codes, return_logits=True)
    expected[:, :, 3], expected[:, :, 40] = -torch.inf, torch.inf
    assert torch.equal(logits, expected)


@compiled
@pytest.mark.parametrize("isa", instruction_sets("wavenet_generate"))
def test_subnormal_sums_do_not_depend_on_the_batch(isa):
    """Products of bfloat16 in tiles count subnormal numbers as zero."""
    weights, g = weights_of(1, skip=64, head=64), torch.Generator().manual_seed(7)
    weights["skip_weight"].zero_()
    weights["skip_bias"] = 1e-19 * torch.rand(1, 64, generator=g)
    weights["head_weight"] = 1e-19 * torch.randn(64, 64, generator=g)
    weights["head_bias"] = 1e-38 * torch.rand(64, generator=g)
    weights["out_bias"].zero_()
    pack, codes = wavenet_pack(weights, [1], dtype=torch.bfloat16), torch.zeros(5, 8, dtype=torch.uint8)
    with in_use(isa):
        _, expected = run(pack, 5, 8, codes=codes, return_logits=True)
        _, alone = run(pack, 1, 8, codes=codes[:1], return_logits=True)
    assert 0 < float(expected.abs().max()) < 1e-35
    assert torch.equal(alone[0], expected[0]) and torch.equal(alone[0], expected[4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_chunks_and_ring_wraps(dtype, width):
    """Chunks of 1 .. 17 samples over more than three wraps of every ring equal one call; so does a resume by file."""
    pack = pack_of([1, 2, 5, 16], dtype=dtype, width=width)
    n = sum(range(1, 18)) + 3
    assert n > 3 * max(1, (width - 1) * 16)
    whole = run(pack, 3, n)
    state, blocks, at = wavenet_state(pack, 3), [], 0
    for size in [*range(1, 18), 3]:
        blocks.append(wavenet_generate(pack, state, philox_uniform(1, 3, size, position=at)))
        at += size
        assert wavenet_position(state).tolist() == [at] * 3
        state = torch.from_numpy(state.numpy().copy())  # saved and loaded
    assert torch.equal(torch.cat(blocks, 1), whole)


def test_rows_are_independent_and_may_be_forked():
    pack = pack_of([1, 2, 4, 8])
    uniforms = philox_uniform(2, 9, 100)
    whole = wavenet_generate(pack, wavenet_state(pack, 9), uniforms)
    state = wavenet_state(pack, 9)
    first = wavenet_generate(pack, state, uniforms[:, :40])
    later = wavenet_generate(pack, state[3:8], uniforms[3:8, 40:])  # a view of some rows is advanced in place
    assert torch.equal(first, whole[:, :40]) and torch.equal(later, whole[3:8, 40:])
    assert wavenet_position(state).tolist() == [40] * 3 + [100] * 5 + [40]
    fork = torch.cat([state[0:1], state[5:6]])  # rows of different positions in one batch
    both = wavenet_generate(pack, fork, uniforms[[0, 0], 40:])
    assert torch.equal(both[0], whole[0, 40:])


def test_prompt_is_followed_and_costs_no_draw():
    pack = pack_of([1, 2, 4, 8])
    uniforms = philox_uniform(3, 2, 90)
    free = wavenet_generate(pack, wavenet_state(pack, 2), uniforms)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        prompted = wavenet_generate(pack, wavenet_state(pack, 2), uniforms, codes=free[:, :50].to(dtype))
        assert torch.equal(prompted, free)
    strided = free[:, :50].repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(wavenet_generate(pack, wavenet_state(pack, 2), uniforms, codes=strided), free)
    assert torch.equal(wavenet_generate(pack, wavenet_state(pack, 2), uniforms.T.contiguous().T), free)
    other = wavenet_generate(pack, wavenet_state(pack, 2), uniforms, codes=(free[:, :50] + 1) % 64)
    assert not torch.equal(other[:, 50:], free[:, 50:])


def test_long_positions_stay_exact():
    """Position 2^20 - 3 on: where the two floats of the header carry over."""
    pack = pack_of([1, 2, 4], width=3)
    state = wavenet_state(pack, 1)
    run(pack, 1, 50, state=state)
    far = state.clone()
    period = 2 * 4  # every ring's length divides it, so the rings stand where they stood
    moved = 50 + (2**20 - 10) // period * period
    far[:, 0], far[:, 1] = moved % 2**20, moved // 2**20
    assert torch.equal(run(pack, 1, 40, state=state, seed=4), run(pack, 1, 40, state=far, seed=4))
    assert wavenet_position(far).tolist() == [moved + 40]
    assert moved + 40 > 2**20


def test_causality():
    """Another code at t0 changes no logit up to t0, and the one after it."""
    pack = pack_of([1, 2, 4, 8])
    codes = torch.randint(64, (1, 80), generator=torch.Generator().manual_seed(0))
    other = codes.clone()
    other[:, 40] = (codes[:, 40] + 7) % 64
    a, b = (run(pack, 1, 80, codes=c, return_logits=True)[1] for c in (codes, other))
    assert torch.equal(a[:, :41], b[:, :41]) and not torch.equal(a[:, 41], b[:, 41])


def test_empty_batch_and_no_samples():
    pack = pack_of([1, 2])
    assert run(pack, 0, 5).shape == (0, 5)
    state = wavenet_state(pack, 2)
    before = state.clone()
    codes, logits = run(pack, 2, 0, state=state, return_logits=True)
    assert codes.shape == (2, 0) and logits.shape == (2, 0, 64) and torch.equal(state, before)


def test_weights_of_nan_or_infinity_neither_crash_nor_leave_the_range(unchecked_weights):
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        for dtype in DTYPES:
            weights = weights_of(2)
            weights["conv_weight"][0, 0, 0, 0] = value
            weights["out_bias"][3] = value
            pack = wavenet_pack(weights, [1, 2], dtype=dtype)
            assert int(run(pack, 5, 40).max()) < 64


# ---- torch ----


@pytest.mark.parametrize("condition", [0, 3])
def test_opcheck(condition):
    pack = pack_of([1, 2], condition=condition, hop=4)
    frames = torch.randn(2, 2, condition) if condition else None
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    uniforms = philox_uniform(0, 2, 8)
    args = (pack.data, pack.shape.to_ints(), wavenet_state(pack, 2), uniforms, codes, frames, 1.0, True)
    torch.library.opcheck(torch.ops.audiokernels.wavenet_generate.default, args)


def test_compiles_without_a_graph_break():
    pack = pack_of([1, 2, 4])

    def step(state, uniforms):
        codes, logits = torch.ops.audiokernels.wavenet_generate.default(
            pack.data, pack.shape.to_ints(), state, uniforms, None, None, 1.0, True
        )
        return codes.float() * 2, torch.softmax(logits, 2)

    eager_state, compiled_state = wavenet_state(pack, 2), wavenet_state(pack, 2)
    uniforms = philox_uniform(0, 2, 30)
    expected = step(eager_state, uniforms)
    got = torch.compile(step, fullgraph=True, dynamic=True)(compiled_state, uniforms)
    assert torch.equal(got[0], expected[0]) and torch.allclose(got[1], expected[1], atol=1e-6)
    assert torch.equal(eager_state, compiled_state)


def test_explain_names_the_kernel_that_runs(each_isa):
    pack = pack_of([1, 2, 4], dtype=torch.int8)
    state, uniforms = wavenet_state(pack, 2), philox_uniform(0, 2, 10)
    told = explain("wavenet_generate", pack, state, uniforms)
    assert told.flops == 2 * pack.shape.macs() * 20 and told.bytes >= pack.data.numel()
    assert "reference" in told.kernel if C is None else ("int8" in told.kernel and C.isa() in told.kernel)
    assert ("reference" in backends()["wavenet_generate"]["cpu"]) == (C is None)
    if C is not None:  # the CPU key of the dispatcher is what a call takes
        assert torch._C._dispatch_has_kernel_for_dispatch_key("audiokernels::wavenet_generate", "CPU")


def test_autograd_is_refused_not_ignored():
    pack = pack_of([1, 2], condition=2)
    condition = torch.zeros(1, 8, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="condition requires grad"):
        run(pack, 1, 8, condition=condition)
    with torch.no_grad():
        run(pack, 1, 8, condition=condition)


# ---- threads and processes ----


def test_eight_threads_at_once():
    pack = pack_of([1, 2, 4, 8])
    expected = run(pack, 2, 200)
    results = []

    def work():
        for _ in range(25):
            results.append(run(pack, 2, 200))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200 and all(torch.equal(r, expected) for r in results)


def _forked(queue, pack, expected):
    torch.set_num_threads(1)
    queue.put(bool(torch.equal(run(pack, 4, 100), expected)))


@pytest.mark.timeout(60)
def test_forked_workers_do_not_hang():
    """A DataLoader's worker forks after the parent has used its threads."""
    pack = pack_of([1, 2, 4, 8])
    expected = run(pack, 4, 100)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_forked, args=(queue, pack, expected)) for _ in range(5)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=30) for _ in workers] == [True] * 5
    for worker in workers:
        worker.join()

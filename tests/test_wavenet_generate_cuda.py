"""wavenet_generate's kernels for GPUs: the same source run on the host, and on a GPU where there is one."""

import pytest
import torch
from cuda_on_host import COMPILER, LaunchError
from launcher_cases import H100, check_checks_come_first, launch
from wavenet_cases import DTYPES, differing_draws, full_logits, pack_of, weights_of
from wavenet_on_host import on_host

from audiokernels import explain, philox_uniform, wavenet_generate, wavenet_pack, wavenet_state, wavenet_unpack
from audiokernels.wavenet_plan import Gpu, cluster_bytes, general_bytes, gpu_facts, wavenet_generate_plan
from audiokernels.wavenet_stages import COUNTS, HEAD_STAGES, LAYER_STAGES, stage_times, wavenet_stages

host = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
SIZES = {
    "plain": ([1, 2, 4, 8], {}),
    "odd sizes": ([1, 2, 4], {"residual": 20, "hidden": 12, "skip": 40, "head": 24, "n_class": 50}),
    "tiny": ([3, 1], {"residual": 1, "hidden": 1, "skip": 1, "head": 1, "n_class": 2}),
    "width 3": ([1, 3], {"width": 3, "residual": 33, "hidden": 17}),
    "width 1": ([1, 1], {"width": 1}),
    "int16 codes": ([1, 2], {"n_class": 300}),
}


def general(pack, state, uniforms, streams=1, **options):
    return on_host("general", (streams, general_bytes(pack.shape, streams), 0, 0), pack, state, uniforms, **options)


def cluster(pack, state, uniforms, layout=(1, 2, 2), **options):
    """`layout` is (groups, layer blocks, head blocks)."""
    return on_host("cluster", (*layout, cluster_bytes(pack.shape, *layout)), pack, state, uniforms, **options)


@host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_general_kernel_is_right(name, dtype):
    """Draws of a batch that does not fill its last block; logits against float64 convolutions over the sequence."""
    dilations, sizes = SIZES[name]
    weights = weights_of(len(dilations), **sizes)
    pack = wavenet_pack(weights, dilations, dtype=dtype)
    batch, n = 3, 24
    uniforms, state = philox_uniform(1, batch, n), wavenet_state(pack, batch)
    codes, logits = general(pack, state, uniforms, 4, return_logits=True, seed=1)
    expected = full_logits(wavenet_unpack(pack.data, pack.shape), dilations, codes)
    largest = max(1.0, float(expected.abs().max()))
    assert (logits - expected).abs().max() <= (0.03 if dtype == torch.int8 else 1e-5) * largest
    assert differing_draws(logits, logits, uniforms, codes)[1] == 0
    other = wavenet_state(pack, batch)
    _, cpu_logits = wavenet_generate(pack, other, uniforms, codes=codes, return_logits=True)
    bound = (0.05 if dtype == torch.bfloat16 else 1e-5) * largest  # the CPU may round its inputs to bfloat16
    assert (logits - cpu_logits).abs().max() <= bound and torch.allclose(state, other, atol=bound)


@host
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_general_kernel_one_tree_for_every_batch_chunk_and_order(dtype):
    """Codes and state, bit for bit: streams alone or four a block, chunks, forks, any order of threads."""
    pack = pack_of([1, 2, 4], dtype=dtype, residual=20, hidden=20)
    uniforms = philox_uniform(3, 5, 30)
    state = wavenet_state(pack, 5)
    codes = general(pack, state, uniforms)
    for seed in range(3):
        other = wavenet_state(pack, 5)
        assert torch.equal(general(pack, other, uniforms, 4, seed=seed), codes) and torch.equal(other, state)
    other, at, blocks = wavenet_state(pack, 5), 0, []
    for size in (1, 7, 2, 20):
        blocks.append(general(pack, other, uniforms[:, at : at + size], 4, seed=size))
        at += size
        other = other.clone()
    assert torch.equal(torch.cat(blocks, 1), codes) and torch.equal(other, state)
    half = wavenet_state(pack, 5)
    general(pack, half, uniforms[:, :10])
    fork = half[[3, 3, 1]]
    assert torch.equal(general(pack, fork, uniforms[[3, 3, 1], 10:], 4), codes[[3, 3, 1], 10:])


@host
def test_general_kernel_condition_codes_and_temperature():
    hop, n = 7, 30
    pack = pack_of([1, 2, 4], condition=5, hop=hop)
    g = torch.Generator().manual_seed(1)
    frames = torch.randn(2, (n - 1) // hop + 1, 5, generator=g)
    uniforms = philox_uniform(0, 2, n)
    for temperature in (1.0, 0.0, 0.5):
        expected = wavenet_generate(
            pack, wavenet_state(pack, 2), uniforms, condition=frames, temperature=temperature, return_logits=True
        )
        got = general(pack, wavenet_state(pack, 2), uniforms, 4, condition=frames, temperature=temperature,
                      return_logits=True)  # fmt: skip
        assert torch.equal(got[0], expected[0]) and torch.allclose(got[1], expected[1], atol=1e-5)
    whole = general(pack, wavenet_state(pack, 2), uniforms, condition=frames)
    state, blocks = wavenet_state(pack, 2), []
    for begin, end in ((0, 3), (3, 7), (7, 30)):
        part = frames[:, begin // hop : (end - 1) // hop + 1]
        blocks.append(general(pack, state, uniforms[:, begin:end], condition=part))
    assert torch.equal(torch.cat(blocks, 1), whole)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        prompt = whole[:, :12].to(dtype).repeat_interleave(2, 1)[:, ::2]
        assert torch.equal(general(pack, wavenet_state(pack, 2), uniforms, codes=prompt, condition=frames), whole)


@host
def test_general_kernel_survives_what_is_out_of_range(unchecked_weights):
    pack = pack_of([1, 2, 4])
    state = wavenet_state(pack, 3)
    state[:, :3] = torch.tensor([[-1.0, 0.5, 1e9], [torch.nan, torch.inf, -3.0], [2.0**30, 2.0**30, 63.0]])
    uniforms = torch.tensor([[2.0, -1.0, torch.nan, torch.inf]] * 3)
    codes = torch.tensor([[-5, 2**40]] * 3)
    out = general(pack, state, uniforms, codes=codes)
    assert int(out.max()) < 64 and out[:, :2].tolist() == [[0, 63]] * 3
    for value in (torch.nan, torch.inf, -torch.inf):
        weights = weights_of(2)
        weights["conv_weight"][0, 0, 0, 0] = weights["out_bias"][3] = value
        pack = wavenet_pack(weights, [1, 2])
        assert int(general(pack, wavenet_state(pack, 2), philox_uniform(0, 2, 5)).max()) < 64


@host
@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        ("      __syncthreads();\n      product(", "      product("),
        ("        __syncthreads();\n      }\n  }", "      }\n  }"),
        ("    __syncthreads();\n  }\n\n  __device__ void run()", "  }\n\n  __device__ void run()"),
    ],
)
def test_a_missing_barrier_of_the_general_kernel_is_seen(edit):
    """Each kind of barrier, taken away: some order of threads gives other codes."""
    pack, uniforms = pack_of([1, 2, 4]), philox_uniform(1, 3, 20)
    expected = general(pack, wavenet_state(pack, 3), uniforms, 4)
    seen = [general(pack, wavenet_state(pack, 3), uniforms, 4, seed=seed, edit=edit) for seed in range(8)]
    assert not all(torch.equal(codes, expected) for codes in seen)


# ---- the cluster kernel

SMALL = {"residual": 32, "hidden": 32, "skip": 64, "head": 64, "n_class": 64}
CLUSTERS = {  # dilations, sizes, layout
    "two blocks of layers": ([1, 2, 4], {}, (1, 2, 2)),
    "five layers in one block": ([1, 2, 4, 8, 1], {}, (1, 1, 4)),
    "width 3": ([1, 3], {"width": 3}, (1, 2, 1)),
    "64 channels": (
        [1, 2],
        {"residual": 64, "hidden": 64, "skip": 40, "head": 90, "n_class": 50},
        (1, 1, 2),
    ),
    "128 channels": ([1, 2], {"residual": 128, "hidden": 128, "width": 3}, (2, 2, 2)),
    "one layer": ([2], {"n_class": 256, "head": 256, "skip": 256}, (1, 1, 4)),
}


def rms(x):
    return float(x.square().mean().sqrt())


@host
@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_kernel_is_right(name):
    """Logits of float16 against float64 convolutions of the unrounded weights over more than two receptive fields."""
    dilations, sizes, layout = CLUSTERS[name]
    weights = weights_of(len(dilations), **{**SMALL, **sizes})
    pack = wavenet_pack(weights, dilations, dtype=torch.float16)
    batch, n = 3, min(2 * pack.shape.receptive_field + 4, 24)
    uniforms, state = philox_uniform(1, batch, n), wavenet_state(pack, batch)
    codes, logits = cluster(pack, state, uniforms, layout, return_logits=True, seed=1)
    expected = full_logits(weights, dilations, codes)
    assert rms(logits - expected) < 1e-3 * rms(expected)
    differ, off_edge = differing_draws(logits, expected, uniforms, codes)
    assert off_edge == 0 and differ <= 1
    other = wavenet_state(pack, batch)
    wavenet_generate(pack, other, uniforms, codes=codes)
    assert torch.equal(state[:, :16], other[:, :16]) and torch.allclose(state, other, atol=0.005)


@host
def test_cluster_kernel_in_bfloat16():
    weights = weights_of(3, **SMALL)
    pack, uniforms = wavenet_pack(weights, [1, 2, 4], dtype=torch.bfloat16), philox_uniform(1, 2, 20)
    codes, logits = cluster(pack, wavenet_state(pack, 2), uniforms, return_logits=True)
    expected = full_logits(weights, [1, 2, 4], codes)
    assert rms(logits - expected) < 8e-3 * rms(expected)
    assert differing_draws(logits, expected, uniforms, codes)[1] == 0


def in_float16(pack):
    """The float16 pack of the weights that a pack holds."""
    weights, shape = wavenet_unpack(pack.data, pack.shape), pack.shape
    return wavenet_pack(weights, shape.dilations, dtype=torch.float16, hop=shape.hop)


def same_as_in_float16(pack, layout=(1, 2, 2), batch=3, n=9, seed=1, **options):
    """Whether codes, logits and state of an int8 pack are those of in_float16(pack), bit for bit; and the logits."""
    if pack.shape.condition:
        options["condition"] = torch.randn(batch, (n - 1) // pack.shape.hop + 1, pack.shape.condition)
    results = []
    for one in (pack, in_float16(pack)):
        state = wavenet_state(one, batch)
        results.append((*cluster(one, state, philox_uniform(1, batch, n), layout, return_logits=True, seed=seed,
                                 **options), state))  # fmt: skip
    return all(map(torch.equal, *results)), results[0][:2]


@host
@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_kernel_in_int8_is_the_one_in_float16_of_the_same_weights(name):
    """To the bit; logits against float64 convolutions of the weights that the pack holds."""
    dilations, sizes, layout = CLUSTERS[name]
    pack = pack_of(dilations, dtype=torch.int8, **{**SMALL, **sizes})
    same, (codes, logits) = same_as_in_float16(pack, layout, seed=2)
    expected = full_logits(wavenet_unpack(pack.data, pack.shape), dilations, codes)
    assert same and rms(logits - expected) < 1e-3 * rms(expected) and len(codes.unique()) > 10


@host
@pytest.mark.parametrize("layout", [(1, 3, 2), (2, 1, 4)])
def test_cluster_kernel_in_int8_with_condition_known_codes_and_rows_of_very_different_sizes(layout):
    weights = weights_of(3, **SMALL, condition=4)
    for weight in (weights["conv_weight"], weights["res_weight"], weights["skip_weight"]):
        weight[:, ::3] *= 2.0**-11  # rows whose scales would be subnormal numbers of float16
        weight[:, 1::5] = 0.0
    pack = wavenet_pack(weights, [1, 2, 4], dtype=torch.int8, hop=4)
    assert same_as_in_float16(pack, layout, batch=17, codes=torch.tensor([[5, 9, 11]] * 17))[0]


@host
@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        ("{scale(low + row), scale(high + row)}", "{scale(low + row), scale(low + row)}"),  # another row's
        ("    m.scales += i * rows;\n", ""),  # another tap's
        ("0x44804480u", "0x44004400u"),  # bytes taken for q, not 128 + q
        ("^ 0x8080", ""),  # the sign bit as it is
        ("row_bytes(bool is_int8, int steps) {\n  return is_int8 ? 256 * steps + 64",
         "row_bytes(bool is_int8, int steps) {\n  return is_int8 ? 256 * steps"),  # scales that are written over
    ],
)  # fmt: skip
def test_a_wrong_scale_of_the_cluster_kernel_is_seen(edit):
    pack = pack_of([1, 2, 4], dtype=torch.int8, **SMALL, width=3)
    assert same_as_in_float16(pack)[0]
    try:
        assert not same_as_in_float16(pack, edit=edit)[0]
    except LaunchError:  # another size of shared memory than planned
        assert "row_bytes" in edit[0]


@host
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_cluster_kernel_one_tree_for_every_batch_chunk_layout_and_order(dtype):
    """Codes and state, bit for bit: batch position, groups and clusters, layouts, chunks, forks, orders of threads."""
    pack = pack_of([1, 2, 4], dtype=dtype, **SMALL)
    uniforms, n = philox_uniform(3, 19, 8), 8
    state = wavenet_state(pack, 19)
    codes = cluster(pack, state, uniforms)  # three clusters
    assert len(codes.unique()) > 20
    for seed, layout in enumerate([(2, 1, 2), (3, 3, 4), (4, 2, 1)]):
        other = wavenet_state(pack, 19)
        assert torch.equal(cluster(pack, other, uniforms, layout, seed=seed), codes) and torch.equal(other, state)
    alone = wavenet_state(pack, 1)
    assert torch.equal(cluster(pack, alone, uniforms[13:14], seed=5), codes[13:14])
    assert torch.equal(alone[0], state[13])
    other = wavenet_state(pack, 19)
    blocks = [cluster(pack, other, uniforms[:, a:b], seed=a) for a, b in ((0, 1), (1, 4), (4, n))]
    assert torch.equal(torch.cat(blocks, 1), codes) and torch.equal(other, state)
    half = wavenet_state(pack, 19)
    cluster(pack, half, uniforms[:, :5])
    fork = torch.cat([half[[3, 3]], wavenet_state(pack, 1)])  # rows of different positions in one group
    forked = cluster(pack, fork, uniforms[[3, 3, 7], 5:])
    assert torch.equal(forked[:2], codes[[3, 3], 5:])
    assert torch.equal(forked[2:], cluster(pack, wavenet_state(pack, 1), uniforms[7:8, 5:]))


@host
def test_cluster_kernel_condition_codes_and_temperature():
    hop, n = 5, 17
    weights = weights_of(3, **SMALL, condition=4)
    pack = wavenet_pack(weights, [1, 2, 4], dtype=torch.float16, hop=hop)
    g = torch.Generator().manual_seed(1)
    frames = torch.randn(2, (n - 1) // hop + 1, 4, generator=g)
    uniforms = philox_uniform(0, 2, n)
    whole, logits = cluster(pack, wavenet_state(pack, 2), uniforms, condition=frames, return_logits=True)
    expected = full_logits(weights, [1, 2, 4], whole, condition=frames, hop=hop)
    assert rms(logits - expected) < 1e-3 * rms(expected)
    state, blocks = wavenet_state(pack, 2), []
    for begin, end in ((0, 3), (3, 5), (5, 17)):
        part = frames[:, begin // hop : (end - 1) // hop + 1]
        blocks.append(cluster(pack, state, uniforms[:, begin:end], condition=part))
    assert torch.equal(torch.cat(blocks, 1), whole)
    prompt = whole[:, :6].to(torch.int64)
    assert torch.equal(cluster(pack, wavenet_state(pack, 2), uniforms, codes=prompt, condition=frames), whole)
    greedy, logits = cluster(
        pack, wavenet_state(pack, 2), uniforms, condition=frames, temperature=0.0, return_logits=True
    )
    assert torch.equal(greedy.long(), logits.argmax(2))


@host
def test_cluster_kernel_counts_its_stages():
    """On the host the clock ticks whenever it is read; the codes are those of a call without counts."""
    pack, uniforms, layout = pack_of([1, 2, 4], dtype=torch.float16, **SMALL), philox_uniform(1, 19, 6), (2, 2, 2)
    counts = torch.zeros(sum(layout[1:]), COUNTS, dtype=torch.int64)
    codes = cluster(pack, wavenet_state(pack, 19), uniforms, layout, stages=counts)
    assert torch.equal(codes, cluster(pack, wavenet_state(pack, 19), uniforms, layout))
    layers, heads = len(LAYER_STAGES), len(HEAD_STAGES)
    used = torch.tensor(
        [[True] * layers + [False] * heads + [True]] * 2 + [[False] * layers + [True] * heads + [False]] * 2
    )
    assert torch.equal(counts > 0, used)
    times = stage_times(counts, 6, 2)
    assert [list(block) for block in times.blocks] == [list(LAYER_STAGES)] * 2 + [list(HEAD_STAGES)] * 2
    per_step = counts[:2, -1].sum() / 2 / 1e3 / 6  # microseconds of a step of a layer block
    assert sum(times.blocks[0].values()) + sum(times.blocks[1].values()) == pytest.approx(2 * float(per_step))


def test_stage_times():
    counts = torch.zeros(2, COUNTS, dtype=torch.int64)
    counts[0, :4] = torch.tensor([1000, 0, 6000, 3000])
    counts[0, -1] = 5000  # nanoseconds: 2 GHz
    counts[1, 4:11] = 400
    times = stage_times(counts, 10, 1)
    assert times.gigahertz == pytest.approx(2.0)
    assert times.blocks[0] == pytest.approx({"wait for input": 0.05, "embedding": 0, "layers": 0.3, "prepare": 0.15})
    assert times.blocks[1] == pytest.approx(dict.fromkeys(HEAD_STAGES, 0.02))


@host
def test_cluster_kernel_survives_what_is_out_of_range():
    pack = pack_of([1, 2, 4], dtype=torch.float16, **SMALL)
    state = wavenet_state(pack, 3)
    state[:, :3] = torch.tensor([[-1.0, 0.5, 1e9], [torch.nan, torch.inf, -3.0], [2.0**30, 2.0**30, 63.0]])
    uniforms = torch.tensor([[2.0, -1.0, torch.nan, torch.inf]] * 3)
    out = cluster(pack, state, uniforms, codes=torch.tensor([[-5, 2**40]] * 3))
    assert int(out.max()) < 64 and out[:, :2].tolist() == [[0, 63]] * 3


@host
@pytest.mark.slow
def test_cluster_kernel_of_the_standard_model():
    """20 layers, 64 channels, 256 skip: the layout of an H100 for 256 streams; no ring but the shortest wraps."""
    dilations = [2**i for i in range(10)] * 2
    weights = weights_of(20, residual=64, hidden=64, skip=256, head=256, n_class=256)
    pack = wavenet_pack(weights, dilations, dtype=torch.float16)
    uniforms = philox_uniform(1, 20, 8)
    codes, logits = cluster(pack, wavenet_state(pack, 20), uniforms, (3, 4, 4), return_logits=True, seed=2)
    expected = full_logits(weights, dilations, codes)
    assert rms(logits - expected) < 1e-3 * rms(expected)
    assert differing_draws(logits, expected, uniforms, codes)[1] == 0
    again = cluster(pack, wavenet_state(pack, 4), uniforms[16:], (1, 4, 4), seed=3)
    assert torch.equal(again, codes[16:])


@host
@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        ("      __syncthreads();\n      if (warp >= kGateWarps", "      if (warp >= kGateWarps"),
        ("      wait(full, rank > 0 ? t : t - 1);", ""),
        ("    load_past(g);\n    __syncthreads();", "    load_past(g);"),
        ("    wait(base + full, t);", ""),
        ("      wait(base + at.early_full + 8 * g, t);", ""),
        ("      wait(base + at.logits_full + 8 * g, t);", ""),
        ("at.logits + (g * Places", "at.logits + (0 * Places"),  # groups that share a buffer
        ("at.layer_h + item * kVector", "at.layer_h + item % c.n_layer * kVector"),
        ("at.x + (l + 1) % 2 * kVector", "at.x + l % 2 * kVector"),
    ],
)
def test_a_missing_wait_of_the_cluster_kernel_is_seen(edit):
    pack, uniforms = pack_of([1, 2, 4], dtype=torch.float16, **SMALL), philox_uniform(1, 19, 6)
    layout = (3, 2, 2)
    expected = cluster(pack, wavenet_state(pack, 19), uniforms, layout)

    def seen(seed):
        try:
            codes = cluster(pack, wavenet_state(pack, 19), uniforms, layout, seed=seed, edit=edit)
        except LaunchError:
            return True
        return not torch.equal(codes, expected)

    assert any(seen(seed) for seed in range(6))


# ---- the launcher


def test_launcher_takes_the_planned_kernel(monkeypatch):
    for dtype in (torch.float16, torch.int8):
        assert launch(monkeypatch, "wavenet", H100, pack_of([1, 2], dtype=dtype, **SMALL)) == [[1, 1, 4]]
    small = pack_of([1, 2])
    assert launch(monkeypatch, "wavenet", H100, small) == [[1, general_bytes(small.shape, 1)]]
    codes, _ = launch(monkeypatch, "wavenet", Gpu((7, 5), 46, 65536), small)
    assert torch.equal(codes, wavenet_generate(small, wavenet_state(small, 2), philox_uniform(0, 2, 8)))


def test_launcher_checks_before_it_asks_the_device(monkeypatch):
    check_checks_come_first(monkeypatch, "wavenet", pack_of([1, 2]), pack_of([1, 2], condition=3, hop=4))


# ---- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DILATIONS = [2**i for i in range(10)] * 2
STANDARD = {"residual": 64, "hidden": 64, "skip": 256, "head": 256, "n_class": 256}
KERNELS = [("cuda_cluster", dtype) for dtype in (torch.float16, torch.int8)]
KERNELS += [("cuda_general", dtype) for dtype in (torch.float16, torch.float32)]


def on_gpu(pack, state, uniforms, kernel=None, **options):
    """wavenet_generate, or the private op with the plan of a GPU without clusters."""
    if kernel != "cuda_general":
        assert kernel is None or explain(wavenet_generate, pack, state, uniforms).kernel.startswith(kernel)
        return wavenet_generate(pack, state, uniforms, **options)
    plan = wavenet_generate_plan(pack.shape, len(uniforms), gpu_facts(uniforms.device)._replace(clusters=(0, 0)))
    op, logits = torch.ops.audiokernels._wavenet_generate_cuda.default, options.get("return_logits", False)
    codes, condition, temperature = (options.get(name) for name in ("codes", "condition", "temperature"))
    temperature = 1.0 if temperature is None else temperature
    tops = options.get("top_k"), options.get("top_p")
    arguments = (state, uniforms, codes, condition, temperature, logits, *tops, plan.to_ints())
    out = op(pack.data, pack.shape.to_ints(), *arguments)
    return out if logits else out[0]


def skip_without(kernel):
    if kernel == "cuda_cluster" and torch.cuda.get_device_capability() not in ((9, 0), (10, 0), (10, 3)):
        pytest.skip("no clusters with enough shared memory")


@gpu
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("condition", [0, 5])
def test_cuda_teacher_forced_logits(kernel, dtype, condition):
    """Over more than two receptive fields, against float64 on the unrounded weights, of int8 on those of the pack;
    draws on the reference's edges."""
    skip_without(kernel)
    weights = weights_of(20, gain=1.0, condition=condition, **STANDARD)
    pack = wavenet_pack(weights, DILATIONS, dtype=dtype, hop=50).to("cuda")
    batch, n = 3, 2 * 2047 + 106
    uniforms = philox_uniform(1, batch, n)
    frames = torch.randn(batch, n // 50, condition) if condition else None
    codes, logits = on_gpu(
        pack, wavenet_state(pack, batch), uniforms.cuda(), kernel, return_logits=True,
        condition=None if frames is None else frames.cuda(),
    )  # fmt: skip
    held = wavenet_unpack(pack.data, pack.shape) if dtype == torch.int8 else weights
    cuda = {name: tensor.cuda() for name, tensor in held.items()}
    expected = full_logits(cuda, DILATIONS, codes, condition=None if frames is None else frames.cuda(), hop=50).cpu()
    codes, logits = codes.cpu(), logits.cpu()
    assert rms(logits - expected) < (1e-5 if dtype == torch.float32 else 1e-3) * rms(expected)
    differ, off_edge = differing_draws(logits, expected, uniforms, codes)
    assert off_edge == 0 and differ < 0.01 * batch * n  # more where the logits' spread is larger
    assert len(codes.unique()) > 200


@gpu
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_cuda_codes_do_not_depend_on_repeats_chunks_batch_position_or_cluster_count(kernel, dtype):
    skip_without(kernel)
    pack = pack_of(DILATIONS, dtype=dtype, **STANDARD).to("cuda")
    n, batch = 600, 260  # three groups in a cluster of an H100; alone and in smaller batches one
    uniforms = philox_uniform(2, batch, n).cuda()
    state = wavenet_state(pack, batch)
    codes = on_gpu(pack, state, uniforms, kernel)
    again = wavenet_state(pack, batch)
    assert torch.equal(on_gpu(pack, again, uniforms, kernel), codes) and torch.equal(again, state)
    for rows in ([7], [259, 3, 3], list(range(100, 141))):
        assert torch.equal(on_gpu(pack, wavenet_state(pack, len(rows)), uniforms[rows], kernel), codes[rows])
    part, blocks = wavenet_state(pack, 20), []
    for begin, end in ((0, 1), (1, 18), (18, 301), (301, n)):
        blocks.append(on_gpu(pack, part, uniforms[:20, begin:end], kernel))
        part = part.clone()
    assert torch.equal(torch.cat(blocks, 1), codes[:20]) and torch.equal(part, state[:20])


@gpu
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_cuda_graph_of_a_thousand_replays(kernel, dtype):
    skip_without(kernel)
    pack = pack_of([1, 2, 4, 8] * 5, dtype=dtype, **STANDARD).to("cuda")
    uniforms, state = philox_uniform(3, 3, 1000 * 4).cuda(), wavenet_state(pack, 3)
    expected = on_gpu(pack, wavenet_state(pack, 3), uniforms, kernel)
    numbers = uniforms[:, :4].clone()
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        on_gpu(pack, state.clone(), numbers, kernel)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = on_gpu(pack, state, numbers, kernel)
        for i in range(1000):
            numbers.copy_(uniforms[:, 4 * i : 4 * i + 4])
            graph.replay()
            assert torch.equal(out, expected[:, 4 * i : 4 * i + 4])


@gpu
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_cuda_beside_a_competing_stream(kernel, dtype):
    skip_without(kernel)
    pack = pack_of(DILATIONS, dtype=dtype, **STANDARD).to("cuda")
    uniforms = philox_uniform(4, 16, 200).cuda()
    expected = on_gpu(pack, wavenet_state(pack, 16), uniforms, kernel)
    other, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        with torch.cuda.stream(other):
            for _ in range(4):
                a = (a @ a).tanh()
        assert torch.equal(on_gpu(pack, wavenet_state(pack, 16), uniforms, kernel), expected)
    torch.cuda.synchronize()


@gpu
def test_cuda_stages():
    skip_without("cuda_cluster")
    pack, uniforms = pack_of(DILATIONS, dtype=torch.float16, **STANDARD).to("cuda"), philox_uniform(5, 300, 500).cuda()
    state, other = wavenet_state(pack, 300), wavenet_state(pack, 300)
    times = wavenet_stages(pack, state, uniforms)
    wavenet_generate(pack, other, uniforms)
    assert torch.equal(state, other) and 0.2 < times.gigahertz < 4.0
    sums = [sum(block.values()) for block in times.blocks[:4]]
    assert len(times.blocks) == 8 and max(sums) < 1.05 * min(sums)  # each adds up to the whole step


@gpu
def test_cuda_oversized_models_fall_back_and_are_right():
    for layers, sizes, kernel in (
        (60, {"residual": 512, "hidden": 512, "skip": 512, "head": 512, "n_class": 256}, "cuda_general"),
        (1, {"skip": 60_000}, "reference"),
    ):
        weights, dilations = weights_of(layers, **sizes), [2 ** (i % 4) for i in range(layers)]
        pack = wavenet_pack(weights, dilations, dtype=torch.float16).to("cuda")
        uniforms = philox_uniform(5, 2, 40).cuda()
        codes, logits = wavenet_generate(pack, wavenet_state(pack, 2), uniforms, return_logits=True)
        assert explain(wavenet_generate, pack, wavenet_state(pack, 2), uniforms).kernel.startswith(kernel)
        cuda = {name: tensor.cuda() for name, tensor in weights.items()}
        expected = full_logits(cuda, dilations, codes)
        assert rms(logits - expected) < 2e-3 * rms(expected)


@gpu
def test_cuda_wrong_devices_and_wrong_calls():
    pack = pack_of([1, 2]).to("cuda")
    state, uniforms = wavenet_state(pack, 2), philox_uniform(0, 2, 4)
    with pytest.raises(ValueError, match="uniforms must be on the pack's device cuda:0, got cpu"):
        wavenet_generate(pack, state, uniforms)
    with pytest.raises(ValueError, match="state must be on the pack's device cuda:0, got cpu"):
        wavenet_generate(pack, state.cpu(), uniforms.cuda())
    with pytest.raises(ValueError, match="state must have shape"):
        wavenet_generate(pack, state[:1], uniforms.cuda())
    if torch.cuda.device_count() > 1:
        with pytest.raises(ValueError, match="got cuda:1"):
            wavenet_generate(pack, state, uniforms.to("cuda:1"))


ODD = [  # layers' dilations, sizes, batch, samples
    ([1], {}, 1, 1),
    ([1, 2, 4], {"residual": 20, "hidden": 12, "skip": 40, "head": 24, "n_class": 50}, 3, 7),
    ([3, 1], {"residual": 1, "hidden": 1, "skip": 1, "head": 1, "n_class": 2}, 5, 9),
    ([1, 3], {"width": 3, "residual": 33, "hidden": 17}, 2, 11),
    ([1, 1], {"width": 1}, 4, 3),
    ([1, 2], {"n_class": 300, "condition": 3}, 133, 5),
    ([1, 2, 4], {"residual": 32, "hidden": 32, "skip": 64, "head": 64, "n_class": 64}, 9, 13),
    ([1, 2, 4, 8, 1, 2], {"residual": 64, "hidden": 64, "skip": 70, "head": 80, "n_class": 100}, 17, 6),
    ([1, 2], {"residual": 32, "hidden": 32, "width": 3, "skip": 128, "n_class": 256, "condition": 5}, 7, 12),
    ([1, 2, 1], {"residual": 128, "hidden": 128, "skip": 200, "head": 150, "n_class": 256}, 11, 8),
    ([5, 3, 7, 2], {"residual": 31, "hidden": 37, "skip": 61, "head": 67, "n_class": 127}, 1, 17),
]


def run_odd(number, kernel=None):
    dilations, sizes, batch, n = ODD[number]
    weights = weights_of(len(dilations), **sizes)
    pack = wavenet_pack(weights, dilations, dtype=torch.float16, hop=4).to("cuda")
    uniforms, channels = philox_uniform(1, batch, n).cuda(), sizes.get("condition", 0)
    frames = torch.randn(batch, (n - 1) // 4 + 1, channels) if channels else None
    there = None if frames is None else frames.cuda()
    codes, logits = on_gpu(pack, wavenet_state(pack, batch), uniforms, kernel, condition=there, return_logits=True)
    expected = full_logits(weights, dilations, codes.cpu(), condition=frames, hop=4)  # no cuDNN to sanitize
    assert rms(logits.cpu() - expected) < 2e-3 * rms(expected)


@gpu
@pytest.mark.parametrize("number", range(len(ODD)))
def test_cuda_odd_sizes_sanitize(number):
    run_odd(number)


@gpu
@pytest.mark.parametrize("number", range(len(ODD)))
def test_cuda_general_kernel_odd_sizes_sanitize_racecheck(number):
    run_odd(number, "cuda_general")

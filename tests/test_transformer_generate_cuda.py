"""transformer_generate's kernel for GPUs: the same source run on the host, and on a GPU where there is one."""

import sys
from types import SimpleNamespace

import pytest
import torch
from cuda_on_host import COMPILER, LaunchError
from launcher_cases import H100, check_checks_come_first, launch
from transformer_cases import DTYPES, SHAPES, full_logits, options_of, pack_of, weights_of
from transformer_on_host import on_host
from wavenet_cases import differing_draws

from audiokernels import (
    explain,
    philox_uniform,
    transformer_generate,
    transformer_pack,
    transformer_position,
    transformer_state,
)
from audiokernels._gpu import Gpu
from audiokernels.backends import REFERENCE
from audiokernels.transformer_plan import gpu_facts, shared_bytes, transformer_generate_plan

host = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
BLOCKS = dict(zip(SHAPES, (1, 2, 3, 5, 2, 3, 2, 4, 3, 5), strict=True))
WIDE = {"n_head": 3, "n_embd": 528, "n_inner": 1100, "n_class": 1030, "n_layer": 1}
LARGE = {  # sizes, blocks, samples: every loop of the kernel turns more than once, or stops before its end
    "head of 256 channels, keys in parts": ({"n_head": 1, "n_embd": 256, "window": 130}, 3, 3),
    "16 parts in two waves": ({"n_head": 1, "n_embd": 256, "window": 1100, "n_layer": 1}, 1, 2),
    "heads of 36 channels": ({"n_head": 3, "n_embd": 108, "window": 200}, 5, 3),
    "16 heads, two blocks of keys a warp": ({"n_head": 16, "n_embd": 128, "window": 1100, "n_layer": 1}, 5, 2),
    "17 heads, two a slice": ({"n_head": 17, "n_embd": 136, "window": 20}, 4, 3),
    "rows beyond a chunk and a pass": (WIDE, 1, 3),
    "the same in a cluster": (WIDE, 2, 2),
}


def codes_of(pack, batch, n, seed=3):
    return torch.randint(pack.shape.n_class, (batch, n), generator=torch.Generator().manual_seed(seed))


def states_agree(one, other, atol):
    return torch.equal(one[:, :16], other[:, :16]) and torch.allclose(one, other, atol=atol)


@host
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_is_right(name):
    """Logits over more than a wrap of the ring against float64 attention over the sequence; a prompt, then draws."""
    options, sizes = options_of(SHAPES[name])
    weights = weights_of(**sizes)
    pack = transformer_pack(weights, **options)
    n = pack.shape.capacity + 6
    uniforms, state = philox_uniform(1, 1, n), transformer_state(pack, 1)
    prompt = codes_of(pack, 1, n - 12)
    codes, logits = on_host(
        pack, state, uniforms, blocks=BLOCKS[name], codes=prompt, return_logits=True, seed=len(name)
    )
    assert torch.equal(codes[:, : n - 12].long(), prompt) and int(transformer_position(state)) == n
    expected = full_logits(weights, codes.long(), options)
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert differing_draws(logits[:, -12:], expected[:, -12:], uniforms[:, -12:], codes[:, -12:]) == (0, 0)
    other = transformer_state(pack, 1)
    transformer_generate(pack, other, uniforms, codes=codes)
    assert states_agree(state, other, 1e-4)


@host
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_and_caches(dtype, cache):
    """Against the CPU kernel, which rounds int8 activations once a vector instead of once a slice."""
    options, sizes = options_of(SHAPES["film, sinusoidal"])
    pack = transformer_pack(weights_of(**sizes), **{**options, "positions": "rotary"}, dtype=dtype).with_cache(cache)
    uniforms, codes = philox_uniform(1, 2, 20), codes_of(pack, 2, 20)
    expected_state, state = transformer_state(pack, 2), transformer_state(pack, 2)
    _, expected = transformer_generate(pack, expected_state, uniforms, codes=codes, return_logits=True)
    _, logits = on_host(pack, state, uniforms, blocks=2, codes=codes, return_logits=True)
    error = (logits - expected).abs() / expected.abs().max()
    rounded = {torch.float32: 0.001, torch.bfloat16: 0.06, torch.int8: 0.06}[dtype]  # the CPU may round activations
    assert error.max() <= max(rounded, 0.01 if cache == torch.bfloat16 else 0.0) and error.mean() <= 0.01
    if (dtype, cache) == (torch.float32, torch.float32):
        assert error.max() <= 1e-5 and states_agree(state, expected_state, 1e-4)


@host
@pytest.mark.parametrize("name", LARGE)
def test_large_and_uneven_sizes(name):
    sizes, blocks, n = LARGE[name]
    options, weight_sizes = options_of({"n_head": 2, "window": 20, **sizes})
    weights = weights_of(**weight_sizes)
    pack = transformer_pack(weights, **options)
    state, uniforms = transformer_state(pack, 1), philox_uniform(1, 1, n)
    if options["window"] > 64:  # a ring that is full: the same keys from the CPU kernel
        codes = codes_of(pack, 1, options["window"] + 20)
        transformer_generate(pack, state, philox_uniform(0, 1, codes.shape[1]), codes=codes)
    other = state.clone()
    codes, logits = on_host(pack, state, uniforms, blocks=blocks, return_logits=True, seed=7)
    _, expected = transformer_generate(pack, other, uniforms, codes=codes, return_logits=True)
    assert (logits - expected).abs().max() <= 1e-5 * float(expected.abs().max())
    assert differing_draws(logits, logits, uniforms, codes)[1] == 0 and states_agree(state, other, 1e-4)


@host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_tree_for_every_number_of_blocks_batch_chunk_and_order(dtype):
    """Codes, logits and state, bit for bit: blocks, batch position, chunks, forks, any order of threads."""
    haar = [1] * 3 + [0] * 13 + [2] * 16
    pack = pack_of(dtype=dtype, n_head=4, n_embd=32, window=70, fusion="logits", haar=haar, n_layer=1)
    assert pack.shape.context % 16 and sum(pack.shape.haar[1::2]) == 32
    uniforms = philox_uniform(3, 3, 8)
    state = transformer_state(pack, 3)
    codes, logits = on_host(pack, state, uniforms, return_logits=True)
    assert len(codes.unique()) > 10
    for seed, blocks in enumerate((3, 8)):
        other = transformer_state(pack, 3)
        again = on_host(pack, other, uniforms, blocks=blocks, seed=seed, return_logits=True)
        assert torch.equal(again[0], codes) and torch.equal(again[1], logits) and torch.equal(other, state), blocks
    other, at, chunks = transformer_state(pack, 3), 0, []
    for size in (1, 2, 5):
        chunks.append(on_host(pack, other, uniforms[:, at : at + size], blocks=size, seed=size))
        at += size
    assert torch.equal(torch.cat(chunks, 1), codes) and torch.equal(other, state)
    half = transformer_state(pack, 3)
    on_host(pack, half, uniforms[:, :4], blocks=3)
    fork = torch.zeros(3, half.shape[1] + 1)[:, 1:]  # rows that are not aligned, of different positions
    fork[:2], fork[2] = half[[2, 2]], transformer_state(pack, 1)[0]
    forked = on_host(pack, fork, uniforms[[2, 2, 0], 4:], blocks=2)
    assert torch.equal(forked[:2], codes[[2, 2], 4:]) and torch.equal(fork[0], state[2])
    assert torch.equal(forked[2:], on_host(pack, transformer_state(pack, 1), uniforms[:1, 4:]))


KEPT = {1: (2, 0), 2: (0, 2), 4: (2, 1), 8: (4, 2), 16: (1, 1)}  # of three layers, by blocks: (resident, staged)


@host
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_in_shared_memory_changes_nothing(dtype):
    """Codes, logits and state, bit for bit, of weights and keys in shared memory beside those of L2.

    Everything that a layer may have is there, the ring of keys wraps, and the calls go on from each other.
    """
    sizes = {"n_head": 2, "n_embd": 32, "n_inner": 50, "n_class": 50, "n_layer": 3, "window": 100}
    pack = pack_of(dtype=dtype, fusion="film", condition=3, hop=4, haar=[1] * 3 + [0] * 13 + [2] * 16, **sizes)
    began, frames = transformer_state(pack, 1), torch.randn(1, 33, 3, generator=torch.Generator().manual_seed(2))
    transformer_generate(pack, began, philox_uniform(0, 1, 124), condition=frames[:, :31])
    uniforms, results = philox_uniform(5, 1, 8), []
    for blocks, kept in {0: (0, 0), **KEPT}.items():
        state, parts = began.clone(), []
        options = {"blocks": max(1, blocks), "kept": kept, "return_logits": True}
        for begin, end in ((0, 3), (3, 8)):  # the ring is full at sample 128, the fourth of these
            part = frames[:, 31 + begin // 4 : 31 + (end - 1) // 4 + 1]
            parts.append(on_host(pack, state, uniforms[:, begin:end], condition=part, seed=blocks, **options))
        results.append([*(torch.cat(both, 1) for both in zip(*parts, strict=True)), state])
    for name, *found in zip(("codes", "logits", "state"), *results, strict=True):
        assert [torch.equal(found[0], other) for other in found[1:]] == [True] * len(KEPT), name
    assert len(results[0][0].unique()) > 3


@host
def test_condition_prompts_and_sampling():
    hop, n = 7, 20
    pack = pack_of(condition=5, hop=hop, fusion="add")
    frames = torch.randn(2, (n - 1) // hop + 1, 5, generator=torch.Generator().manual_seed(1))
    uniforms = philox_uniform(0, 2, n)
    for sampling in ({"temperature": 0.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}):
        expected = transformer_generate(pack, transformer_state(pack, 2), uniforms, condition=frames, **sampling)
        got = on_host(pack, transformer_state(pack, 2), uniforms, blocks=2, condition=frames, **sampling)
        assert torch.equal(got, expected)
    whole = on_host(pack, transformer_state(pack, 2), uniforms, condition=frames)
    state, chunks = transformer_state(pack, 2), []
    for begin, end in ((0, 3), (3, 7), (7, n)):
        part = frames[:, begin // hop : (end - 1) // hop + 1]
        chunks.append(on_host(pack, state, uniforms[:, begin:end], blocks=2, condition=part))
    assert torch.equal(torch.cat(chunks, 1), whole)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        prompt = whole[:, :8].to(dtype).repeat_interleave(2, 1)[:, ::2]
        assert torch.equal(on_host(pack, transformer_state(pack, 2), uniforms, codes=prompt, condition=frames), whole)


@host
def test_far_positions_and_what_is_out_of_range(unchecked_weights):
    pack, n = pack_of(), 4
    state = transformer_state(pack, 1)
    state[:, :2] = torch.tensor([2.0**20 - 2, 5.0])
    other = state.clone()
    uniforms, codes = philox_uniform(1, 1, n), codes_of(pack, 1, n)
    _, logits = on_host(pack, state, uniforms, blocks=2, codes=codes, return_logits=True)
    _, expected = transformer_generate(pack, other, uniforms, codes=codes, return_logits=True)
    assert (logits - expected).abs().max() <= 1e-5 * float(expected.abs().max()) and states_agree(state, other, 1e-4)
    assert state[0, :2].tolist() == [2, 6]
    state = transformer_state(pack, 3)
    state[:, :3] = torch.tensor([[-1.0, 0.5, 1e9], [torch.nan, torch.inf, -3.0], [2.0**30, 2.0**30, 63.0]])
    uniforms = torch.tensor([[2.0, -1.0, torch.nan, torch.inf]] * 3)
    out = on_host(pack, state, uniforms, codes=torch.tensor([[-5, 2**40]] * 3), blocks=2)
    assert int(out.max()) < 64 and out[:, :2].tolist() == [[0, 63]] * 3
    for value in (torch.nan, torch.inf):
        weights = weights_of()
        weights["qkv_weight"][0, 0, 0] = weights["out_bias"][3] = value
        pack = transformer_pack(weights, n_head=2, window=20)
        assert int(on_host(pack, transformer_state(pack, 1), philox_uniform(0, 1, 3)).max()) < 64


@host
def test_nothing_beyond_the_window_is_seen():
    """What lies in the slots of the ring that the window does not reach may be anything finite."""
    pack = pack_of(window=20, n_layer=1)
    shape, state = pack.shape, transformer_state(pack, 1)
    transformer_generate(pack, state, philox_uniform(1, 1, 200))
    changed = state.clone()
    size = shape.n_head * shape.capacity
    keys = changed[:, 16 : 16 + size * shape.headdim].view(1, shape.n_head, -1, shape.headdim, 64)
    values = changed[:, 16 + size * shape.headdim :].view(1, shape.n_head, -1, shape.head_rows)
    for slot in ((200 - age) % shape.capacity for age in range(20, shape.capacity + 1)):
        keys[:, :, slot // 64, :, slot % 64], values[:, :, slot] = 1000.0, -1000.0
    same, other = (on_host(pack, s, philox_uniform(2, 1, 30), return_logits=True)[1] for s in (state, changed))
    assert torch.equal(same, other)


@host
@pytest.mark.slow
def test_the_standard_model_with_all_its_threads():
    """128 channels, a window of 1600 that is full, in clusters of 8 and 16 blocks of 512 threads."""
    for n_layer, n_head in ((3, 4), (8, 8)):
        sizes = {"n_layer": n_layer, "n_embd": 128, "n_inner": 512, "n_class": 256}
        pack = transformer_pack(weights_of(**sizes), n_head=n_head, window=1600, dtype=torch.bfloat16)
        state = transformer_state(pack, 1)
        transformer_generate(pack, state, philox_uniform(0, 1, 1700))
        uniforms, results = philox_uniform(1, 1, 3), []
        for blocks in (8, 16):
            mine = state.clone()
            results.append((*on_host(pack, mine, uniforms, blocks=blocks, threads=512, return_logits=True), mine))
        assert all(map(torch.equal, *results))
        codes, logits, _ = results[0]
        _, expected = transformer_generate(pack, state, uniforms, codes=codes, return_logits=True)
        error = (logits - expected).abs() / expected.abs().max()
        assert error.max() <= 0.06 and error.mean() <= 0.01


EDITS = {
    "no barrier before attention": ("remember<Cache>(ring_of(layer), ring);\n    __syncthreads();",
                                    "remember<Cache>(ring_of(layer), ring);"),
    "no barrier after the sums": ("finish == kRelu ? fmaxf(total, 0.0f) : total;\n      }\n      __syncthreads();",
                                  "finish == kRelu ? fmaxf(total, 0.0f) : total;\n      }"),
    "no barrier after the norm": ("x[i] - mean : 0.0f;\n    __syncthreads();", "x[i] - mean : 0.0f;"),
    "no wait for an exchange": ("    wait(bar(), count / 2);\n", ""),
    "no token of a block with nothing to send": ("if (rank() >= senders) put(", "if (false) put("),
    "one buffer for all exchanges": ("return buffer + int(count & 1) * floats;", "return buffer;"),
    "the ring one slot too long": ("slot + 1 == c.capacity() ?", "slot + 1 == c.capacity() + 64 ?"),
    "a window too wide by one": ("if (age >= c.window ||", "if (age > c.window ||"),
    "keys of the future": (" || age > position)", ")"),
    "sums of another largest score": ("sums[i] *= fade;", "sums[i] *= 1.0f;"),
    "parts of a head with equal shares": ("return total > 0.0f ? mine / total : 0.0f;", "return 1.0f / cut.repeat;"),
    "the oldest tap twice": ("from = from + d < length ? from + d : from + d - length;", ""),
    "a scale of the norm": ("warp_sum(squares) * c.inverse_embd", "warp_sum(squares) / (c.n_embd + 1)"),
    "angles of the position before": ("find_angles(position + 1, 32);", "find_angles(position, 32);"),
    "a pooled row too few": ("sum += s == newest ? x[channel]", "sum += s == newest ? 0.0f"),
    "rows of another group": ("4 * whole.group_of(quad / 4)", "4 * whole.group_of((quad / 4 + 1) % whole.groups)"),
    "inputs of another slice": ("const int step = i / quads + part.skipped,", "const int step = i / quads,"),
    "a slice looked for elsewhere": (" - m.skipped;", ";"),
    "all parts in one place": ("  to += 4 * rows * (1 + Dot::kByTap + steps);\n", ""),
    "no wait for the keys": ("wait(ptx::shared_address(shared + at.bars + 16), stagings++);", "stagings++;"),
    "the position's own key is missing": ("if (c.staged > 0) write(staged);", ""),
    "the position's own value is missing": ("if (c.staged > 1) write(staged);", ""),
    "keys of another layer": ("next >= 0) stage(next);", "next >= 0) stage(i);"),
    "keys copied when nobody needs them": ("t + 1 < c.n ? 0 : -1", "0"),
}  # fmt: skip


@host
@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_an_error_in_the_kernel_is_seen(name):
    """Each error gives other logits, a deadlock or a wrong access under some order of threads."""
    if name == "sums of another largest score":  # seen where a warp has two blocks of keys
        cases = [({"n_head": 16, "n_embd": 128, "n_layer": 1, "window": 1100}, 1120)]
    else:  # two slices of keys
        sizes = {"n_head": 1, "n_embd": 32, "fusion": "logits", "haar": [1] * 16 + [2] * 16, "n_layer": 2}
        cases = [({**sizes, "window": window}, n) for window, n in ((65, 0), (65, 126), (128, 0))]
    packs = [pack_of(**sizes) for sizes, _ in cases]
    states = [transformer_state(pack, 1) for pack in packs]
    for pack, state, (_, n) in zip(packs, states, cases, strict=True):
        transformer_generate(pack, state, philox_uniform(0, 1, n))
    uniforms, codes = philox_uniform(1, 1, 6), codes_of(packs[0], 1, 6)

    def logits_of(seed, edit=None):
        options = {"codes": codes, "blocks": 3, "seed": seed, "edit": edit, "return_logits": True}
        return [on_host(p, s.clone(), uniforms, **options)[1] for p, s in zip(packs, states, strict=True)]

    expected = logits_of(0)

    def seen(seed):
        try:
            return not all(map(torch.equal, logits_of(seed, EDITS[name]), expected))
        except LaunchError:
            return True

    assert any(seen(seed) for seed in range(8))


# ---- the launcher


def test_launcher_takes_the_planned_kernel(monkeypatch):
    pack = pack_of(n_head=2, n_embd=32, window=70)
    all_kept = pack.shape.n_layer + 1
    for gpu, blocks, staged in ((H100, 4, 2), (H100._replace(clusters=(0, 0)), 1, 0)):
        n_bytes = shared_bytes(pack.shape, blocks, all_kept, staged)
        assert launch(monkeypatch, "transformer", gpu, pack) == [[blocks, n_bytes, all_kept, staged]]
    codes, _ = launch(monkeypatch, "transformer", Gpu((7, 5), 46, 65536), pack)
    assert torch.equal(codes, transformer_generate(pack, transformer_state(pack, 2), philox_uniform(0, 2, 8)))


def test_explain_names_the_plan(monkeypatch):
    door = sys.modules["audiokernels.transformer_generate"]
    pack = pack_of(n_head=2, n_embd=32, window=70, dtype=torch.bfloat16)
    there = SimpleNamespace(shape=pack.shape, data=SimpleNamespace(device=torch.device("cuda"), numel=pack.data.numel))
    monkeypatch.setattr(door, "implementation", lambda *_: "CUDA C++ (sm_90a)")
    monkeypatch.setattr(door, "check_arguments", lambda *_: None)  # a stand-in for a pack on a GPU passes none
    matrices = pack.data.numel() - 4 * sum(pack.shape.table_floats())
    for gpu_there, kernel, why in (
        (H100, "cuda_cluster (bfloat16, bfloat16 cache)", "a cluster of 4 blocks a stream shares 4 slices"),
        (
            H100,
            "cuda_cluster (bfloat16, bfloat16 cache)",
            "the output and of all 2 layers, each layer's keys and values",
        ),
        (H100._replace(clusters=(0, 0)), "cuda_general (bfloat16, bfloat16 cache)", "all 2 layers; 2 block"),
        (H100._replace(clusters=(0, 0)), "cuda_general (bfloat16, bfloat16 cache)", "no clusters on this GPU; in sh"),
        (Gpu((7, 5), 46, 65536), REFERENCE, "sm_75 is older than sm_80"),
    ):
        monkeypatch.setattr(door, "gpu_facts", lambda _, gpu_there=gpu_there: gpu_there)
        told = door._explain(there, None, torch.empty(2, 8))
        assert told.kernel == kernel and why in told.why
        once = 0 if kernel == REFERENCE else matrices  # all of them are in shared memory
        assert told.bytes == 8 * 2 * (pack.data.numel() + pack.shape.cache_bytes()) - 7 * 2 * once


def test_launcher_checks_before_it_asks_the_device(monkeypatch):
    check_checks_come_first(monkeypatch, "transformer", pack_of(), pack_of(condition=3, hop=4))


# ---- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
STANDARD = {"n_layer": 3, "n_embd": 128, "n_inner": 512, "n_class": 256}
KERNELS = [("cuda_cluster", torch.bfloat16), ("cuda_general", torch.bfloat16), ("cuda_general", torch.float32)]


def on_gpu(pack, state, uniforms, kernel=None, **options):
    """transformer_generate, or the private op with the plan of a GPU without clusters."""
    if kernel != "cuda_general":
        assert kernel is None or explain(transformer_generate, pack, state, uniforms).kernel.startswith(kernel)
        return transformer_generate(pack, state, uniforms, **options)
    plan = transformer_generate_plan(pack.shape, len(uniforms), gpu_facts(uniforms.device)._replace(clusters=(0, 0)))
    op, logits = torch.ops.audiokernels._transformer_generate_cuda.default, options.get("return_logits", False)
    codes, condition, temperature = options.get("codes"), options.get("condition"), options.get("temperature", 1.0)
    tops = options.get("top_k"), options.get("top_p")
    arguments = (state, uniforms, codes, condition, temperature, logits, *tops, plan.to_ints())
    out = op(pack.data, pack.shape.to_ints(), *arguments)
    return out if logits else out[0]


def skip_without(kernel):
    if kernel == "cuda_cluster" and torch.cuda.get_device_capability() not in ((9, 0), (10, 0), (10, 3)):
        pytest.skip("no clusters with enough shared memory")


@gpu
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("fusion", ["none", "film"])
def test_cuda_teacher_forced_logits(kernel, dtype, fusion):
    """Over three wraps of the ring, against float64 on the unrounded weights; draws on the reference's edges."""
    skip_without(kernel)
    weights = weights_of(gain=1.0, **STANDARD, fusion=fusion)
    pack = transformer_pack(weights, n_head=4, window=300, fusion=fusion, dtype=dtype).to("cuda")
    batch, n = 3, 3 * 320 + 40
    uniforms = philox_uniform(1, batch, n)
    codes, logits = on_gpu(pack, transformer_state(pack, batch), uniforms.cuda(), kernel, return_logits=True)
    cuda = {name: tensor.cuda() for name, tensor in weights.items()}
    expected = full_logits(cuda, codes.long(), {"n_head": 4, "window": 300, "fusion": fusion}).cpu()
    codes, logits = codes.cpu(), logits.cpu()
    assert (logits - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.06) * float(expected.abs().max())
    differ, off_edge = differing_draws(logits, expected, uniforms, codes)
    assert off_edge == 0 and (dtype != torch.float32 or differ < 1 + batch * n / 1000)
    assert len(codes.unique()) > 150


@gpu
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_cuda_codes_do_not_depend_on_repeats_chunks_batch_position_or_blocks(kernel, dtype):
    skip_without(kernel)
    pack = pack_of(dtype=dtype, n_head=4, window=300, **STANDARD).to("cuda")
    n, batch = 400, 40
    uniforms = philox_uniform(2, batch, n).cuda()
    state, again = transformer_state(pack, batch), transformer_state(pack, batch)
    codes = on_gpu(pack, state, uniforms, kernel)
    assert torch.equal(on_gpu(pack, again, uniforms, kernel), codes) and torch.equal(again, state)
    for rows in ([7], [39, 3, 3], list(range(12))):  # in clusters of other sizes
        assert torch.equal(on_gpu(pack, transformer_state(pack, len(rows)), uniforms[rows], kernel), codes[rows])
    assert torch.equal(on_gpu(pack, transformer_state(pack, batch), uniforms, "cuda_general"), codes)
    part, chunks = transformer_state(pack, 5), []
    for begin, end in ((0, 1), (1, 18), (18, 301), (301, n)):
        chunks.append(on_gpu(pack, part, uniforms[:5, begin:end], kernel))
        part = part.clone()
    assert torch.equal(torch.cat(chunks, 1), codes[:5]) and torch.equal(part, state[:5])


@gpu
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_cuda_graph_of_a_thousand_replays(kernel, dtype):
    skip_without(kernel)
    pack = pack_of(dtype=dtype, n_head=4, window=100, **STANDARD).to("cuda")
    uniforms, state = philox_uniform(3, 3, 4000).cuda(), transformer_state(pack, 3)
    expected = on_gpu(pack, transformer_state(pack, 3), uniforms, kernel)
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
    pack = pack_of(dtype=dtype, n_head=4, window=300, **STANDARD).to("cuda")
    uniforms = philox_uniform(4, 16, 100).cuda()
    expected = on_gpu(pack, transformer_state(pack, 16), uniforms, kernel)
    other, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        with torch.cuda.stream(other):
            for _ in range(4):
                a = (a @ a).tanh()
        assert torch.equal(on_gpu(pack, transformer_state(pack, 16), uniforms, kernel), expected)
    torch.cuda.synchronize()


@gpu
def test_cuda_wrong_devices_and_wrong_calls():
    pack = pack_of().to("cuda")
    state, uniforms = transformer_state(pack, 2), philox_uniform(0, 2, 4)
    with pytest.raises(ValueError, match="uniforms must be on the pack's device cuda:0, got cpu"):
        transformer_generate(pack, state, uniforms)
    with pytest.raises(ValueError, match="state must have shape"):
        transformer_generate(pack, state[:1], uniforms.cuda())


def run_odd(name, kernel=None):
    options, sizes = options_of(SHAPES[name])
    weights = weights_of(condition=3, **sizes)
    pack, n = transformer_pack(weights, **options, hop=4).to("cuda"), 80
    uniforms, frames = philox_uniform(1, 3, n).cuda(), torch.randn(3, n // 4, 3)
    state = transformer_state(pack, 3)
    codes, logits = on_gpu(pack, state, uniforms, kernel, condition=frames.cuda(), return_logits=True)
    expected = full_logits(weights, codes.cpu().long(), options, frames=frames, hop=4)  # no cuBLAS to sanitize
    assert (logits.cpu() - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@gpu
@pytest.mark.parametrize("name", SHAPES)
def test_cuda_odd_sizes_sanitize(name):
    run_odd(name)


@gpu
@pytest.mark.parametrize("name", SHAPES)
def test_cuda_general_kernel_odd_sizes_sanitize_racecheck(name):
    run_odd(name, "cuda_general")

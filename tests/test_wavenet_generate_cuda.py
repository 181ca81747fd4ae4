"""wavenet_generate's kernels for GPUs: the same source run on the host, and on a GPU where there is one."""

import pytest
import torch
from cuda_on_host import COMPILER
from wavenet_cases import DTYPES, differing_draws, full_logits, pack_of, weights_of
from wavenet_on_host import on_host

from audiokernels import philox_uniform, wavenet_generate, wavenet_pack, wavenet_state, wavenet_unpack
from audiokernels.wavenet_plan import general_bytes

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
    return on_host("general", (streams, general_bytes(pack.shape, streams)), pack, state, uniforms, **options)


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
def test_general_kernel_survives_what_is_out_of_range():
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

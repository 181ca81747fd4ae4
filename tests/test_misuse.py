"""Calls with mistakes that would go unseen, or be told in torch's words; each op's own test has its own rules."""

import numpy as np
import pytest
import torch
import transformer_cases
import wavenet_cases

import audiokernels as ak
from audiokernels.integrations import sdpa

POSITION = torch.zeros(2, dtype=torch.int32)
WAVENET, TRANSFORMER = wavenet_cases.pack_of([1, 2]), transformer_cases.pack_of()
U = ak.philox_uniform(0, 2, 5)


def conv_step(state):
    ak.dilated_conv_update(torch.randn(2, 3), state, torch.randn(4, 3, 2), None, POSITION, dilation=2)


def cache_step(state):
    ak.kv_cache_update(state, state.clone(), torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8), POSITION)


WRITING = {
    "haar_pool_": (lambda: torch.randn(2, 8, 4), ak.haar_pool_),
    "haar_pool_update": (
        lambda: ak.haar_pool_state(2, 4),
        lambda s: ak.haar_pool_update(torch.randn(2, 4), s, POSITION, norm="count"),
    ),
    "kv_cache_update": (lambda: torch.randn(2, 1, 4, 8), cache_step),
    "dilated_conv_update": (lambda: torch.randn(2, 2, 3), conv_step),
    "wavenet_generate": (lambda: ak.wavenet_state(WAVENET, 2), lambda s: ak.wavenet_generate(WAVENET, s, U)),
    "transformer_generate": (
        lambda: ak.transformer_state(TRANSFORMER, 2),
        lambda s: ak.transformer_generate(TRANSFORMER, s, U),
    ),
}


@pytest.mark.parametrize("op", WRITING)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_autograd_knows_of_writes(op, mode):
    """What was saved for a backward pass and then written gives an error, not a wrong gradient."""
    make, write = WRITING[op]
    state, weight = make(), torch.ones((), requires_grad=True)
    product = (weight * state).sum()
    with mode():
        write(state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        write(make())


def test_a_learned_scale_is_refused_instead_of_left_alone():
    q, scale = torch.randn(1, 2, 5, 8), torch.nn.Parameter(torch.tensor(0.3))
    with pytest.raises(TypeError, match="scale must be a number, got a tensor that requires grad: multiply q by it"):
        ak.causal_attention(q, q, q, scale=scale)
    with torch.no_grad():
        expected = ak.causal_attention(q, q, q, scale=float(scale))
        assert torch.equal(ak.causal_attention(q, q, q, scale=scale), expected)
    torch.testing.assert_close(ak.causal_attention(q * scale, q, q, scale=1.0), expected)
    with sdpa.patch(), pytest.raises(TypeError, match="'scale' must be float"):  # torch's words for the same
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    x = torch.nested.nested_tensor([torch.zeros(5, 3, 8), torch.zeros(4, 3, 8)], layout=layout)
    for call in (lambda: ak.causal_attention(x, x, x), lambda: ak.haar_pool(x), lambda: ak.haar_dwt(x, 1)):
        with pytest.raises(TypeError, match="^[qx] must be a dense tensor, got a nested one"):
            call()


def test_explain_refuses_what_the_call_refuses_and_takes_what_it_takes():
    q = torch.zeros(1, 1, 5, 8)
    told = ak.explain(ak.causal_attention, q, q, q, window=np.int64(2), scale=np.float32(0.5))
    assert told == ak.explain(ak.causal_attention, q, q, q, window=2)
    conv = {"x": torch.zeros(2, 3), "conv_state": torch.zeros(2, 2, 3), "weight": torch.zeros(4, 3, 2), "bias": None}
    assert ak.explain(ak.dilated_conv_update, **conv, position=POSITION, dilation=np.int64(2)).flops == 96
    for pack, generate, state in (
        (WAVENET, ak.wavenet_generate, ak.wavenet_state(WAVENET, 2)),
        (TRANSFORMER, ak.transformer_generate, ak.transformer_state(TRANSFORMER, 2)),
    ):
        assert ak.explain(generate, pack, state, U, top_k=3, return_logits=True) == ak.explain(generate, pack, state, U)
        with pytest.raises(TypeError, match="temprature"):
            ak.explain(generate, pack, state, U, temprature=1.0)
        with pytest.raises(ValueError, match="^state must have shape"):
            ak.explain(generate, pack, state[:1], U)
        with pytest.raises(TypeError, match="^pack must be a "):
            ak.explain(generate, state, state, U)


def test_levels_in_a_tensor_are_not_known_to_the_compiler():
    levels = torch.tensor([0, 1, 2, -1])
    x = torch.randn(2, 9, 4)
    with pytest.raises(Exception, match="levels must be a sequence of integers where torch.compile"):
        torch.compile(lambda x: ak.haar_pool(x, levels=levels), fullgraph=True, backend="eager")(x)
    assert torch.equal(ak.haar_pool(x, levels=levels), ak.haar_pool(x, levels=levels.tolist()))


def test_wavenet_unpack_reads_what_wavenet_pack_made():
    with pytest.raises(ValueError, match=r"^data must hold \d+ bytes as wavenet_pack made them"):
        ak.wavenet_unpack(WAVENET.data[:-4], WAVENET.shape)
    with pytest.raises(TypeError, match="^data must be a tensor, got WaveNetPack"):
        ak.wavenet_unpack(WAVENET, WAVENET.shape)


def test_a_stream_tells_which_shape_its_condition_has():
    pack = wavenet_cases.pack_of([1, 2], condition=3, hop=5)
    for given in ((1, 2, 4), (2, 2, 3)):
        with pytest.raises(ValueError, match=rf"^condition must have shape \(1, frames, 3\), got \({given[0]}, 2, "):
            ak.WaveNetStream(pack, condition=torch.zeros(given))
    with pytest.raises(ValueError, match=r"^condition must be given exactly .* got shape \(1, 2, 3\)"):
        ak.WaveNetStream(WAVENET, condition=torch.zeros(1, 2, 3))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_trace_takes_the_plan_of_the_length_that_it_saw():
    x = torch.randn(2, 9, 6)
    assert torch.equal(torch.jit.trace(ak.haar_pool, x)(x), ak.haar_pool(x))

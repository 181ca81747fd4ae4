"""Wrong calls of the WaveNet functions: each error names the argument, the rule and what came; no state is touched."""

import re

import numpy as np
import pytest
import torch
from sampling_cases import WRONG
from wavenet_cases import pack_of, weights_of

from audiokernels import WaveNetStream, philox_uniform, wavenet_generate, wavenet_pack, wavenet_state
from audiokernels.wavenet_generate import wavenet_generate_ref
from audiokernels.wavenet_pack import WaveNetPack

PACK = pack_of([1, 2, 4], condition=0)
CONDITIONED = pack_of([1, 2, 4], condition=3, hop=4)
STATE = wavenet_state(PACK, 2)
U = philox_uniform(0, 2, 8)
BAD_U = U.clone()
BAD_U[1, 5] = 1.0
FRAMES = torch.zeros(2, 2, 3)


def spoiled(column, value):
    state = wavenet_state(PACK, 2)
    state[1, column] = value
    return state


# (error, argument named, rule, what came, the call's changed arguments)
GENERATE = [
    (TypeError, "pack", "WaveNetPack", "Tensor", {"pack": PACK.data}),
    (TypeError, "pack", "WaveNetPack", "NoneType", {"pack": None}),
    (TypeError, "state", "tensor", "list", {"state": [0.0]}),
    (TypeError, "state", "float32", "float64", {"state": STATE.double()}),
    (ValueError, "state", "2 dimensions", r"\(\d+,\)", {"state": STATE[0]}),
    (ValueError, "state", "shape", r"\(3, \d+\)", {"state": wavenet_state(PACK, 3)}),
    (ValueError, "state", "shape", r"\(2, 12\)", {"state": STATE[:, :12].contiguous()}),
    (ValueError, "state", "shape", r"\(2, \d+\)", {"state": wavenet_state(pack_of([1, 2]), 2)}),
    (ValueError, "state", "contiguous", "strides", {"state": STATE.T.contiguous().T}),
    (ValueError, "state", "expanded", "strides", {"state": STATE[:1].expand(2, -1)}),
    (ValueError, "state", "header", "", {"state": spoiled(0, -1.0)}),
    (ValueError, "state", "header", "", {"state": spoiled(1, 0.5)}),
    (ValueError, "state", "header", "", {"state": spoiled(0, float("nan"))}),
    (ValueError, "state", "64 classes", "64", {"state": spoiled(2, 64.0)}),
    (TypeError, "uniforms", "tensor", "float", {"uniforms": 0.5}),
    (TypeError, "uniforms", "float32", "float16", {"uniforms": U.half()}),
    (ValueError, "uniforms", "2 dimensions", r"\(8,\)", {"uniforms": U[0]}),
    (ValueError, "uniforms", r"\[0, 1\)", "1.0", {"uniforms": BAD_U}),
    (ValueError, "uniforms", r"\[0, 1\)", "-0.5", {"uniforms": 0 * U - 0.5}),
    (ValueError, "uniforms", r"\[0, 1\)", "nan", {"uniforms": U * float("nan")}),
    (TypeError, "codes", "tensor", "list", {"codes": [[1, 2]]}),
    (TypeError, "codes", "uint8", "float32", {"codes": torch.zeros(2, 3)}),
    (ValueError, "codes", "2 dimensions", r"\(3,\)", {"codes": torch.zeros(3, dtype=torch.uint8)}),
    (ValueError, "codes", "m <= 8", r"\(2, 9\)", {"codes": torch.zeros(2, 9, dtype=torch.uint8)}),
    (ValueError, "codes", r"\(2, ", r"\(1, 3\)", {"codes": torch.zeros(1, 3, dtype=torch.uint8)}),
    (ValueError, "codes", r"0 \.\. 63", "64", {"codes": torch.full((2, 3), 64)}),
    (ValueError, "codes", r"0 \.\. 63", "-1", {"codes": torch.full((2, 3), -1)}),
    (ValueError, "codes", r"0 \.\. 63", "300", {"codes": torch.full((2, 3), 300)}),
    (ValueError, "condition", "condition channels", r"\(2, 2, 3\)", {"condition": FRAMES}),
    (ValueError, "condition", "condition channels", "None", {"pack": CONDITIONED, "condition": None}),
    (ValueError, "condition", r"\(2, 2, 3\)", r"\(2, 3, 3\)", {"pack": CONDITIONED, "condition": torch.zeros(2, 3, 3)}),
    (ValueError, "condition", r"\(2, 2, 3\)", r"\(2, 2, 4\)", {"pack": CONDITIONED, "condition": torch.zeros(2, 2, 4)}),
    (ValueError, "condition", r"\(2, 2, 3\)", r"\(1, 2, 3\)", {"pack": CONDITIONED, "condition": FRAMES[:1]}),
    (TypeError, "condition", "float32", "float64", {"pack": CONDITIONED, "condition": FRAMES.double()}),
    (ValueError, "condition", "3 dimensions", r"\(2, 3\)", {"pack": CONDITIONED, "condition": FRAMES[0]}),
    *WRONG,
    (ValueError, "state", "device", "meta", {"state": STATE.to("meta")}),
    (ValueError, "uniforms", "device", "meta", {"uniforms": U.to("meta")}),
    (ValueError, "pack", "bytes", "", {"pack": WaveNetPack(PACK.data[:-64], PACK.shape)}),
]


@pytest.mark.parametrize("number", range(len(GENERATE)))
def test_wrong_call_of_generate(number):
    error, argument, rule, came, changed = GENERATE[number]
    call = {"pack": PACK, "state": wavenet_state(PACK, 2), "uniforms": U, **changed}
    state = call["state"]
    before = state.clone() if isinstance(state, torch.Tensor) and state.device.type == "cpu" else None
    with pytest.raises(error) as caught:
        wavenet_generate(call.pop("pack"), call.pop("state"), call.pop("uniforms"), **call)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(argument), message
    for part in (rule, came):
        assert re.search(part, message), message
    if before is not None:
        assert torch.equal(state.nan_to_num(7.0), before.nan_to_num(7.0))


WEIGHTS = weights_of(3)
PACKING = [
    (ValueError, "dtype", "float32", "float64", {}, {"dtype": torch.float64}),
    (ValueError, "hop", ">= 1", "0", {}, {"hop": 0}),
    (ValueError, "dilations", ">= 1", r"\[1, 0, 2\]", {}, {"dilations": [1, 0, 2]}),
    (ValueError, "dilations", "one a layer", r"\[\]", {}, {"dilations": []}),
    (ValueError, "dilations", "integers", "True", {}, {"dilations": [1, True, 2]}),
    (ValueError, "dilations", "1000 layers", "1001", {}, {"dilations": [1] * 1001}),
    (TypeError, "dilations", "sequence", "int", {}, {"dilations": 3}),
    (ValueError, "weights", "3, 32, 16, 2|2, 32, 16, 2", "", {}, {"dilations": [1, 2]}),
    (ValueError, "weights", "exactly", "skip_bias", {"skip_bias": None}, {}),
    (ValueError, "weights", "exactly", "extra", {"extra": torch.zeros(1)}, {}),
    (ValueError, "weights", "shape", r"\(2, 15, 16\)", {"res_weight": torch.zeros(2, 15, 16)}, {}),
    (TypeError, "weights", "float", "int64", {"head_bias": torch.zeros(32, dtype=torch.int64)}, {}),
    (ValueError, "weights", "dimensions", r"\(64,\)", {"embedding": torch.zeros(64)}, {}),
    (ValueError, "weights", "3 dimensions", "int", {"condition_weight": 5}, {}),
    (ValueError, "weights", "even", "31", {"conv_weight": torch.zeros(3, 31, 16, 2)}, {}),
    (ValueError, "weights", "finite", "NaN", {"out_bias": torch.full((64,), float("nan"))}, {}),
    (ValueError, "weights", "finite", "infinity", {"out_bias": torch.full((64,), float("inf"))}, {}),
    (ValueError, "weights", "finite", "infinity", {"skip_bias": torch.full((3, 32), float("inf"))}, {}),
    (ValueError, "weights", "one device", "meta", {"out_bias": torch.zeros(64, device="meta")}, {}),
]


@pytest.mark.parametrize("number", range(len(PACKING)))
def test_wrong_call_of_pack(number):
    error, argument, rule, came, changed, arguments = PACKING[number]
    weights = {k: v for k, v in {**WEIGHTS, **changed}.items() if v is not None}
    with pytest.raises(error) as caught:
        wavenet_pack(weights, **{"dilations": [1, 2, 4], **arguments})
    message = str(caught.value)
    assert message.startswith(argument), message
    for part in (rule, came):
        assert re.search(part, message), message


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [
        (TypeError, "pack", lambda: wavenet_state(PACK.data, 1)),
        (ValueError, "batch", lambda: wavenet_state(PACK, -1)),
        (ValueError, "batch", lambda: wavenet_state(PACK, 1.5)),
        (ValueError, "batch", lambda: wavenet_state(PACK, True)),
        (TypeError, "weights", lambda: wavenet_pack(list(WEIGHTS.values()), [1, 2, 4])),
        (ValueError, "n", lambda: WaveNetStream(PACK).read(2.5)),
        (ValueError, "seed", lambda: WaveNetStream(PACK, seed="first")),
        (ValueError, "pack", lambda: WaveNetStream(PACK.to("meta"))),
    ],
)
def test_wrong_call_of_the_others(error, argument, call):
    with pytest.raises(error, match=f"^{argument}"):
        call()


def test_integers_of_numpy_are_integers():
    pack = wavenet_pack(WEIGHTS, np.array([1, 2, 4]), hop=np.int64(1))
    assert pack.shape == PACK.shape and torch.equal(wavenet_state(pack, np.int32(2)), STATE)


def test_a_pack_is_moved_but_not_converted_and_equals_itself_alone():
    with pytest.raises(TypeError):
        PACK.to(torch.float16)  # its bytes as numbers: the dtype was chosen when it was made
    other = WaveNetPack(PACK.data.clone(), PACK.shape)
    assert other != PACK and PACK == PACK and len({PACK, other}) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_default_dtype_does_not_matter(dtype):
    expected = wavenet_generate(PACK, wavenet_state(PACK, 2), U)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        state, none = wavenet_state(PACK, 2), philox_uniform(0, 2, 0)
        assert torch.equal(wavenet_generate(PACK, state, U), expected)
        assert wavenet_generate(PACK, state, none).shape == (2, 0)
        codes, logits = wavenet_generate_ref(
            PACK.data, PACK.shape.to_ints(), wavenet_state(PACK, 2), U, None, None, 1.0, True
        )
        assert logits.dtype == torch.float32 and codes.shape == U.shape
        assert WaveNetStream(PACK, batch=2).read(8).shape == (2, 8)
    finally:
        torch.set_default_dtype(before)


def test_the_op_itself_checks_everything_again():
    """Called directly, past the public function: RuntimeError, never a crash, and the state stays."""
    op = torch.ops.audiokernels.wavenet_generate.default
    shape = PACK.shape.to_ints()
    good = [PACK.data, shape, STATE, U, None, None, 1.0, False, None, None]
    for index, value in (
        (0, PACK.data[:100]),
        (0, PACK.data.float()),
        (1, shape[:8]),
        (1, [7, *shape[1:]]),
        (1, [*shape[:9], 1, 2, 0]),
        (1, [shape[0], -4, *shape[2:]]),
        (1, [shape[0], 2**40, *shape[2:]]),
        (1, [*shape[:9], 2**62, 1, 1]),
        (2, STATE[:, ::2]),
        (2, STATE[:1].expand(2, -1)),
        (3, U[:1]),
        (4, torch.full((2, 1), 200)),
        (5, FRAMES),
        (6, float("nan")),
        (8, 0),
        (9, 0.0),
        (9, float("nan")),
    ):
        before = STATE.clone()
        arguments = list(good)
        arguments[index] = value
        with pytest.raises((RuntimeError, ValueError)):
            op(*arguments)
        assert torch.equal(STATE, before)
    beyond_int64 = [0, *[65536] * 4, 64, 65536, 0, 1, *[1] * 8192]  # bytes
    with pytest.raises((RuntimeError, ValueError), match="n_layer must be"):
        op(PACK.data, beyond_int64, *good[2:])

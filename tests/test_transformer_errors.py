"""Wrong arguments of transformer_pack, transformer_state, transformer_generate: the argument, the rule, what came."""

import re

import pytest
import torch
from sampling_cases import WRONG
from transformer_cases import pack_of, weights_of

from audiokernels import philox_uniform, transformer_generate, transformer_pack, transformer_state
from audiokernels.transformer_pack import TransformerPack

PACK, CONDITIONED = pack_of(), pack_of(condition=3, hop=4)
HOP = 13  # its place among the numbers of a shape; any number from 1 on will do
STATE, U = transformer_state(PACK, 2), philox_uniform(0, 2, 8)
GENERATE = [
    (TypeError, "pack", "TransformerPack", "Tensor", {"pack": PACK.data}),
    (TypeError, "state", "tensor", "list", {"state": [1.0]}),
    (TypeError, "state", "float32", "float64", {"state": STATE.double()}),
    (ValueError, "state", r"\(2, ", r"\(2, 100\)", {"state": STATE[:, :100]}),
    (ValueError, "state", r"\(2, ", r"\(1, ", {"state": STATE[:1]}),
    (ValueError, "state", "transformer_state", "", {"state": torch.full_like(STATE, -1.0)}),
    (ValueError, "state", "64 classes", "70", {"state": STATE + 38 * (torch.arange(STATE.shape[1]) == 2)}),
    (TypeError, "uniforms", "float32", "int64", {"uniforms": U.long()}),
    (ValueError, "uniforms", "2 dimensions", r"\(8,\)", {"uniforms": U[0]}),
    (ValueError, "uniforms", r"\[0, 1\)", "1.5", {"uniforms": U * 0 + 1.5}),
    (TypeError, "codes", "uint8", "float32", {"codes": torch.zeros(2, 3)}),
    (ValueError, "codes", "m <= 8", r"\(2, 9\)", {"codes": torch.zeros(2, 9, dtype=torch.uint8)}),
    (ValueError, "codes", r"0 \.\. 63", "64", {"codes": torch.full((2, 3), 64)}),
    (ValueError, "condition", "condition channels", r"\(2, 2, 3\)", {"condition": torch.zeros(2, 2, 3)}),
    (ValueError, "condition", "condition channels", "None", {"pack": CONDITIONED}),
    (ValueError, "condition", r"\(2, 2, 3\)", r"\(2, 3, 3\)", {"pack": CONDITIONED, "condition": torch.zeros(2, 3, 3)}),
    *WRONG,
    (ValueError, "uniforms", "device", "meta", {"uniforms": U.to("meta")}),
    (ValueError, "pack", "bytes", "", {"pack": TransformerPack(PACK.data[:-64], PACK.shape)}),
]


@pytest.mark.parametrize("number", range(len(GENERATE)))
def test_wrong_call_of_generate(number):
    error, argument, rule, came, changed = GENERATE[number]
    call = {"pack": PACK, "state": STATE.clone(), "uniforms": U, **changed}
    state = call["state"]
    before = state.clone() if isinstance(state, torch.Tensor) else None
    with pytest.raises(error) as caught:
        transformer_generate(call.pop("pack"), call.pop("state"), call.pop("uniforms"), **call)
    message = str(caught.value)
    assert type(caught.value) is error and message.startswith(argument), message
    for part in (rule, came):
        assert re.search(part, message), message
    assert before is None or torch.equal(state, before)


PACKING = [
    (ValueError, "dtype", "float32", "float16", {}, {"dtype": torch.float16}),
    (ValueError, "positions", "rotary", "learned", {}, {"positions": "learned"}),
    (ValueError, "fusion", "film", "mul", {}, {"fusion": "mul"}),
    (ValueError, "hop", "from 1", "0", {}, {"hop": 0}),
    (ValueError, "window", "from 1", "0", {}, {"window": 0}),
    (ValueError, "window", "from 1", "2.5", {}, {"window": 2.5}),
    (ValueError, "n_head", "divide", "16 / 3", {}, {"n_head": 3}),
    (ValueError, "n_head", r"8 \.\. 256", "16 / 4", {}, {"n_head": 4}),
    (ValueError, "haar", "16 integers", r"\[1, 2\]", {}, {"haar": [1, 2]}),
    (ValueError, "haar", r"0 \.\. 20", "-1", {}, {"haar": [-1] * 16}),
    (TypeError, "haar", "sequence", "NoneType", {}, {"haar": None}),
    (ValueError, "weights", "2 dimensions", "int", {"condition_weight": 5}, {}),
    (ValueError, "weights", "exactly", "proj_bias", {"proj_bias": None}, {}),
    (ValueError, "weights", "exactly", "extra", {"extra": torch.zeros(1)}, {}),
    (ValueError, "weights", "exactly", "context_embedding", {"context_embedding": torch.zeros(64, 6)}, {}),
    (ValueError, "weights", "2 dimensions", "None", {}, {"fusion": "add"}),
    (ValueError, "weights", "shape", r"\(2, 15, 16\)", {"proj_weight": torch.zeros(2, 15, 16)}, {}),
    (TypeError, "weights", "float", "int64", {"out_bias": torch.zeros(64, dtype=torch.int64)}, {}),
    (ValueError, "weights", "dimensions", r"\(64,\)", {"embedding": torch.zeros(64)}, {}),
    (ValueError, "weights", "one device", "meta", {"out_bias": torch.zeros(64, device="meta")}, {}),
]


@pytest.mark.parametrize("number", range(len(PACKING)))
def test_wrong_call_of_pack(number):
    error, argument, rule, came, changed, arguments = PACKING[number]
    weights = {k: v for k, v in {**weights_of(), **changed}.items() if v is not None}
    with pytest.raises(error) as caught:
        transformer_pack(weights, **{"n_head": 2, "window": 20, **arguments})
    message = str(caught.value)
    assert message.startswith(argument), message
    for part in (rule, came):
        assert re.search(part, message), message


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [
        (TypeError, "pack", lambda: transformer_state(PACK.data, 1)),
        (ValueError, "batch", lambda: transformer_state(PACK, -1)),
    ],
)
def test_wrong_call_of_state(error, argument, call):
    with pytest.raises(error, match=f"^{argument}"):
        call()


def test_the_op_itself_checks_everything_again():
    """Called directly, past the public function: an error, never a crash, and the state stays."""
    op = torch.ops.audiokernels.transformer_generate.default
    shape = pack_of(fusion="film", haar=[0] * 8 + [2] * 8).shape.to_ints()
    pack = pack_of(fusion="film", haar=[0] * 8 + [2] * 8)
    state = transformer_state(pack, 2)
    good = [pack.data, shape, state, U, None, None, 1.0, False, None, None]
    op(*good)

    def changed(**numbers):
        return [numbers.get(f"i{i}", number) for i, number in enumerate(shape)]

    for index, value in (
        (0, pack.data[:100]),
        (0, pack.data.float()),
        (1, shape[:10]),
        *((1, changed(**{f"i{i}": wrong})) for i in range(len(shape)) for wrong in (-1, 2**40, 2**62) if i != HOP),
        (1, changed(**{f"i{HOP}": 0})),
        (1, changed(i3=3)),
        (1, changed(i9=0)),
        (1, [*shape, 1]),
        (1, [*shape, 1, 1]),
        (2, state[:, ::2]),
        (2, state[:1].expand(2, -1)),
        (3, U[:1]),
        (4, torch.full((2, 1), 200)),
        (5, torch.zeros(2, 2, 3)),
        (6, float("nan")),
        (8, 0),
        (9, 0.0),
        (9, float("nan")),
    ):
        before = state.clone()
        arguments = list(good)
        arguments[index] = value
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            op(*arguments)
        assert torch.equal(state, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_default_dtype_does_not_matter(dtype):
    weights, before = weights_of(), torch.get_default_dtype()
    expected = transformer_pack(weights, n_head=2, window=20)
    torch.set_default_dtype(dtype)
    try:
        pack = transformer_pack(weights, n_head=2, window=20)
        assert torch.equal(pack.data, expected.data)
        assert torch.equal(transformer_state(pack, 2), STATE)
    finally:
        torch.set_default_dtype(before)

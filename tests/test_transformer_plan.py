"""transformer_generate_plan: how many blocks a stream gets on which GPU, and why."""

import pytest
import torch

from audiokernels._gpu import Gpu
from audiokernels.backends import REFERENCE
from audiokernels.transformer_pack import TransformerShape
from audiokernels.transformer_plan import TransformerPlan, attention_slices, shared_bytes, transformer_generate_plan

GPUS = {
    "RTX 2080": Gpu((7, 5), 46, 65536),
    "A100": Gpu((8, 0), 108, 166912),
    "L4": Gpu((8, 9), 58, 101376),
    "RTX 4090": Gpu((8, 9), 128, 101376),
    "H100": Gpu((9, 0), 132, 232448, (15, 7)),
    "H200": Gpu((9, 0), 132, 232448, (15, 7)),
    "B200": Gpu((10, 0), 148, 232448, (17, 8)),
    "RTX 5090": Gpu((12, 0), 170, 101376),
}


def shape_of(dtype=torch.bfloat16, **sizes):
    cache = torch.float32 if dtype == torch.float32 else torch.bfloat16
    plain = {"n_layer": 8, "n_head": 8, "n_embd": 128, "n_inner": 512, "n_class": 256, "window": 1600}
    plain |= {"positions": "rotary", "fusion": "none", "context": 0, "code": 0, "condition": 0, "hop": 1}
    return TransformerShape(dtype, cache, **{**plain, "widths": (), "haar": (), **sizes})


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_every_gpu_has_a_plan_that_fits_it(name, dtype):
    context = {"fusion": "film", "context": 64, "code": 128, "widths": (5, 5, 5, 4, 4, 2)}
    for sizes in ({}, {"n_layer": 3, "n_head": 4}, context, {"window": 65536}, {"haar": (0, 64, 1, 32, 2, 32)}):
        for batch in (0, 1, 16, 1000):
            made = transformer_generate_plan(shape_of(dtype, **sizes), batch, GPUS[name])
            if GPUS[name].capability < (8, 0):
                assert made == TransformerPlan(REFERENCE, "sm_75 is older than sm_80")
                continue
            kept = shared_bytes(shape_of(dtype, **sizes), made.blocks, made.resident, made.staged)
            assert made.shared_bytes == kept <= GPUS[name].shared_memory
            assert made.kernel == ("cuda_cluster" if made.blocks > 1 else "cuda_general")
            assert made.to_ints() == [made.blocks, made.shared_bytes, made.resident, made.staged]
            if not any(GPUS[name].clusters):
                assert made.blocks == 1 and "no clusters on this GPU" in made.why and made.staged == 0


def test_blocks_of_a_stream_on_an_h100():
    """As many as help while all streams run at once; one where there are more streams than clusters."""
    batches = (1, 7, 8, 15, 16, 30, 31, 60, 61, 132, 1000)
    blocks = [transformer_generate_plan(shape_of(), batch, GPUS["H100"]).blocks for batch in batches]
    assert blocks == [16, 16, 8, 8, 4, 4, 2, 2, 1, 1, 1]


STANDARD = {
    ("3 layers", torch.bfloat16): (16, 4, 1, "the output and of all 3 layers, each layer's keys ahead"),
    ("3 layers", torch.int8): (16, 4, 2, "the output and of all 3 layers, each layer's keys and values ahead"),
    ("3 layers", torch.float32): (16, 2, 1, "the output and of 1 of 3 layers"),
    ("8 layers", torch.bfloat16): (16, 6, 1, "the output and of 5 of 8 layers"),
    ("8 layers", torch.int8): (16, 9, 1, "the output and of all 8 layers"),
    ("8 layers", torch.float32): (16, 3, 1, "the output and of 2 of 8 layers"),
}


@pytest.mark.parametrize("sizes", STANDARD, ids=str)
def test_what_an_h100_keeps_of_one_stream_of_the_standard_models(sizes):
    """128 channels, a window of 1600: nothing more has room; with fewer blocks a stream there is room for less."""
    (model, dtype), (blocks, resident, staged, why) = sizes, STANDARD[sizes]
    shape = shape_of(dtype, **({"n_layer": 3, "n_head": 4} if model == "3 layers" else {}))
    made = transformer_generate_plan(shape, 1, GPUS["H100"])
    assert (made.blocks, made.resident, made.staged) == (blocks, resident, staged) and why in made.why
    for more in ((resident + 1, staged), (resident, staged + 1)):
        complete = more[0] > shape.n_layer + 1 or more[1] > 2
        assert complete or shared_bytes(shape, blocks, *more) > GPUS["H100"].shared_memory
    assert all(transformer_generate_plan(shape, batch, GPUS["H100"]).resident <= resident for batch in (8, 16, 1000))
    nothing = transformer_generate_plan(shape_of(n_class=20000, n_embd=256, n_head=1), 1, GPUS["H100"])
    assert nothing.resident == 0 and "no weights" in nothing.why


def test_slices_follow_the_heads():
    slices = {1: 16, 2: 16, 3: 15, 5: 15, 8: 16, 16: 16, 32: 16, 64: 16}
    for n_head, count in slices.items():
        assert attention_slices(shape_of(n_head=n_head, n_embd=960 if n_head in (3, 5) else 1024)) == count
    assert attention_slices(shape_of(n_head=1, window=64)) == 1  # one block of keys
    assert attention_slices(shape_of(n_head=17, n_embd=136)) == 9  # two heads a slice
    assert transformer_generate_plan(shape_of(n_head=1, window=64), 1, GPUS["H100"]).blocks == 1


def test_what_no_kernel_takes():
    for sizes, why in (
        ({"n_embd": 32768, "n_head": 256}, "shared memory"),
        ({"haar": (0, 1, 1, 1) * 70}, "128 runs"),
        ({"fusion": "add", "context": 8, "code": 8, "widths": (1,) * 25}, "24 layers"),
    ):
        made = transformer_generate_plan(shape_of(**sizes), 1, GPUS["H100"])
        assert made.kernel == REFERENCE and why in made.why
    wide = transformer_generate_plan(shape_of(n_class=32768), 1, GPUS["H100"])
    assert wide.kernel == "cuda_general"  # two buffers of so many logits would not fit

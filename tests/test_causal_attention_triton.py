"""The Triton kernels of causal attention without a GPU: their plans, and their values through Triton's interpreter."""

import pytest
import torch
from triton_cases import interpret

from audiokernels import causal_attention_plan as plans
from audiokernels.backends import REFERENCE
from audiokernels.causal_attention_plan import (
    Device,
    causal_attention_backward_plan,
    causal_attention_decode_plan,
    causal_attention_plan,
)

HEADS = (1, 8, 4096)


def shape(headdim, seqlen=4096):
    return (1, 8, seqlen, headdim)


@pytest.mark.timeout(1800)  # with the slow cases
def test_interpreted(request):
    interpret(request, "interpreted_attention.py", at_least=45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("headdim", [8, 16, 24, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("shared_memory", [101376, 166912, 232448])
def test_every_headdim_has_blocks_that_fit(headdim, dtype, shared_memory):
    device = Device(108, shared_memory)
    forward = causal_attention_plan(shape(headdim), shape(headdim), dtype, None, device)
    backward = causal_attention_backward_plan(shape(headdim), shape(headdim), dtype, None, device)
    assert forward.kernel == backward.kernel == "Triton"
    assert max(forward.tile.shared, backward.dq.shared, backward.dkdv.shared) <= shared_memory
    assert forward.headdim == backward.headdim == max(16, 1 << (headdim - 1).bit_length())


def test_plans_of_note():
    def plan(headdim, dtype=torch.bfloat16, seqlen=16384, window=None):
        return causal_attention_plan(shape(headdim, seqlen), shape(headdim, seqlen), dtype, window, Device())

    assert plan(16).tile.polynomial and plan(16).optimistic and plan(16).tile.block_n == 128
    assert plan(16, seqlen=1600).tile.block_n == plan(16, window=1024).tile.block_n == 64
    assert not plan(16, torch.float16).tile.polynomial and not plan(16, torch.float16).optimistic
    assert not plan(16, torch.float32).optimistic and plan(16, torch.float32).precision == "bf16x6"
    assert plan(64, window=10**9).window == 16384
    for made in (
        plan(16, torch.float64),
        causal_attention_backward_plan(shape(16), shape(16), torch.float64, None, Device()),
    ):
        assert made.kernel == REFERENCE and "float64" in made.why


def test_no_gpu_with_too_little_memory_is_asked_for_the_impossible():
    plan = causal_attention_plan(shape(256), shape(256), torch.float32, None, Device(1, 1000))
    assert plan.kernel == REFERENCE and "shared memory" in plan.why


def test_gpus_before_sm_80_take_the_reference():
    turing = Device(46, 65536, 7)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for plan in (causal_attention_plan, causal_attention_backward_plan, causal_attention_decode_plan):
            made = plan(shape(64), shape(64), dtype, None, turing)
            assert made.kernel == REFERENCE and made.why == "sm_7x is older than sm_80"


def test_decode_plan_fills_the_gpu_by_shapes_alone():
    def splits(batch, nheads_kv, capacity, window=None, headdim=16):
        q, cache = (batch, 8, 1, headdim), (batch, nheads_kv, capacity, headdim)
        return causal_attention_decode_plan(q, cache, torch.bfloat16, window, Device()).splits

    assert splits(1, 8, 4096) == 32 and splits(1, 1, 65536) == 64 and splits(64, 8, 4096) == 1
    assert splits(1, 8, 65536, window=100) == 1


def test_precision_follows_torchs_switch():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert plans.device_facts(torch.device("cpu")).precision == "bf16x3"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert plans.device_facts(torch.device("cpu")).precision == "bf16x6"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

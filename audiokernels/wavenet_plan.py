"""Which CUDA kernel a call of wavenet_generate takes, in how many blocks: a pure function of sizes and device facts.

The general kernel gives a block one or four streams and reads all weights from L2 for each sample. It takes any sizes
whose activations fit the shared memory of a block.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from audiokernels._packing import LANES, round_up
from audiokernels.backends import REFERENCE
from audiokernels.wavenet_pack import WaveNetShape

THREADS = 512  # of a block of the general kernel
MOST_LAYERS = 256  # dilations travel with the launch


class Gpu(NamedTuple):
    """What a plan needs to know of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that one block may have


class WaveNetPlan(NamedTuple):
    """The answer; `kernel` is REFERENCE where no kernel takes the call."""

    kernel: str
    why: str
    streams: int = 0  # of one block
    blocks: int = 0
    shared_bytes: int = 0  # of one block


def wavenet_generate_plan(shape: WaveNetShape, batch: int, gpu: Gpu) -> WaveNetPlan:
    """How wavenet_generate serves a call on a CUDA device."""
    if gpu.capability < (8, 0):
        return WaveNetPlan(REFERENCE, f"sm_{gpu.capability[0]}{gpu.capability[1]} is older than sm_80")
    if len(shape.dilations) > MOST_LAYERS:
        return WaveNetPlan(REFERENCE, f"{len(shape.dilations)} layers: the kernels take up to {MOST_LAYERS}")
    alone, shared = (general_bytes(shape, streams) for streams in (1, 4))
    if alone > gpu.shared_memory:
        return WaveNetPlan(
            REFERENCE,
            f"a stream's activations take {alone:,} bytes of shared memory, a block has {gpu.shared_memory:,}",
        )
    if batch > gpu.multiprocessors and shared <= gpu.shared_memory:
        why, streams, shared_bytes = "four streams a block share each read of the weights", 4, shared
    else:
        why, streams, shared_bytes = "a block per stream", 1, alone
    return WaveNetPlan("cuda_general", f"{why}; weights from L2", streams, -(-batch // streams), shared_bytes)


def general_bytes(shape: WaveNetShape, streams: int) -> int:
    """Shared memory of a block of the general kernel, as csrc/wavenet_general_cuda.cu carves it."""
    x, h, skip, head, classes = (
        round_up(size, LANES) for size in (shape.residual, shape.hidden, shape.skip, shape.head, shape.n_class)
    )
    inputs = max(shape.width * x, h, skip, head) * streams
    outputs = max(2 * h, head, classes) * streams
    packed = inputs // 4 if shape.dtype == torch.int8 else 0
    partial = THREADS * 4 * streams
    rest = [shape.width * streams, len(shape.dilations) * streams, streams]  # scales, ring slots, codes
    return 4 * sum(round_up(n, 4) for n in (inputs, outputs, x * streams, skip * streams, partial, packed, *rest))


@lru_cache
def gpu_facts(device: torch.device) -> Gpu:
    """The Gpu of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )

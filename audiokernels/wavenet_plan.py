"""Which CUDA kernel a call of wavenet_generate takes, in how many blocks: a pure function of sizes and device facts.

cuda_cluster: clusters of 2 to 16 blocks keep all weights in registers and shared memory and run 1 to 4 groups of 8
streams each, as many as fit and fill the GPU once. It takes float16, bfloat16 and int8 packs of 32, 64 or 128 residual
channels with as many hidden ones, width 2 or 3, 64 to 256 skip and head channels and classes, compute capability 9 and
10; up to 40 layers (int8: 50), of width 3 and 64 channels up to 34 (int8: 50), of 128 channels up to 12, and up to 60
where the skip channels leave room.
cuda_general: a block takes one or four streams and reads all weights from L2 for each sample; any sizes whose
activations fit the shared memory of a block, sm_80 and later.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from audiokernels._gpu import Gpu, device_facts
from audiokernels._packing import LANES, round_up
from audiokernels.backends import REFERENCE
from audiokernels.wavenet_pack import WaveNetShape

THREADS = 512  # of a block of the general kernel
MOST_LAYERS = 256  # dilations travel with the launch
STREAMS = 8  # of a group: the columns of one matrix product
LOCAL_LAYERS = {32: 5, 64: 5, 128: 1}  # of a block of a cluster, by residual channels
MOST_TILES = 4  # of 16 rows of skip, head or classes, of a block of a cluster
HELD_TILES = 16  # of 16 inputs: skip weights that a warp keeps in registers
MOST_GROUPS = 4  # by estimate, a step of a group takes about four times as long as its stay in a block


class WaveNetPlan(NamedTuple):
    """The answer; `kernel` is REFERENCE where no kernel takes the call."""

    kernel: str
    why: str
    streams: int = 0  # of one block, or of one cluster
    blocks: int = 0
    shared_bytes: int = 0  # of one block
    cluster: tuple[int, ...] = ()  # groups in flight, blocks of the layers, blocks of skip, head and output

    def to_ints(self) -> list[int]:
        """The form in which the private op's schema carries it."""
        return list(self.cluster) or [self.streams, self.shared_bytes]


def wavenet_generate_plan(shape: WaveNetShape, batch: int, gpu: Gpu) -> WaveNetPlan:
    """How wavenet_generate serves a call on a CUDA device."""
    if gpu.capability < (8, 0):
        return WaveNetPlan(REFERENCE, f"sm_{gpu.capability[0]}{gpu.capability[1]} is older than sm_80")
    if len(shape.dilations) > MOST_LAYERS:
        return WaveNetPlan(REFERENCE, f"{len(shape.dilations)} layers: the kernels take up to {MOST_LAYERS}")
    cluster, why_not = cluster_layout(shape, batch, gpu)
    if cluster:
        groups, layer_blocks, head_blocks = cluster
        count, size = -(-batch // (groups * STREAMS)), layer_blocks + head_blocks
        why = (
            f"{count} cluster(s) of {layer_blocks} + {head_blocks} blocks, {groups} group(s) of {STREAMS} streams each"
        )
        if shape.dtype == torch.int8:
            why += "; int8 weights are widened to float16, activations stay in float16"
        shared_bytes = cluster_bytes(shape, *cluster)
        return WaveNetPlan("cuda_cluster", why, groups * STREAMS, count * size, shared_bytes, cluster)
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
    return WaveNetPlan(
        "cuda_general", f"{why}, weights from L2; no cluster: {why_not}", streams, -(-batch // streams), shared_bytes
    )


def cluster_layout(shape: WaveNetShape, batch: int, gpu: Gpu) -> tuple[tuple[int, ...], str]:
    """(groups, layer blocks, head blocks) of a cluster, or () and why there is none. Codes depend on none of them."""
    if not any(gpu.clusters):
        return (), "clusters of so much shared memory do not fit this GPU"
    if shape.dtype == torch.float32:
        return (), "the pack is in float32"
    if shape.residual not in LOCAL_LAYERS or shape.hidden != shape.residual or shape.width < 2:
        return (), "it takes 32, 64 or 128 residual channels, as many hidden ones, and a width of at least 2"
    rows = [round_up(size, LANES) for size in (shape.skip, shape.head, shape.n_class)]
    local = LOCAL_LAYERS[shape.residual]
    while local > 1 and layer_bytes(shape, 1, local) > gpu.shared_memory:
        local -= 1
    layer_blocks = -(-len(shape.dilations) // local)
    if max(rows) > 256 or layer_blocks > 12:
        return (), "the layers, or the rows of skip, head and classes, are too many for a cluster"
    for size, resident in zip((8, 16), gpu.clusters, strict=True):
        head_blocks = min(size - layer_blocks, 8, min(rows) // LANES)
        if resident == 0 or head_blocks < 1 or -(-max(rows) // LANES // head_blocks) > MOST_TILES:
            continue
        for most in range(MOST_GROUPS, 0, -1):
            if cluster_bytes(shape, most, layer_blocks, head_blocks) <= gpu.shared_memory:
                waves = max(1, -(-batch // (most * STREAMS * resident)))
                groups = max(1, -(-batch // (waves * STREAMS * resident)))  # every wave with as many
                return (groups, layer_blocks, head_blocks), ""
    return (), "a block of a cluster has too little shared memory for its weights, or too many rows"


def cluster_bytes(shape: WaveNetShape, groups: int, layer_blocks: int, head_blocks: int) -> int:
    """Shared memory of a block of a cluster, as csrc/wavenet_cluster.h places it."""
    layers, vector, steps = len(shape.dilations), shape.residual * 2 * STREAMS, shape.residual // 16
    skip, head, classes = (round_up(size, LANES) for size in (shape.skip, shape.head, shape.n_class))
    warps, skip_warps = (-(-rows // LANES // head_blocks) for rows in (max(skip, head, classes), skip))
    drawn = -(-STREAMS // head_blocks)  # streams
    held = min(-(-layers // 2), HELD_TILES // steps)  # layers
    top = [8 * groups * layers, *[8 * groups] * 4, (layers - held) * skip_warps * tile_row_bytes(shape)]
    top += [groups * layers * vector, groups * skip_warps * 512]
    top += [*(groups * round_up(rows, 32) * 2 * STREAMS for rows in (skip, head))]
    top += [groups * drawn * classes * 4, warps * 64]
    return max(layer_bytes(shape, groups, -(-layers // layer_blocks)), sum(round_up(n, 16) for n in top))


def layer_bytes(shape: WaveNetShape, groups: int, local: int) -> int:
    """The same of a block of `local` layers."""
    residual, vector = shape.residual, shape.residual * 2 * STREAMS
    parts = [8 * groups, local * shape.width * 2 * (residual // 16) * tile_row_bytes(shape)]
    parts += [groups * local * vector, local * (shape.width - 1) * vector, 2 * vector]
    parts += [groups * vector, groups * vector, 2 * groups * vector, 8 * local * residual, 4 * local * residual]
    parts += [local * 8, groups * local * STREAMS * 4, groups * STREAMS * 4, groups * STREAMS * 8]
    return sum(round_up(n, 16) for n in parts)


def tile_row_bytes(shape: WaveNetShape) -> int:
    """The same of 16 rows of weights by the residual channels."""
    return shape.residual * 16 + 64 if shape.dtype == torch.int8 else shape.residual * 32


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
    """The Gpu of a CUDA device. Clusters are counted for the standard model of 20 and of 40 layers."""
    facts = device_facts(device)
    if facts.capability < (9, 0):
        return facts
    probe = torch.empty(0, device=device)
    count = torch.ops.audiokernels._wavenet_clusters.default
    shapes = [
        WaveNetShape(torch.float16, 64, 64, 256, 256, 256, 2, 0, 1, (1,) * layers).to_ints() for layers in (20, 40)
    ]
    return facts._replace(clusters=(count(probe, shapes[0], [1, 4, 4]), count(probe, shapes[1], [1, 8, 8])))

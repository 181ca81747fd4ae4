"""Which CUDA kernel a call of transformer_generate takes, in how many blocks: a pure function of sizes and GPU facts.

cuda_cluster: a thread-block cluster a stream, compute capability 9 and 10. Its blocks share the heads, the keys of a
head where there are few heads, the rows of the MLP, of the output and of the context network: two exchanges a layer.
cuda_general: the same kernel with one block a stream, sm_80 and later.

They take every pack and size whose vectors fit the shared memory of a block, up to 24 layers of the context network and
128 runs of pooling levels. What is left of that memory is used, in this order, for: on a cluster the keys of a layer,
copied ahead of their use; the weights of the output and of the first layers, loaded once a call; the values of a layer.
The rest is read through L2 in every step. The codes are the same whatever lies where and whatever the number of blocks,
which says only who adds which part of the same sums.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from audiokernels._gpu import Gpu, device_facts
from audiokernels._packing import GROUP, matrix_bytes, round_up
from audiokernels.backends import REFERENCE
from audiokernels.transformer_pack import KEY_BLOCK, TransformerShape

THREADS = 512  # of a block
SLICES = 16  # of a sum over inputs, at most
CHUNK_ROWS = 512  # whose sums a block on its own keeps at a time
WAVE_FLOATS = 8192  # of the states of attention that are kept at a time
MOST_WIDTHS, MOST_RUNS = 24, 128  # they travel with the launch
FIXED = 4.0  # of a layer's time on a cluster, by estimate, in units of that of a slice


class TransformerPlan(NamedTuple):
    """The answer; `kernel` is REFERENCE where no kernel takes the call."""

    kernel: str
    why: str
    blocks: int = 0  # of a stream
    shared_bytes: int = 0  # of one block
    resident: int = 0  # weights kept in shared memory: 0 none, 1 + n the output's and those of the first n layers
    staged: int = 0  # copied there ahead: 1 a layer's keys, 2 its values too

    def to_ints(self) -> list[int]:
        """The form in which the private op's schema carries it."""
        return [self.blocks, self.shared_bytes, self.resident, self.staged]


@lru_cache(256)
def transformer_generate_plan(shape: TransformerShape, batch: int, gpu: Gpu) -> TransformerPlan:
    """How transformer_generate serves a call on a CUDA device."""
    if gpu.capability < (8, 0):
        return TransformerPlan(REFERENCE, f"sm_{gpu.capability[0]}{gpu.capability[1]} is older than sm_80")
    if len(shape.widths) > MOST_WIDTHS or len(shape.haar) > 2 * MOST_RUNS:
        most = f"up to {MOST_WIDTHS} layers of the context network and {MOST_RUNS} runs of levels"
        return TransformerPlan(REFERENCE, f"the kernels take {most}")
    alone = shared_bytes(shape, 1)
    if alone > gpu.shared_memory:
        why = f"a stream's vectors take {alone:,} bytes of shared memory, a block has {gpu.shared_memory:,}"
        return TransformerPlan(REFERENCE, why)
    slices = attention_slices(shape)
    cost, blocks = waves(batch, gpu.multiprocessors) * (FIXED + slices), 1
    for more in range(2, min(slices, 16) + 1):
        small, large = gpu.clusters
        resident = small * (8 // more) if more <= 8 else large
        if resident == 0 or shared_bytes(shape, more) > gpu.shared_memory:
            continue
        with_more = waves(batch, resident) * (FIXED + -(-slices // more))
        if with_more < cost:
            cost, blocks = with_more, more
    resident, staged = kept(shape, blocks, gpu.shared_memory)
    if blocks > 1:
        kernel, why = "cuda_cluster", f"a cluster of {blocks} blocks a stream shares {slices} slices of heads and keys"
    else:
        why = "more streams at a time than clusters" if any(gpu.clusters) else "no clusters on this GPU"
        kernel, why = "cuda_general", f"a block a stream: {why}"
    why += f"; in shared memory {what_is_kept(shape, resident, staged)}"
    return TransformerPlan(kernel, why, blocks, shared_bytes(shape, blocks, resident, staged), resident, staged)


def kept(shape: TransformerShape, blocks: int, shared_memory: int) -> tuple[int, int]:
    """(resident, staged) of a plan: a layer's keys first, then weights, then a layer's values, as far as there is room.

    By the latencies of an H100 the keys of all layers ahead of time save as much as the weights of half of them at 16
    blocks, and more with fewer blocks; weights save more than the values, which are asked for before scores are made.
    """

    def fits(resident: int, staged: int) -> bool:
        return shared_bytes(shape, blocks, resident, staged) <= shared_memory

    staged = int(blocks > 1 and fits(0, 1))
    resident = next((n for n in range(shape.n_layer + 1, 0, -1) if fits(n, staged)), 0)
    return resident, 2 if staged and fits(resident, 2) else staged


def read_once(shape: TransformerShape, resident: int) -> int:
    """Bytes of the pack that a call reads once, and not in every step."""
    layers = [f"{part}.{layer}" for part in ("qkv", "proj", "up", "down") for layer in range(resident - 1)]
    names = {"out", *layers} if resident else ()
    return sum(matrix_bytes(shape.dtype, *sizes) for name, *sizes in shape.matrices() if name in names)


def what_is_kept(shape: TransformerShape, resident: int, staged: int) -> str:
    n_layer = shape.n_layer
    layers = f"all {n_layer}" if resident > n_layer else f"{resident - 1} of {n_layer}"
    weights = f"the weights of the output and of {layers} layers" if resident else "no weights"
    return weights + ("", ", each layer's keys ahead", ", each layer's keys and values ahead")[staged]


def above(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def waves(batch: int, resident: int) -> int:
    """Turns in which `batch` streams run, `resident` at once."""
    return above(max(1, batch), resident)


def parts(shape: TransformerShape) -> int:
    """Of a head's keys: how many slices they make."""
    return min(SLICES // shape.n_head, shape.capacity // KEY_BLOCK) if shape.n_head < SLICES else 1


def heads_of_slice(shape: TransformerShape) -> int:
    return above(shape.n_head, SLICES)


def attention_slices(shape: TransformerShape) -> int:
    """Slices of heads, or of the keys of one."""
    return above(shape.n_head, heads_of_slice(shape)) * parts(shape)


def block_rows(n: int, blocks: int) -> int:
    """Inputs that the first block has of a vector of n, whole slices of which are shared."""
    width = round_up(above(n, SLICES), 16)
    return above(above(n, width), blocks) * width


def most_heads(shape: TransformerShape, blocks: int) -> tuple[int, int, int]:
    """The most heads, units (a head with a part of its keys), and blocks of keys that one block has."""
    slices, n_parts, key_blocks = attention_slices(shape), parts(shape), shape.capacity // KEY_BLOCK
    each, most = above(slices, blocks), (0, 0, 0)
    for rank in range(blocks):
        first, end = (
            min(min(at * each, slices) * heads_of_slice(shape), shape.n_head * n_parts) for at in (rank, rank + 1)
        )
        heads = (end - 1) // n_parts + 1 - first // n_parts if end > first else 0
        keys = [unit // n_parts * key_blocks + above(unit % n_parts * key_blocks, n_parts) for unit in (first, end)]
        most = tuple(map(max, most, (heads, end - first, keys[1] - keys[0])))
    return most


def resident_bytes(shape: TransformerShape, blocks: int, resident: int) -> int:
    """Of a block's part of the output's weights and of those of the first resident - 1 layers."""
    embd, inner, scales = round_up(shape.n_embd, 16), block_rows(shape.n_inner, blocks), shape.dtype == torch.int8
    heads = most_heads(shape, blocks)[0] * shape.head_rows

    def part(rows: int, inputs: int) -> int:
        return 4 * rows * (1 + scales + above(inputs, GROUP[shape.dtype]))

    layer = part(3 * heads, shape.n_embd) + part(embd, heads) + part(inner, shape.n_embd) + part(embd, inner)
    output = part(16 * above(round_up(shape.n_class, 16) // 16, blocks), shape.n_embd)
    return output + (resident - 1) * layer if resident else 0


def shared_bytes(shape: TransformerShape, blocks: int, resident: int = 0, staged: int = 0) -> int:
    """Shared memory of a block, as csrc/transformer_generate_cuda.h places it."""
    embd, head, classes = round_up(shape.n_embd, 16), shape.head_rows, round_up(shape.n_class, 16)
    heads, units, key_blocks = most_heads(shape, blocks)
    kept_keys = key_blocks * KEY_BLOCK * shape.cache_dtype.itemsize
    each = above(attention_slices(shape), blocks)
    attended, inner = each * heads_of_slice(shape) * head, block_rows(shape.n_inner, blocks)
    taps = vector = context = code = width = 0
    if shape.widths:
        context, code, width = round_up(shape.context, 16), round_up(shape.code, 16), max(shape.widths)
        taps = width * block_rows(shape.context, blocks)
        vector = max(context, round_up(shape.code, 16 * SLICES))
    rows = max(3 * heads * head, inner, 16 * above(classes // 16, blocks))
    all_rows = max(embd, shape.fuse_rows, context, code)
    buffer_rows = all_rows if blocks > 1 else min(all_rows, CHUNK_ROWS)
    buffer = round_up(max(SLICES * buffer_rows + 2 * SLICES, classes if blocks > 1 else 0), 4) + 4
    buffers = 2 if blocks > 1 else 1
    subs = min(16, above(shape.capacity // KEY_BLOCK, parts(shape)))
    states = max(1, min(units, WAVE_FLOATS // (subs * (head + 4)))) * subs * (head + 4)
    angles = (shape.headdim if shape.positions == "rotary" else shape.n_embd + 1) // 2
    packed, scales = max(embd, attended, inner, taps, vector), 4 * SLICES * max(width, 1)
    numbers = [8 * angles, 4 * angles, 4 * angles, 4 * embd, 4 * embd, 4 * embd if shape.condition else 0]
    numbers += [12 * heads * head, 4 * attended, 8 * each, 4 * inner, 4 * classes, 4 * shape.fuse_rows]
    numbers += [4 * vector, 4 * taps, 4 * max(4 * min(rows, 1024), THREADS, classes // 16)]
    numbers += [4 * states, THREADS // 8 * KEY_BLOCK, *([packed, scales] if shape.dtype == torch.int8 else [])]
    numbers += [4 * len(shape.widths), 4, 4, 24, 4 * buffer * buffers, resident_bytes(shape, blocks, resident)]
    numbers += [kept_keys * shape.headdim * (staged > 0), kept_keys * head * (staged > 1)]
    return sum(round_up(n, 16) for n in numbers)


def aligned(shape: TransformerShape, state: Tensor) -> bool:
    """Whether keys and values lie at multiples of 16 bytes in every row of the state."""
    runs = zip(shape.haar[::2], shape.haar[1::2], strict=True)
    ring = sum(count << level for level, count in runs if level)
    stride = state.stride(0) if state.shape[0] > 1 else 0
    return state.data_ptr() % 16 == 0 and stride % 4 == 0 and ring % 4 == 0


@lru_cache
def gpu_facts(device: torch.device) -> Gpu:
    """The Gpu of a CUDA device, clusters counted for a block of 64 KB a multiprocessor."""
    facts = device_facts(device)
    if facts.capability < (9, 0):
        return facts
    probe = torch.empty(0, device=device)
    count = torch.ops.audiokernels._transformer_clusters.default
    return facts._replace(clusters=(count(probe, 8, 65536), count(probe, 16, 65536)))

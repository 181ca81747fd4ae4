"""Where the time of a step of wavenet_generate goes on a GPU's clusters: cycles that the kernel counts itself.

One thread of each kind of warp of the first cluster adds up the clock between the ends of its stages. A block of layers
waits for its input, embeds codes (the first one only), runs its layers and prepares the next step; a head block has
warps that sum skip (waiting for the layers) and multiply by head, and warps that multiply by the output's weights and
draw.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import audiokernels.wavenet_generate  # noqa: F401  (defines the op)
from audiokernels.wavenet_pack import WaveNetPack
from audiokernels.wavenet_plan import gpu_facts, wavenet_generate_plan

LAYER_STAGES = ("wait for input", "embedding", "layers", "prepare")
HEAD_STAGES = ("skip", "wait for skip", "head", "wait for head", "output", "wait for logits", "draw")
COUNTS = len(LAYER_STAGES) + len(HEAD_STAGES) + 1  # the last one: nanoseconds of a layer block's stages together


class StageTimes(NamedTuple):
    """The clock of the multiprocessors while it ran, and microseconds of a step by stage for each block."""

    gigahertz: float
    blocks: list[dict[str, float]]


def stage_times(counts: Tensor, n: int, layer_blocks: int) -> StageTimes:
    """What the kernel's int64 (blocks, COUNTS) mean for a call of n samples."""
    cycles, nanoseconds = counts[:, :-1].double(), counts[:layer_blocks, -1].double()
    gigahertz = float(cycles[:layer_blocks].sum() / nanoseconds.sum())
    blocks = []
    for i, block in enumerate((cycles / (1e3 * gigahertz * n)).tolist()):
        mine = slice(len(LAYER_STAGES)) if i < layer_blocks else slice(len(LAYER_STAGES), None)
        blocks.append(dict(zip((LAYER_STAGES + HEAD_STAGES)[mine], block[mine], strict=True)))
    return StageTimes(gigahertz, blocks)


def wavenet_stages(pack: WaveNetPack, state: Tensor, uniforms: Tensor) -> StageTimes | None:
    """Draw as wavenet_generate does, and return the time of a step by stage; None where no cluster takes the call.

    Waits for the GPU. Counting costs a few instructions a stage; the codes are the same.
    """
    plan = wavenet_generate_plan(pack.shape, uniforms.shape[0], gpu_facts(uniforms.device))
    if not plan.cluster:
        return None
    blocks = plan.cluster[1] + plan.cluster[2]
    counts = torch.zeros(blocks, COUNTS, dtype=torch.int64, device=uniforms.device)
    op = torch.ops.audiokernels._wavenet_stages.default
    op(pack.data, pack.shape.to_ints(), state, uniforms, plan.to_ints(), counts)
    return stage_times(counts.cpu(), uniforms.shape[1], plan.cluster[1])

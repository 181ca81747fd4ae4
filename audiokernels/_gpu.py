"""What the plans of the kernels need to know of a GPU."""

from functools import lru_cache
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """Facts of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that one block may have
    clusters: tuple[int, int] = (0, 0)  # of 8 and of 16 blocks, a block a multiprocessor: how many run at once


@lru_cache
def device_facts(device: torch.device) -> Gpu:
    """The Gpu of a CUDA device, its clusters not counted: each room counts those of its own kernel."""
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )

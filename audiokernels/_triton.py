"""What the launchers of all Triton kernels share; Triton itself is theirs to import."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """A kernel with all that a launch takes, so that tests can look at it, change it and compile it without a GPU."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    def run(self, like: Tensor) -> None:
        """On the device and the current stream of `like`."""
        with torch.cuda.device_of(like):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def strides(prefix: str, x: Tensor) -> dict[str, int]:
    """x's strides as arguments of a kernel; x is (batch, row, dim) or (batch, head, row, dim)."""
    names = ("batch", "head", "row", "dim") if x.ndim == 4 else ("batch", "row", "dim")
    return {f"{prefix}_{name}": stride for name, stride in zip(names, x.stride(), strict=True)}


def is_wide(rows: int, columns: int, *tensors: Tensor) -> bool:
    """Whether a tile of so many rows and columns of one of them may span 2^31 elements."""
    return any(rows * x.stride(-2) + columns * x.stride(-1) >= 1 << 31 for x in tensors)

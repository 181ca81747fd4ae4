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

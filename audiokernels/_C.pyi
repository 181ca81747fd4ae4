"""The compiled module: importing it registers the kernels with torch; it also tells how it was built."""

import numpy as np
from numpy.typing import NDArray

torch_version: str
compiler: str
cuda_archs: tuple[str, ...]
cuda_note: str

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def supported_isas() -> tuple[str, ...]: ...
def dilated_conv_update_plan(
    cuda: bool, float64: bool, batch: int, dim_out: int, taps: int, multiprocessors: int
) -> tuple[str, str]: ...

class WaveNetStream:
    """What audiokernels.WaveNetStream runs on; see there."""

    def __init__(
        self,
        weights: NDArray[np.uint8],
        shape: list[int],
        state: NDArray[np.float32],
        seed: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        condition: NDArray[np.float32] | None,
    ) -> None: ...
    def read(self, n: int) -> NDArray[np.uint8] | NDArray[np.int16]: ...
    def state(self) -> NDArray[np.float32]: ...
    @property
    def position(self) -> int: ...

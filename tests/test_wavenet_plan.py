"""wavenet_generate_plan: which kernel on which GPU, in how many blocks, and why."""

import pytest
import torch

from audiokernels.backends import REFERENCE
from audiokernels.wavenet_pack import WaveNetShape
from audiokernels.wavenet_plan import Gpu, wavenet_generate_plan

GPUS = {
    "RTX 2080": Gpu((7, 5), 46, 65536),
    "A100": Gpu((8, 0), 108, 166912),
    "RTX 3090": Gpu((8, 6), 82, 101376),
    "L4": Gpu((8, 9), 58, 101376),
    "RTX 4090": Gpu((8, 9), 128, 101376),
    "H100": Gpu((9, 0), 132, 232448),
    "H200": Gpu((9, 0), 132, 232448),
    "B200": Gpu((10, 0), 148, 232448),
    "RTX 5090": Gpu((12, 0), 170, 101376),
}
STANDARD = {"residual": 64, "hidden": 64, "skip": 256, "head": 256, "n_class": 256}


def shape_of(layers=20, dtype=torch.float16, **sizes):
    sizes = {"width": 2, "condition": 0, "hop": 1, **STANDARD, **sizes}
    return WaveNetShape(dtype, dilations=tuple(2 ** (i % 10) for i in range(layers)), **sizes)


def plan(name, batch=1, **sizes):
    return wavenet_generate_plan(shape_of(**sizes), batch, GPUS[name])


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_every_gpu_has_a_plan_that_fits_it(name, batch):
    made = plan(name, batch)
    if GPUS[name].capability < (8, 0):
        assert made == (REFERENCE, "sm_75 is older than sm_80", 0, 0, 0)
        return
    assert made.kernel == "cuda_general" and made.streams == (4 if batch == 1000 else 1)
    assert made.blocks == -(-batch // made.streams)
    assert 0 < made.shared_bytes <= GPUS[name].shared_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_big_models(dtype):
    big = {"residual": 512, "hidden": 512, "skip": 1024, "head": 1024, "layers": 60, "dtype": dtype}
    for name in ("A100", "H100", "L4"):
        made = plan(name, 1000, **big)
        assert made.kernel == "cuda_general" and made.shared_bytes <= GPUS[name].shared_memory
    assert plan("H100", 1000, **big).streams == 4
    assert plan("L4", 1000, **{**big, "skip": 4096}).streams == 1  # four would not fit its shared memory
    huge = plan("H100", skip=60_000, layers=1, head=16)
    assert huge.kernel == REFERENCE and "shared memory" in huge.why and "232,448" in huge.why
    deep = plan("H100", layers=257, residual=1, hidden=1, skip=1, head=1, n_class=2)
    assert deep.kernel == REFERENCE and "257 layers" in deep.why

"""wavenet_generate_plan: which kernel on which GPU, in how many blocks, and why."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch

from audiokernels.backends import REFERENCE
from audiokernels.wavenet_pack import WaveNetShape
from audiokernels.wavenet_plan import Gpu, WaveNetPlan, wavenet_generate_plan

GPUS = {
    "RTX 2080": Gpu((7, 5), 46, 65536),
    "A100": Gpu((8, 0), 108, 166912),
    "RTX 3090": Gpu((8, 6), 82, 101376),
    "L4": Gpu((8, 9), 58, 101376),
    "RTX 4090": Gpu((8, 9), 128, 101376),
    "H100": Gpu((9, 0), 132, 232448, (15, 7)),
    "H200": Gpu((9, 0), 132, 232448, (15, 7)),
    "B200": Gpu((10, 0), 148, 232448, (17, 8)),
    "RTX 5090": Gpu((12, 0), 170, 101376),
}
STANDARD = {"residual": 64, "hidden": 64, "skip": 256, "head": 256, "n_class": 256}


def shape_of(layers=20, dtype=torch.float16, **sizes):
    sizes = {"width": 2, "condition": 0, "hop": 1, **STANDARD, **sizes}
    return WaveNetShape(dtype, dilations=tuple(2 ** (i % 10) for i in range(layers)), **sizes)


def plan(name, batch=1, **sizes):
    return wavenet_generate_plan(shape_of(**sizes), batch, GPUS[name])


def standard(name, batch=1, **sizes):
    made = plan(name, batch, **sizes)
    assert made.kernel == REFERENCE or made.shared_bytes <= GPUS[name].shared_memory
    return made


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_every_gpu_has_a_plan_that_fits_it(name, batch):
    made = standard(name, batch)
    if GPUS[name].capability < (8, 0):
        assert made == WaveNetPlan(REFERENCE, "sm_75 is older than sm_80")
    elif GPUS[name].clusters[0]:
        groups = 3 if batch == 1000 else 1  # in three waves
        assert (made.kernel, made.cluster, made.streams) == ("cuda_cluster", (groups, 4, 4), 8 * groups)
        assert made.blocks == 8 * -(-batch // made.streams) and made.to_ints() == [groups, 4, 4]
    else:
        assert made.kernel == "cuda_general" and made.streams == (4 if batch == 1000 else 1)
        assert made.blocks == -(-batch // made.streams) and made.to_ints() == [made.streams, made.shared_bytes]
        assert "do not fit this GPU" in made.why


def test_what_a_cluster_takes():
    """The documented set, and what is next to it."""
    taken = [
        ({}, (4, 4)),
        ({"layers": 40}, (8, 8)),
        ({"layers": 30}, (6, 8)),
        ({"layers": 1}, (1, 7)),
        ({"residual": 32, "hidden": 32}, (4, 4)),
        ({"skip": 64, "head": 64, "n_class": 64}, (4, 4)),
        ({"width": 3, "layers": 16}, (4, 4)),
        ({"width": 3, "layers": 32}, (8, 8)),
        ({"width": 3, "layers": 34}, (9, 7)),
        ({"residual": 64, "skip": 64, "head": 64, "layers": 60}, (12, 4)),
        ({"residual": 32, "hidden": 32, "layers": 54}, (11, 5)),
        ({"residual": 128, "hidden": 128, "layers": 4}, (4, 4)),
        ({"residual": 128, "hidden": 128, "width": 3, "layers": 12}, (12, 4)),
        ({"condition": 80, "hop": 200}, (4, 4)),
        ({"dtype": torch.bfloat16}, (4, 4)),
        ({"dtype": torch.int8}, (4, 4)),
        ({"dtype": torch.int8, "layers": 50}, (10, 6)),
        ({"dtype": torch.int8, "width": 3, "layers": 20}, (4, 4)),  # five layers a block, of float16 four
        ({"dtype": torch.int8, "residual": 128, "hidden": 128, "width": 3, "layers": 12}, (12, 4)),
    ]
    for sizes, layout in taken:
        made = standard("H100", **sizes)
        assert made.kernel == "cuda_cluster" and made.cluster == (1, *layout), (sizes, made)
    refused = [
        ({"dtype": torch.float32}, "float32"),
        ({"residual": 48, "hidden": 48}, "32, 64 or 128 residual"),
        ({"residual": 64, "hidden": 32}, "32, 64 or 128 residual"),
        ({"residual": 128, "hidden": 128, "layers": 13}, "too many for a cluster"),
        ({"width": 1}, "width of at least 2"),
        ({"skip": 272}, "too many for a cluster"),
        ({"n_class": 1024}, "too many for a cluster"),
        ({"layers": 61}, "too many for a cluster"),
        ({"layers": 41}, "too little shared memory"),
        ({"width": 3, "layers": 35}, "too little shared memory"),
        ({"dtype": torch.int8, "layers": 51}, "too little shared memory"),
        ({"n_class": 2}, "too many rows"),
    ]
    for sizes, why in refused:
        made = standard("H100", **sizes)
        assert made.kernel == "cuda_general" and why in made.why, (sizes, made)


@pytest.mark.parametrize("name", ["H100", "B200"])
def test_int8_weights_take_half_the_shared_memory(name):
    for sizes in ({}, {"width": 3, "layers": 16}, {"residual": 128, "hidden": 128, "layers": 4}):
        half, whole = (standard(name, dtype=dtype, **sizes) for dtype in (torch.int8, torch.float16))
        assert half.cluster == whole.cluster and 0.5 < half.shared_bytes / whole.shared_bytes < 0.7
        assert "int8 weights are widened to float16" in half.why and "widened" not in whole.why
        assert plan("L4", dtype=torch.int8, **sizes).kernel == "cuda_general"


def test_the_documented_table_is_that_of_the_plan():
    """docs/wavenet.md: the most layers a cluster holds, and the groups beside 20 (12) of them, head as wide as skip."""
    text = (Path(__file__).parent.parent / "docs" / "wavenet.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([23, ]+) \| (16 bits|int8) \|(.*)\|$", text, re.MULTILINE)
    seen = set()
    for channels, widths, dtype, cells in rows:
        sizes = {
            "residual": int(channels),
            "hidden": int(channels),
            "dtype": {"int8": torch.int8}.get(dtype, torch.half),
        }
        for width, (skip, cell) in product(widths.split(", "), zip((64, 128, 256), cells.split("|"), strict=True)):
            sizes |= {"width": int(width), "skip": skip, "head": skip}
            fits = [n for n in range(1, 62) if plan("H100", layers=n, **sizes).cluster]
            groups = plan("H100", 10_000, layers=12 if channels == "128" else 20, **sizes).cluster[0]
            assert cell.strip() == f"{max(fits)}, {groups} group{'s' * (groups > 1)}", (sizes, max(fits), groups)
            seen.add((channels, width, dtype))
    assert len(seen) == 3 * 2 * 2


def test_groups_share_a_cluster_once_the_gpu_is_full():
    batches = (0, 1, 8, 120, 121, 240, 241, 256, 360, 361, 720, 721)
    assert [standard("H100", batch).cluster[0] for batch in batches] == [1, 1, 1, 1, 2, 2, 3, 3, 3, 2, 3, 3]
    assert standard("H100", 256).blocks == 8 * 11  # one wave
    small = {"residual": 32, "hidden": 32, "skip": 64, "head": 64}
    assert standard("H100", 1000, **small).cluster[0] == 3 and standard("H100", 480, **small).cluster[0] == 4
    assert standard("H100", 480, layers=40).cluster == (1, 8, 8)  # more do not fit beside its skip weights


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

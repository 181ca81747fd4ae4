"""Which Triton kernel a call of the causal attention ops takes, in which blocks: pure functions and a table.

Nothing is tuned at call time. The TFLOP/s in the table are those that prototypes of these kernels reached on an H100
(bfloat16, 16384 positions unless told otherwise; float32: 4096); the kernels themselves are compiled, not yet run on
a GPU. Rows without a figure are chosen by their registers and shared memory.

For headdim 8 and 16 in bfloat16 there is a kernel in CUDA C++ too, forward, from sm_90 on: its prototype reached 242
TFLOP/s, 189 at 1600 positions and 195 in a window of 1024, with a scale that was rounded to bfloat16. Until somebody
has measured this one, Triton serves those calls, and AUDIOKERNELS_ATTENTION_CUDA=1 asks for it.
"""

import os
import re
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from audiokernels._library import C
from audiokernels.backends import REFERENCE

ASKED = os.environ.get("AUDIOKERNELS_ATTENTION_CUDA") == "1"
"""Whether CUDA C++ is asked for: read once, when audiokernels is imported."""
SM90 = "CUDA C++"

SHORT = 2048
"""Up to so many visible keys a block's masked tiles weigh as much as its whole ones: smaller blocks pay."""


class Device(NamedTuple):
    """What a plan needs to know of a GPU, and how exact its user wants products of float32 numbers."""

    multiprocessors: int = 132
    shared_memory: int = 232448  # bytes that one block may have
    capability: int = 9  # the major number: 9 and 10 multiply asynchronously, out of shared memory
    precision: str = "bf16x6"
    asked: bool = False  # for CUDA C++
    compiled: bool = False  # it, for this GPU


class Tile(NamedTuple):
    """A kernel's block shape and launch."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    shared: int  # bytes, the most that Triton 3.6 or 3.7 allots on sm_80 to sm_120
    maxnreg: int | None = None
    polynomial: bool = False  # one of four pairs of exponentials by a bfloat16 cubic
    ones: bool = False  # row sums by a product with ones
    only: tuple[int, ...] = ()  # major numbers of the GPUs where it does not spill registers; (): all
    measured: str = ""


class Plan(NamedTuple):
    """The answer for causal_attention; `kernel` is REFERENCE where no kernel takes the call."""

    kernel: str
    why: str
    tile: Tile | None = None
    headdim: int = 0  # padded
    window: int = 0  # at most seqlen_k
    optimistic: bool = False  # a fixed reference maximum, checked afterwards, instead of a running one
    precision: str = "bf16x6"  # of float32 products


class BackwardPlan(NamedTuple):
    """The answer for causal_attention_backward: one kernel for dq, one for dk and dv."""

    kernel: str
    why: str
    dq: Tile | None = None
    dkdv: Tile | None = None
    headdim: int = 0
    window: int = 0
    precision: str = "bf16x6"


class DecodePlan(NamedTuple):
    """The answer for causal_attention_decode."""

    kernel: str
    why: str
    block_rows: int = 0  # rows are the queries of one key head
    block_keys: int = 0
    warps: int = 4
    stages: int = 2
    splits: int = 1  # programs that share the keys
    headdim: int = 0
    window: int = 0
    precision: str = "bf16x6"


ASYNC = (9, 10)

# {(headdim, bytes of an element): rows, the first that the device takes}
FORWARD = {
    (16, 2): [Tile(64, 128, 4, 4, 38960, None, True, True, measured="214; 207 without polynomial and ones")],
    (32, 2): [
        Tile(64, 64, 4, 4, 36896, 96, only=ASYNC, measured="361, at 80 registers; 1600 positions 266, window 1024 250"),
        Tile(64, 64, 4, 4, 28672),
    ],
    (64, 2): [Tile(64, 64, 4, 3, 57376, measured="485; 1600 positions 252, window 1024 351")],
    (128, 2): [Tile(128, 64, 8, 3, 132128, only=ASYNC), Tile(64, 32, 4, 2, 37888)],
    (256, 2): [Tile(128, 64, 8, 2, 197664, only=ASYNC), Tile(64, 32, 8, 2, 70656)],
    (16, 4): [Tile(128, 32, 4, 3, 23552, only=ASYNC, measured="38.6"), Tile(64, 32, 4, 2, 10240)],
    (32, 4): [Tile(64, 64, 4, 3, 57344, only=ASYNC, measured="52.5"), Tile(64, 32, 4, 2, 20480)],
    (64, 4): [
        Tile(64, 32, 4, 2, 53248, only=ASYNC, measured="57.3, in 64 x 64 or 128 x 32"),
        Tile(32, 32, 4, 2, 34816),
    ],
    (128, 4): [Tile(32, 32, 4, 1, 40960)],
    (256, 4): [Tile(32, 16, 4, 1, 81920)],
}
FORWARD_SHORT = {
    (16, 2): [Tile(64, 64, 4, 4, 20528, None, True, True, measured="1600 positions 159, window 1024 150")],
}
BACKWARD_DQ = {
    (16, 2): [Tile(64, 64, 4, 3, 18480, measured="0.762 ms")],
    (32, 2): [Tile(64, 64, 4, 3, 36912, measured="0.887 ms")],
    (64, 2): [Tile(128, 64, 4, 3, 81920, only=(9,), measured="1.220 ms"), Tile(64, 64, 4, 3, 73776)],
    (128, 2): [Tile(128, 64, 8, 2, 147504, only=ASYNC), Tile(64, 32, 4, 2, 53248)],
    (256, 2): [Tile(64, 32, 8, 1, 98312, only=ASYNC), Tile(32, 32, 4, 1, 65536)],
    (16, 4): [Tile(64, 64, 4, 2, 26624, only=(9,)), Tile(64, 32, 4, 2, 20480)],
    (32, 4): [Tile(64, 64, 4, 2, 53248, only=(9,)), Tile(32, 32, 4, 2, 32768)],
    (64, 4): [Tile(64, 32, 4, 2, 77824, only=(9,)), Tile(16, 32, 4, 2, 47104)],
    (128, 4): [Tile(16, 32, 4, 1, 49152)],
    (256, 4): [Tile(16, 16, 4, 1, 65536)],
}
BACKWARD_DKDV = {
    (16, 2): [Tile(128, 64, 4, 3, 38976, only=(8, 9, 10), measured="1.133 ms"), Tile(64, 64, 4, 3, 17408)],
    (32, 2): [Tile(64, 64, 4, 3, 42048, measured="1.402 ms, in 128 x 64, which spills")],
    (64, 2): [
        Tile(64, 128, 8, 3, 99392, only=ASYNC, measured="2.202 ms, by 4 warps, which spills"),
        Tile(64, 64, 8, 3, 50176, only=(8,)),
        Tile(64, 32, 4, 3, 46080),
    ],
    (128, 2): [Tile(64, 64, 8, 2, 131648, only=ASYNC), Tile(64, 64, 8, 2, 74240)],
    (256, 2): [Tile(32, 64, 8, 1, 98312, only=ASYNC), Tile(16, 32, 4, 1, 57344)],
    (16, 4): [Tile(32, 64, 4, 2, 19712)],
    (32, 4): [Tile(32, 64, 4, 2, 39168, only=(9,)), Tile(16, 32, 4, 2, 39168)],
    (64, 4): [Tile(16, 64, 8, 2, 63616, only=(9,)), Tile(16, 16, 4, 2, 63616)],
    (128, 4): [Tile(16, 16, 4, 1, 49152)],
    (256, 4): [Tile(16, 16, 4, 1, 98304)],
}


def causal_attention_plan(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    dtype: torch.dtype,
    window: int | None,
    device: Device,
    unmapped: str = "",
) -> Plan:
    """How causal_attention serves a call on a CUDA device. unmapped: see `unmapped`."""
    headdim, keys, refused = _common(q_shape, k_shape, dtype, window, device)
    if refused:
        return Plan(REFERENCE, refused)
    taken, remark = _cuda(q_shape, k_shape, dtype, device, unmapped)
    if taken:
        return Plan(SM90, remark, headdim=headdim, window=keys, optimistic=True)
    short = keys <= SHORT and (headdim, dtype.itemsize) in FORWARD_SHORT
    tile = fitting((FORWARD_SHORT if short else FORWARD)[headdim, dtype.itemsize], device)
    if tile is None:
        return Plan(REFERENCE, f"no block of headdim {headdim} in {dtype} fits the shared memory of this GPU")
    optimistic = dtype == torch.bfloat16
    tile = tile if optimistic else with_running_maximum(tile)
    why = _why(tile, "fixed reference maximum, checked" if optimistic else "running maximum", dtype, device)
    return Plan("Triton", why + remark, tile, headdim, keys, optimistic, device.precision)


def plan_of(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Plan:
    """causal_attention_plan of a call. Where k and v lie is looked at only if CUDA C++ is asked for."""
    device = device_facts(q.device)
    return causal_attention_plan(q.shape, k.shape, q.dtype, window, device, unmapped(k, v) if device.asked else "")


def causal_attention_backward_plan(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: torch.dtype, window: int | None, device: Device
) -> BackwardPlan:
    """How causal_attention_backward serves a call on a CUDA device."""
    headdim, keys, refused = _common(q_shape, k_shape, dtype, window, device)
    if refused:
        return BackwardPlan(REFERENCE, refused)
    dq, dkdv = (fitting(table[headdim, dtype.itemsize], device) for table in (BACKWARD_DQ, BACKWARD_DKDV))
    if dq is None or dkdv is None:
        return BackwardPlan(REFERENCE, f"no block of headdim {headdim} in {dtype} fits the shared memory of this GPU")
    why = f"dq in {_why(dq, 'no atomics', dtype, device)}; dk and dv in {_why(dkdv, 'no atomics', dtype, device)}"
    return BackwardPlan("Triton", why, dq, dkdv, headdim, keys, device.precision)


def causal_attention_decode_plan(
    q_shape: tuple[int, ...], cache_shape: tuple[int, ...], dtype: torch.dtype, window: int | None, device: Device
) -> DecodePlan:
    """How causal_attention_decode serves a call on a CUDA device: of shapes alone, so that it replays in a graph."""
    (batch, nheads, steps, headdim), (_, nheads_kv, capacity, _) = q_shape, cache_shape
    if refused := _refused(dtype, device):
        return DecodePlan(REFERENCE, refused)
    window = capacity - steps + 1 if window is None else window
    headdim = padded(headdim)
    rows = steps * nheads // max(1, nheads_kv)
    block_rows = min(64 if headdim <= 64 else 16, padded(rows))
    block_keys = min(128, (16384 if dtype.itemsize == 2 else 4096) // headdim)
    programs = max(1, batch * nheads_kv * -(-rows // block_rows))
    tiles = max(1, -(-min(capacity, window + steps - 1) // block_keys))
    splits = max(1, min(tiles, 2 * device.multiprocessors // programs, 8192 // headdim, 64))
    why = f"{splits} programs share the keys of a head, {block_rows} rows x {block_keys} keys at a time"
    return DecodePlan("Triton", why, block_rows, block_keys, 4, 2, splits, headdim, window, device.precision)


def unmapped(k: Tensor, v: Tensor) -> str:
    """Why tensor maps of the GPU do not take k and v as they lie in memory, or "".

    What they do not take goes to Triton: a copy would cost a launch and twice the bytes of k and v, and a model whose
    projections give rows of 16 bytes side by side does not come here.
    """
    for name, x in (("k", k), ("v", v)):
        strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
        if x.stride(3) != 1 or x.data_ptr() % 16 or any(n % 8 or not 0 < n < 1 << 39 for n in strides):
            return f"{name} has rows that are not dense, or not at multiples of 16 bytes, or more than once in memory"
    return ""


def fitting(tiles: list[Tile], device: Device) -> Tile | None:
    """The first of them that the device takes."""
    usable = (tile for tile in tiles if tile.shared <= device.shared_memory)
    return next((tile for tile in usable if not tile.only or device.capability in tile.only), None)


def with_running_maximum(tile: Tile) -> Tile:
    """`tile` for types whose reference maximum is not fixed: they need more registers than its limit leaves."""
    return tile._replace(polynomial=False, ones=False, maxnreg=None)


def padded(size: int) -> int:
    """The power of two >= 16 that holds `size`: what a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def device_facts(device: torch.device) -> Device:
    """The Device of a torch.device; an H100 where there is no GPU to ask."""
    asked = torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision = "bf16x3" if asked else "bf16x6"  # tf32 itself truncates: 200 times the error of bf16x3
    return (_of_gpu(device) if device.type == "cuda" else Device())._replace(precision=precision, asked=ASKED)


@lru_cache
def _of_gpu(device: torch.device) -> Device:
    facts = torch.cuda.get_device_properties(device)
    compiled = runs_on(facts.major, C.cuda_archs if C else ())
    return Device(facts.multi_processor_count, facts.shared_memory_per_block_optin, facts.major, compiled=compiled)


def runs_on(major: int, archs: tuple[str, ...]) -> bool:
    """Whether code for sm_90 and later among what was compiled for `archs` runs on a GPU of that major number."""
    for kind, number in (re.match(r"(sm|compute)_(\d+)", arch).groups() for arch in archs):
        if int(number) // 10 == major >= 9 or kind == "compute" and 9 <= int(number) // 10 <= major:
            return True
    return False


def _common(q_shape, k_shape, dtype, window, device) -> tuple[int, int, str]:
    """(padded headdim, window at most seqlen_k, why no kernel takes the call or "")."""
    seqlen_k = k_shape[2]
    keys = seqlen_k if window is None else min(window, seqlen_k)
    return padded(q_shape[3]), keys, _refused(dtype, device)


def _refused(dtype: torch.dtype, device: Device) -> str:
    """Why no kernel takes a call, or ""."""
    if device.capability < 8:  # no products of bfloat16, which float32 is split into; Triton asks for sm_80
        return f"sm_{device.capability}x is older than sm_80"
    return "float64 runs on the reference" if dtype == torch.float64 else ""


def _cuda(q_shape, k_shape, dtype, device, unmapped) -> tuple[bool, str]:
    """(whether CUDA C++ takes a call, how or, as an addition to another kernel's why, why not)."""
    (batch, _, seqlen_q, headdim), seqlen_k = q_shape, k_shape[2]
    if headdim not in (8, 16) or dtype != torch.bfloat16 or device.capability < 9:
        return False, ""
    if batch > 65535 or seqlen_q > 1 << 22 or seqlen_k > 1 << 30:
        unmapped = "the call is too large for its grid"
    if not device.asked:
        return False, "; AUDIOKERNELS_ATTENTION_CUDA=1 would ask for CUDA C++" if device.compiled else ""
    if not device.compiled or unmapped:
        return False, f"; CUDA C++ is asked for, but {unmapped or 'not compiled for this GPU'}"
    parts = ["AUDIOKERNELS_ATTENTION_CUDA asks for it", "128 x 256 blocks", "4 warps and one that loads"]
    return True, ", ".join([*parts, "fixed reference maximum, checked", "a quarter of the exponentials by polynomial"])


def _why(tile: Tile, scheme: str, dtype: torch.dtype, device: Device) -> str:
    parts = [f"{tile.block_m} x {tile.block_n} blocks", f"{tile.warps} warps", scheme]
    if dtype == torch.float32:
        parts.append(f"products in {device.precision}")
    if tile.polynomial:
        parts.append("a quarter of the exponentials by polynomial")
    return ", ".join(parts)

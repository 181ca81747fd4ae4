"""The Haar wavelet transform and its inverse, 8 levels: bytes a second beside copy_.

Bytes are the least there are: each tensor read or written once. Sides: haar_dwt and haar_idwt; the same in eager
torch; ptwt and pytorch_wavelets where they are importable, float32 only. Limit: copy_ of the same tensor. The ratio is
the rate as a share of copy_'s.
"""

import argparse

import common
import torch
from benchmark_haar_pool import BOUND, LEVELS, limits, wavelet_peers

from audiokernels import explain, haar_dwt, haar_idwt
from audiokernels.haar_dwt import haar_dwt_ref, haar_idwt_ref

NAME = "haar_dwt"


def shapes(device: str, quick: bool) -> list[tuple[int, int, int]]:
    if quick:
        return [(1, 256, 16), (16, 256, 16)]
    if device == "cpu":
        return [(64, 1792, 64), (32, 4096, 256)]  # beyond the caches
    return [(1, 16384, 64), (16, 4096, 64), (32, 4096, 256), (8, 16384, 512)]


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, clock: common.Clock, arguments: argparse.Namespace
) -> list[common.Row]:
    x = torch.randn(shape, device=arguments.device).to(dtype)
    coeffs, target = haar_dwt(x, LEVELS), torch.empty_like(x)
    want = haar_dwt_ref(x.double(), LEVELS)
    case = "x".join(map(str, shape))
    scale = float(want.abs().max())
    common.gate(f"haar_dwt, {case}, {dtype}", float((coeffs - want).abs().max()) / scale, 4 * BOUND[dtype])
    error = (haar_idwt(coeffs, LEVELS) - haar_idwt_ref(coeffs.double(), LEVELS)).abs().max()
    common.gate(f"haar_idwt, {case}, {dtype}", float(error) / scale, 4 * BOUND[dtype])
    sides = {
        "copy_": lambda: target.copy_(x),
        NAME: lambda: haar_dwt(x, LEVELS),
        "haar_idwt": lambda: haar_idwt(coeffs, LEVELS),
        "eager, forward": lambda: haar_dwt_ref(x, LEVELS),
        "eager, inverse": lambda: haar_idwt_ref(coeffs, LEVELS),
    }
    sides.update({name: (lambda f=f: f(x)) for name, f in wavelet_peers(x).items()})
    rounds, seconds = (3, 0.002) if arguments.quick else (9, 0.1)
    timings = common.interleave(sides, clock, rounds=rounds, seconds=seconds)
    rows = []
    for side, timing in timings.items():
        times = 2 if "DWT + IDWT" in side else 1
        work = 2 * times * x.numel() * x.element_size() / 1e9
        columns = {"dtype": str(dtype).removeprefix("torch."), "batch": shape[0]}
        columns["note"] = f"{1e3 * timing.median:.3g} ms"
        if side != "copy_":
            columns.update(ratio=times * timing.times_as_fast_as(timings["copy_"]), ratio_to="copy_")
        if side in (NAME, "haar_idwt"):
            share = 0.6 if arguments.device == "cpu" else 0.85
            columns.update(floor=share, goal=share)
            columns["note"] += f", {explain(side, x, LEVELS).kernel}"
        rows.append(common.rate_row(f"{case}, {LEVELS} levels", side, timing, work, "GB/s", **columns))
    return rows


def main() -> None:
    arguments = common.parser(__doc__).parse_args()
    clock = common.begin(arguments)
    rows = limits(clock, arguments)
    for shape in shapes(arguments.device, arguments.quick):
        for dtype in (torch.float32, torch.bfloat16):
            rows += measure(shape, dtype, clock, arguments)
    common.finish(NAME, rows, arguments)


if __name__ == "__main__":
    main()

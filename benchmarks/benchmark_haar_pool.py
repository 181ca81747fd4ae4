"""Haar pooling, forward and forward + backward: bytes a second beside copy_, in both modes and both plans.

Bytes are the least there are: x read and y written, twice with backward; a peer that moves more is charged for it.
Random data. Sides: haar_pool; the loop over levels in eager torch (block: means of views; causal: differences of
cumulative sums); that loop under torch.compile; and of ptwt and pytorch_wavelets, where they are importable, one
8-level transform and its inverse, which is what pooling by a wavelet library takes at least. Limit: copy_ of the same
tensor, twice for forward + backward. The ratio is our rate as a share of copy_'s.

On the CPU freed memory is kept for the next result: the page faults of fresh memory take more time than a copy ("copy
into new memory", limits). There the op and copy_ also run on two threads.

Not timed: haar_pool_ (see explain). --full adds the linear plan in causal mode; --size measures that one instead.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import common
import torch
from torch import Tensor

from audiokernels import explain, haar_levels, haar_pool

NAME = "haar_pool"
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
FORWARD, BOTH = "forward", "forward + backward"
LEVELS = 8  # of the wavelet libraries' transforms


class Case(NamedTuple):
    """One size, mode and plan; everything of it is measured in one run."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    mode: str
    plan: str

    def name(self, part: str) -> str:
        return f"{'x'.join(map(str, self.shape))}, {self.mode}, {self.plan}, {part}"


def shape_of(text: str) -> tuple[int, int, int]:
    batch, seqlen, dim = map(int, text.split("x"))
    return batch, seqlen, dim


def cases(device: str, quick: bool, full: bool, size: tuple[int, int, int] | None) -> list[Case]:
    shapes = [(64, 1600, 64), (32, 4096, 256), (8, 16384, 512)]
    if device == "cpu":
        shapes = shapes[:2]  # beyond the caches
    if quick:
        shapes = [(1, 200, 16), (16, 100, 16)]
    if size:
        shapes = [size]
    kinds = [("block", "dyadic"), ("block", "linear"), ("causal", "dyadic")]
    if full or quick:
        kinds.append(("causal", "linear"))
    types = (torch.float32, torch.bfloat16)
    return [Case(shape, dtype, *kind) for shape in shapes for kind in kinds for dtype in types]


def target(case: Case, device: str) -> float:
    """The share of copy_ that is asked for."""
    if device == "cpu":
        return 0.6
    return 0.75 if case.shape[1] < 2048 else 0.9 if case.mode == "block" else 0.8


# ---- sides


def level_loop(levels: Sequence[int], mode: str) -> Callable[[Tensor], Tensor]:
    """One level after another, as one writes it in torch."""
    members = [(level, levels.index(level), levels.count(level)) for level in dict.fromkeys(levels)]

    def block_means(x: Tensor, block: int) -> Tensor:
        batch, seqlen, dim = x.shape
        whole = seqlen // block * block
        means = x[:, :whole].reshape(batch, whole // block, block, dim).mean(2, keepdim=True)
        parts = [means.expand(-1, -1, block, -1).reshape(batch, whole, dim)]
        if whole < seqlen:
            parts.append(x[:, whole:].mean(1, keepdim=True).expand(-1, seqlen - whole, -1))
        return torch.cat(parts, 1)

    def windows(x: Tensor, block: int) -> Tensor:
        sums = x.float().cumsum(1)
        before = torch.nn.functional.pad(sums, (0, 0, block, 0))[:, : x.shape[1]]
        return ((sums - before) / block).to(x.dtype)

    def loop(x: Tensor) -> Tensor:
        parts = []
        for level, first, n in members:
            part = x[:, :, first : first + n]
            block = x.shape[1] if level < 0 else 1 << level
            parts.append(part if level == 0 else (block_means if mode == "block" else windows)(part, block))
        return torch.cat(parts, 2)

    return loop


def wavelet_peers(x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """{name: transform and inverse of (batch, seqlen, dim)} of the libraries that are here; float32 only."""
    sides: dict[str, Callable[[Tensor], Tensor]] = {}
    if x.dtype != torch.float32 or x.shape[1] % (1 << LEVELS):
        return sides
    if ptwt := common.optional("ptwt"):
        sides["ptwt, DWT + IDWT"] = lambda v: ptwt.waverec(
            ptwt.wavedec(v, "haar", level=LEVELS, mode="zero", axis=1), "haar", axis=1
        )
    if wavelets := common.optional("pytorch_wavelets"):
        forward = wavelets.DWT1DForward(J=LEVELS, wave="haar", mode="zero").to(x.device)
        inverse = wavelets.DWT1DInverse(wave="haar", mode="zero").to(x.device)
        sides["pytorch_wavelets, DWT + IDWT"] = lambda v: inverse(forward(v.transpose(1, 2))).transpose(1, 2)
    for name, side in sides.items():
        common.gate(f"{name} gives x back", float((side(x) - x).abs().max()), 1e-4)
    return sides


def check(case: Case, side: str, function: Callable[[Tensor], Tensor], levels: Sequence[int]) -> None:
    """Values and gradient against the loop in float64, on one sequence."""
    x = torch.randn(1, *case.shape[1:]).to(case.dtype)
    runs = {}
    for name, f, v in ((side, function, x), ("float64", level_loop(levels, case.mode), x.double())):
        v = v.requires_grad_()
        out = f(v)
        runs[name] = (
            out.detach().double(),
            torch.autograd.grad(out, v, torch.ones_like(out).cumsum(1) * 1e-3)[0].double(),
        )
    for got, want, part in zip(runs[side], runs["float64"], (FORWARD, BOTH), strict=True):
        error = (got - want).abs().max() / want.abs().max()
        slack = 100 if side != NAME else 4  # cumulative sums lose digits
        common.gate(f"{side}, {case.name(part)}, {case.dtype}", float(error), slack * BOUND[case.dtype])


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(function(x), x, grad)[0]


# ---- measuring


def measure(case: Case, threads: int, arguments: argparse.Namespace) -> list[common.Row]:
    torch.set_num_threads(threads)
    clock = common.clock_of(arguments.device, threads)
    levels = haar_levels(case.shape[2], case.shape[1], case.plan)
    x = torch.randn(case.shape, device=arguments.device).to(case.dtype)
    grad, target_tensor = torch.randn_like(x), torch.empty_like(x)
    loop = level_loop(levels, case.mode)
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        NAME: lambda v: haar_pool(v, levels=levels, mode=case.mode),
        "eager loop": loop,
    }
    check(case, NAME, sides[NAME], levels)
    check(case, "eager loop", loop, levels)
    if threads > 1:
        del sides["eager loop"]
    elif not arguments.quick and case.plan == "dyadic":
        torch._dynamo.reset()
        sides["torch.compile"] = torch.compile(loop)
    if case.mode == "block" and case.plan == "dyadic" and threads == 1:
        sides.update(wavelet_peers(x))

    rows = []
    rounds, seconds = (3, 0.002) if arguments.quick else (9, 0.1)
    for part in (FORWARD, BOTH):
        times = 1 if part == FORWARD else 2

        def copy(n: int = times) -> None:
            for _ in range(n):
                target_tensor.copy_(x)

        if part == FORWARD:
            calls = {name: (lambda f=f: f(x)) for name, f in sides.items()}
        else:
            leaf = x.detach().requires_grad_()
            calls = {name: gradient_of(f, leaf, grad) for name, f in sides.items()}
        timings = common.interleave({"copy_": copy, **calls}, clock, rounds=rounds, seconds=seconds)
        work = 2 * times * x.numel() * x.element_size() / 1e9
        kernel = explain(haar_pool, x, levels=levels, mode=case.mode).kernel
        for side, timing in timings.items():
            ours = side == NAME
            columns = {"dtype": str(case.dtype).removeprefix("torch."), "batch": case.shape[0], "threads": threads}
            columns["note"] = f"{1e3 * timing.median:.3g} ms" + (f", {kernel}" if ours else "")
            if side != "copy_":
                columns.update(ratio=timing.times_as_fast_as(timings["copy_"]), ratio_to="copy_")
            if ours:
                columns.update(floor=target(case, arguments.device), goal=target(case, arguments.device))
            rows.append(common.rate_row(case.name(part), side, timing, work, "GB/s", **columns))
    return rows


def limits(clock: common.Clock, arguments: argparse.Namespace) -> list[common.Row]:
    n_bytes = 1 << 22 if arguments.quick else 0
    rate = common.copy_rate(clock, arguments.device, n_bytes) / 1e9
    rows = [common.Row("limits", "copy, read and written", "GB/s", rate, clock=clock.name)]
    if arguments.device == "cpu":
        common.keep_freed_memory(False)
        x = torch.ones(max(1, (n_bytes or 1 << 27) // 4))
        timing = common.interleave({"clone": x.clone}, clock, rounds=5, seconds=0.02)["clone"]
        rows.append(common.rate_row("limits", "copy into new memory", timing, 8 * x.numel() / 1e9, "GB/s"))
        common.keep_freed_memory(True)
    return rows


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--full", action="store_true", help="the linear plan in causal mode too")
    parser.add_argument("--size", metavar="BxTxD", type=shape_of, help="only this one, such as 8x16384x512")
    arguments = parser.parse_args()
    clock = common.begin(arguments)
    rows = limits(clock, arguments)
    for case in cases(arguments.device, arguments.quick, arguments.full, arguments.size):
        for threads in (1, 2) if arguments.device == "cpu" else (1,):
            rows += measure(case, threads, arguments)
    common.finish(NAME, rows, arguments)


if __name__ == "__main__":
    main()

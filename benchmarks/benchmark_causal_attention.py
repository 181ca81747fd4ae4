"""Causal attention, forward and forward + backward: useful FLOP a second over the length, head size and window.

FLOPs are those of the pairs of a query and a key that it sees, 4 * headdim each, 3.5 times as many with backward; so a
peer that computes what a mask hides is charged for it. Random data. Sides: causal_attention; torch SDPA by backend
(flash, cuDNN, efficient, math; with a window a mask, so efficient and math only); on a GPU flex_attention, compiled,
and FlashAttention-4 where it is importable; where Triton serves and CUDA C++ could, the latter as a side of its own, as
a multiple of Triton. On the CPU one core, and SDPA as it chooses by itself. Limit: torch.mm.

The note of a row gives its error, the largest difference from float64 on 128 queries of one head, as a share of the
largest value; that of forward + backward is the gradient's of q. All gradients are checked in full at 300 positions.
--png draws the rates over the length.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from audiokernels import causal_attention, causal_attention_plan, explain
from audiokernels.causal_attention import visible_pairs

NAME = "causal_attention"
CUDA = "causal_attention, CUDA C++"  # asked for, where otherwise Triton serves
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.004}  # error, as a share of the largest value
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
FORWARD, BOTH = "forward", "forward + backward"
MASKED = "SDPA, masked"


class Case(NamedTuple):
    """One size; everything of it is measured in one run."""

    headdim: int
    seqlen: int
    batch: int
    nheads: int
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None

    def name(self, part: str) -> str:
        window = f", window {self.window}" if self.window else ""
        return f"headdim {self.headdim}, {self.seqlen} positions, {self.nheads} heads{window}, {part}"

    def flops(self, part: str) -> float:
        pairs = self.batch * self.nheads * visible_pairs(self.seqlen, self.seqlen, self.window)
        return 4 * self.headdim * pairs * (1 if part == FORWARD else 3.5)


# {(dtype, headdim, positions, window, part): (peer, its known TFLOP/s on an H100, floor, goal)}: compared as multiples
# of that peer in the same run
GPU_TARGETS = {
    ("bfloat16", 16, 16384, None, FORWARD): ("SDPA cuDNN", 117, 214, 260),
    ("bfloat16", 16, 16384, None, BOTH): ("SDPA cuDNN", 117, 208, 290),
    ("bfloat16", 32, 16384, None, FORWARD): ("SDPA cuDNN", 235, 361, 430),
    ("bfloat16", 32, 16384, None, BOTH): ("SDPA cuDNN", 233, 315, 420),
    ("bfloat16", 64, 16384, None, FORWARD): ("SDPA cuDNN", 455, 485, 540),
    ("bfloat16", 64, 16384, None, BOTH): ("SDPA cuDNN", 437, 420, 530),
    ("bfloat16", 128, 16384, None, FORWARD): ("SDPA cuDNN", 598, None, 600),
    ("bfloat16", 128, 16384, None, BOTH): ("SDPA cuDNN", 548, None, 560),
    ("bfloat16", 16, 1600, None, FORWARD): ("SDPA cuDNN", 85, 159, 200),
    ("bfloat16", 32, 1600, None, FORWARD): ("SDPA cuDNN", 173, 266, 290),
    ("bfloat16", 16, 16384, 1024, FORWARD): ("flex_attention", 101, 150, 210),
    ("bfloat16", 32, 16384, 1024, FORWARD): ("flex_attention", 175, 250, 300),
    ("bfloat16", 64, 16384, 1024, FORWARD): ("flex_attention", 272, 351, 400),
    ("float32", 16, 4096, None, FORWARD): ("SDPA efficient", 9.5, 38, 48),
    ("float32", 32, 4096, None, FORWARD): ("SDPA efficient", 18.8, 52, 70),
    ("float32", 64, 4096, None, FORWARD): ("SDPA efficient", 32, 57, 80),
}
FA4_OVER_CUDNN = {  # (headdim, positions): forward, forward + backward, as known of an H100
    (16, 16384): (1.65, 1.90),
    (32, 16384): (1.51, 1.57),
    (64, 16384): (1.16, 1.19),
    (128, 16384): (1.13, 1.15),
    (16, 1600): (1.25, 1.55),
    (32, 1600): (1.11, 1.40),
    (64, 1600): (0.94, 1.13),
}
CUDA_TARGET = 1.1  # times Triton, forward, where CUDA C++ is to be taken unasked
CPU_TARGETS = {16: 2.5, 32: 2.0, 64: 1.5}  # {headdim: times SDPA, float32, one core}
CPU_WINDOW_TARGET = 16  # times the faster of causal and masked SDPA, headdim 16, window 1024 of 16384


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        fp32, bf16 = torch.float32, torch.bfloat16
        if quick:
            return [Case(16, 300, 1, 1, fp32), Case(16, 200, 16, 1, bf16), Case(16, 400, 1, 1, fp32, 100)]
        sizes = [Case(d, n, 1, 1, fp32) for d in (16, 32, 64) for n in (1600, 4096)]
        sizes += [Case(16, 16384, 1, 1, fp32), *(Case(d, 4096, 1, 1, bf16) for d in (16, 32, 64))]
        return [*sizes, Case(16, 512, 16, 2, fp32), Case(16, 512, 16, 2, bf16), Case(16, 16384, 1, 1, fp32, 1024)]
    shapes = [(16384, 2, 8), (1600, 32, 8), (4096, 8, 8)]
    if quick:
        shapes = [(1600, 1, 2), (1600, 16, 2)]
    sizes = [Case(d, n, b, h) for n, b, h in shapes for d in (16, 32, 64, 128)]
    sizes += [Case(d, shapes[0][0], *shapes[0][1:], window=1024) for d in (16, 32, 64)]
    sizes += [Case(d, min(4096, shapes[0][0]), 8, 8, torch.float32) for d in (16, 32, 64)]
    return sizes if quick else [*sizes, *(Case(d, 65536, 1, 4) for d in (16, 32))]


# ---- sides


def sdpa(case: Case, backend: SDPBackend | None, mask: Tensor | None) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    return attend


def flex(case: Case) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k > q - (case.window or case.seqlen))

    mask = create_block_mask(seen, None, None, case.seqlen, case.seqlen, device="cuda")
    return partial(compiled_flex(), block_mask=mask)


@lru_cache
def compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache
def flash_attention_4() -> Callable | None:
    module = common.optional("flash_attn.cute")
    return module and module.flash_attn_func


def fa4(case: Case) -> Attention:
    window = (case.window - 1, 0) if case.window else (None, None)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attention_4()(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, window_size=window)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


@contextmanager
def cuda_asked_for() -> Iterator[None]:
    """As AUDIOKERNELS_ATTENTION_CUDA=1 does for a process."""
    before, causal_attention_plan.ASKED = causal_attention_plan.ASKED, True
    try:
        yield
    finally:
        causal_attention_plan.ASKED = before


def by_cuda(case: Case, inputs: list[Tensor]) -> dict[str, Attention]:
    """The CUDA C++ kernel as a side of its own where it takes the case and would not be taken unasked."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with cuda_asked_for():
            return causal_attention(q, k, v, window=case.window)

    with cuda_asked_for():
        taken = explain(causal_attention, *inputs, window=case.window).kernel
    unasked = explain(causal_attention, *inputs, window=case.window).kernel
    return {CUDA: attend} if taken == causal_attention_plan.SM90 != unasked else {}


def peers(case: Case, device: str) -> dict[str, Attention]:
    mask = None
    if case.window:
        row, key = torch.arange(case.seqlen, device=device)[:, None], torch.arange(case.seqlen, device=device)
        mask = (key <= row) & (key > row - case.window)
    if device == "cpu":
        sides = {"SDPA": sdpa(case, None, None)}
        return sides | ({MASKED: sdpa(case, None, mask)} if case.window else {})
    wide = case.seqlen > 16384 or case.seqlen > 4096 and case.batch * case.nheads > 4
    backends = {name: backend for name, backend in BACKENDS.items() if name != "SDPA math" or not wide}
    if case.window:
        backends = {name: backends[name] for name in ("SDPA efficient", "SDPA math") if name in backends}
    sides = {name: sdpa(case, backend, mask) for name, backend in backends.items()}
    if case.dtype != torch.float32:
        sides["flex_attention"] = flex(case)
        if flash_attention_4() is not None:
            sides["FlashAttention-4"] = fa4(case)
    return sides


# ---- correct first


def tensors(case: Case, device: str) -> list[Tensor]:
    """q, k, v and the gradient of the result."""
    g = torch.Generator(device).manual_seed(0)
    shape = (case.batch, case.nheads, case.seqlen, case.headdim)
    return [torch.randn(shape, generator=g, device=device).to(case.dtype) for _ in range(4)]


def rows_in_float64(case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some queries of the first head, what they should give, and what the gradient of q there should be."""
    rows = torch.linspace(0, case.seqlen - 1, min(128, case.seqlen), device=q.device).round().long()
    q, k, v, grad = (x[0, 0].detach().double() for x in (q, k, v, grad))
    key, own = torch.arange(case.seqlen, device=q.device), rows[:, None]
    seen = (key <= own) & (key > own - (case.window or case.seqlen))
    p = (q[rows] @ k.T * case.headdim**-0.5).masked_fill(~seen, -torch.inf).softmax(1)
    dp = grad[rows] @ v.T
    dq = case.headdim**-0.5 * (p * (dp - (p * dp).sum(1, keepdim=True))) @ k
    return rows, p @ v, dq


def share(result: Tensor, right: Tensor) -> float:
    return float((result.double() - right).abs().max() / right.abs().max())


def check_gradients(case: Case, device: str) -> None:
    """All gradients, on a short piece."""
    small = case._replace(seqlen=min(300, case.seqlen), batch=1, nheads=2, window=case.window and 100)
    *inputs, grad = tensors(small, device)
    inputs = [x.requires_grad_() for x in inputs]
    results = torch.autograd.grad(causal_attention(*inputs, window=small.window), inputs, grad)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    key = torch.arange(small.seqlen, device=device)
    seen = (key <= key[:, None]) & (key > key[:, None] - (small.window or small.seqlen))
    out = F.scaled_dot_product_attention(*exact, attn_mask=seen)
    for which, result, right in zip("qkv", results, torch.autograd.grad(out, exact, grad.double()), strict=True):
        common.gate(f"gradient of {which}, {case.name(BOTH)}", share(result, right), 2 * BOUNDS[case.dtype])


# ---- then time


def measure(case: Case, arguments: argparse.Namespace) -> list[common.Row]:
    device = arguments.device
    *inputs, grad = tensors(case, device)
    inputs = [x.requires_grad_() for x in inputs]
    rows, out, dq = rows_in_float64(case, *inputs, grad)
    check_gradients(case, device)
    ours = {NAME: partial(causal_attention, window=case.window), **by_cuda(case, inputs)}
    sides = ours | peers(case, device)
    calls: dict[str, dict[str, Callable]] = {FORWARD: {}, BOTH: {}}
    errors: dict[str, dict[str, float]] = {FORWARD: {}, BOTH: {}}

    def forward(attend: Attention) -> Tensor:
        with torch.no_grad():
            return attend(*inputs)

    def both(attend: Attention) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*inputs), inputs, grad)

    for name, attend in sides.items():
        try:
            errors[FORWARD][name] = share(forward(attend)[0, 0, rows], out)
            calls[FORWARD][name] = partial(forward, attend)
            if name == MASKED:
                continue  # its backward takes minutes
            errors[BOTH][name] = share(both(attend)[0][0, 0, rows], dq)
            calls[BOTH][name] = partial(both, attend)
        except RuntimeError as error:  # a backend that does not take this size
            if name in ours:
                raise
            print(f"not timed: {name}, {case}: {str(error).splitlines()[0][:160]}")
    for part in (FORWARD, BOTH):
        bound = BOUNDS[case.dtype] * (1 if part == FORWARD else 2)
        for name in ours:
            common.gate(f"{name}, {case.name(part)}", errors[part][name], bound)
    times = {}
    rounds, seconds = (2, 0.002) if arguments.quick else (5, 0.05)
    for part, members in calls.items():
        timed = common.interleave(members, common.clock_of(device), rounds=rounds, seconds=seconds)
        times |= {(part, name): timing for name, timing in timed.items()}
    scale, unit = (1e12, "TFLOP/s") if device == "cuda" else (1e9, "GFLOP/s")
    result = []
    for (part, name), timing in times.items():
        dtype = str(case.dtype).removeprefix("torch.")
        work = case.flops(part) / scale
        row = common.rate_row(case.name(part), name, timing, work, unit, dtype=dtype, batch=case.batch)
        row.note = f"{1e3 * timing.median:.3g} ms, error {errors[part][name]:.1e}"
        if name == NAME:
            others = {other: times[part, other] for other in sides if (part, other) in times and other not in ours}
            judge(row, case, part, timing, others, device)
            row.note = f"{explain(causal_attention, *inputs, window=case.window).kernel}, {row.note}"
        elif name == CUDA:
            row.ratio, row.ratio_to = timing.times_as_fast_as(times[part, NAME]), NAME
            row.floor = row.goal = CUDA_TARGET if part == FORWARD else None
        result.append(row)
    return result


def judge(
    row: common.Row, case: Case, part: str, timing: common.Timing, others: dict[str, common.Timing], device: str
) -> None:
    """Our row's ratio to a peer of this run, with floor and goal where there are some."""
    if device == "cpu":
        row.ratio_to = min(others, key=lambda name: others[name].median)
        row.ratio = timing.times_as_fast_as(others[row.ratio_to])
        if case.dtype == torch.float32 and case.batch == 1:
            target = CPU_WINDOW_TARGET if case.window and part == FORWARD else CPU_TARGETS[case.headdim]
            row.floor = row.goal = target
        return
    key = (row.dtype, case.headdim, case.seqlen, case.window, part)
    peer, known, floor, goal = GPU_TARGETS.get(key, (None, None, None, None))
    peer = peer if peer in others else min(others, key=lambda name: others[name].median, default=None)
    if peer is not None:
        row.ratio, row.ratio_to = timing.times_as_fast_as(others[peer]), peer
    if known and GPU_TARGETS[key][0] == peer:
        row.floor, row.goal = floor and floor / known, goal / known
    elsewhere = FA4_OVER_CUDNN.get((case.headdim, case.seqlen))
    if elsewhere and not case.window and case.dtype == torch.bfloat16:
        row.note += f"; FlashAttention-4 was {elsewhere[part == BOTH]} times cuDNN on an H100"


def write_lines(path: Path, title: str, rows: list[common.Row]) -> None:
    """A picture: the rates over the length, one panel a head size and part, one line a side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if "positions" in row.case and row.batch:
            head, length, _, *rest = row.case.split(", ")
            where = panels.setdefault(", ".join([head, row.dtype, *rest]), {})
            where.setdefault(row.side, []).append((int(length.split()[0]), row.median))
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(4 * across, 3 * down), squeeze=False, layout="constrained")
    for axis, (name, sides) in zip(axes.flat, sorted(panels.items()), strict=False):
        for side, points in sides.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=side)
        axis.set(xscale="log", ylim=(0, None), xlabel="positions", ylabel=rows[0].unit)
        axis.set_title(name, fontsize=9)
        axis.legend(fontsize=6)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = common.parser(__doc__).parse_args()
    picture, arguments.png = arguments.png, None
    clock = common.begin(arguments)
    rows = [row for case in cases(arguments.device, arguments.quick) for row in measure(case, arguments)]
    scale, unit = (1e12, "TFLOP/s") if arguments.device == "cuda" else (1e9, "GFLOP/s")
    for dtype in (torch.float32, torch.bfloat16):
        rate = common.mm_rate(clock, arguments.device, dtype, 256 if arguments.quick else 0) / scale
        name = str(dtype).removeprefix("torch.")
        rows.append(common.Row("limits", "torch.mm", unit, rate, dtype=name, clock=clock.name))
    common.finish(NAME, rows, arguments)
    if picture:
        write_lines(picture, f"{NAME}, {common.device_name(arguments.device)}, torch {torch.__version__}", rows)
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()

"""Cost of one haar_pool_update call, dyadic plan, norm "count": the whole public function.

Sides: the op; its reference in plain torch; and without any state the mean over the last steps of every level, of kept
rows, which reads the windows anew at every step. The ratio is to the latter. Limit: a copy.
"""

import argparse

import common
import torch
from benchmark_haar_pool import BOUND, limits
from torch import Tensor

from audiokernels import explain, haar_levels, haar_pool, haar_pool_state, haar_pool_update
from audiokernels.haar_levels import level_runs
from audiokernels.haar_pool_update import haar_pool_update_ref

NAME = "haar_pool_update"


def measure(dim: int, batch: int, dtype: torch.dtype, arguments: argparse.Namespace) -> list[common.Row]:
    steps = 2 * dim
    levels = haar_levels(dim, 16 * dim)
    runs = level_runs(levels, dim, None)
    kept = torch.randn(batch, steps, dim, device=arguments.device).to(dtype)
    members = [(level, levels.index(level), levels.count(level)) for level in dict.fromkeys(levels)]

    def windows_anew() -> Tensor:
        return torch.cat(
            [kept[:, -(1 << level) if level >= 0 else 0 :, first : first + n].mean(1) for level, first, n in members],
            1,
        )

    want = haar_pool(kept.double(), levels=levels, mode="causal", norm="count")[:, -1]
    states, position = {}, torch.zeros(batch, dtype=torch.int32, device=arguments.device)
    for side, step in (
        (NAME, lambda x, s: haar_pool_update(x, s, position, levels=levels, norm="count")),
        ("reference", lambda x, s: haar_pool_update_ref(x, s, position, runs, count=True)),
    ):
        states[side] = haar_pool_state(batch, dim, levels=levels, dtype=dtype, device=arguments.device)
        position.zero_()
        for t in range(steps):
            out = step(kept[:, t], states[side])
            position.add_(1)
        common.gate(f"{side}, {dim} channels, {dtype}", float((out - want).abs().max()), 8 * BOUND[dtype])
    common.gate("windows anew", float((windows_anew() - want).abs().max()), 32 * BOUND[dtype])

    def moving(step):
        def call():
            step()
            position.add_(1).bitwise_and_(0xFFFF)  # of every 2^l steps, one ends a block

        return call

    x = kept[:, 0].contiguous()
    sides = {
        NAME: moving(lambda: haar_pool_update(x, states[NAME], position, levels=levels, norm="count")),
        "reference": moving(lambda: haar_pool_update_ref(x, states["reference"], position, runs, count=True)),
        "windows anew": windows_anew,
    }
    rounds, seconds = (3, 0.002) if arguments.quick else (15, 0.05)
    with torch.inference_mode():
        timings = common.interleave(sides, common.clock_of(arguments.device), rounds=rounds, seconds=seconds)
    rows = []
    for side, timing in timings.items():
        columns = {"dtype": str(dtype).removeprefix("torch."), "batch": batch}
        columns.update(ratio=timing.times_as_fast_as(timings["windows anew"]), ratio_to="windows anew")
        if side == NAME:
            columns.update(floor=1.0, goal=3.0)
            columns["note"] = explain(NAME, x, states[NAME], position, levels=levels, norm="count").kernel
        rows.append(common.time_row(f"{dim} channels", side, timing, **columns))
    return rows


def main() -> None:
    arguments = common.parser(__doc__).parse_args()
    clock = common.begin(arguments)
    rows = limits(clock, arguments)
    for dim in (16,) if arguments.quick else (64, 512):
        for batch in (1, 16):
            for dtype in (torch.float32, torch.bfloat16):
                rows += measure(dim, batch, dtype, arguments)
    common.finish(NAME, rows, arguments)


if __name__ == "__main__":
    main()

"""Cost of one dilated_conv_update call: the whole public function, width 2, dilation 16.

Sides, on the same weights: the kernel; torch.mv (torch.mm from batch 2 on) of the same (dim, 2 dim) matrix, which keeps
no ring and adds no bias; the reference in plain torch; and nn.functional.conv1d over the 17 inputs that one output
sees, which is what a step costs without a ring. Limit: at 64 channels and batch 1 at most 3.5 times torch.mv.
"""

import argparse

import common
import torch
from torch import Tensor
from torch.nn import functional as F

from audiokernels import dilated_conv_update, explain
from audiokernels.dilated_conv_update import dilated_conv_update_ref

DILATION, MV_LIMIT = 16, 3.5
BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def tensors(dim: int, batch: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def rn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g)).to(device, dtype)

    return {
        "x": rn(batch, dim),
        "conv_state": rn(batch, DILATION, dim),
        "weight": rn(dim, dim, 2, scale=(2 * dim) ** -0.5),
        "bias": rn(dim),
        "position": torch.zeros(batch, dtype=torch.int32, device=device),
    }


def measure(dim: int, batch: int, dtype: torch.dtype, arguments: argparse.Namespace) -> list[common.Row]:
    t = tensors(dim, batch, dtype, arguments.device)
    window = torch.cat([t["conv_state"], t["x"][:, None]], 1).transpose(1, 2).contiguous()
    matrix, inputs = t["weight"].flatten(1), torch.randn(batch, 2 * dim, device=arguments.device).to(dtype)
    vector, columns = inputs[0].contiguous(), inputs.T.contiguous()

    def conv1d() -> Tensor:
        return F.conv1d(window, t["weight"], t["bias"], dilation=DILATION)

    expected = F.conv1d(window.double(), t["weight"].double(), t["bias"].double(), dilation=DILATION)[:, :, 0]
    for name, function in (("kernel", dilated_conv_update), ("reference", dilated_conv_update_ref)):
        fresh = {k: v.clone() for k, v in t.items()}
        error = (function(**fresh, dilation=DILATION).double() - expected).abs().max()
        scale = max(1.0, float(expected.abs().max()))
        common.gate(f"{name}, {dim} channels, batch {batch}, {dtype}", float(error) / scale, BOUND[dtype])

    product = "torch.mv" if batch == 1 else "torch.mm"
    sides = {
        "dilated_conv_update": lambda: dilated_conv_update(**t, dilation=DILATION),
        product: (lambda: torch.mv(matrix, vector)) if batch == 1 else (lambda: torch.mm(matrix, columns)),
        "reference": lambda: dilated_conv_update_ref(**t, dilation=DILATION),
        "conv1d, no ring": conv1d,
    }
    rounds, seconds = (3, 0.002) if arguments.quick else (25, 0.02)
    times = common.interleave(sides, common.clock_of(arguments.device), rounds=rounds, seconds=seconds)
    shared = {"dtype": str(dtype).removeprefix("torch."), "batch": batch}
    rows = []
    for name, timing in times.items():
        row = common.time_row(f"{dim} -> {dim} channels", name, timing, **shared)
        if name != product:
            row.ratio, row.ratio_to = timing.times_as_fast_as(times[product]), product
        if name == "dilated_conv_update":
            row.note = explain(dilated_conv_update, **t, dilation=DILATION).kernel
            if (dim, batch, arguments.device) == (64, 1, "cpu"):
                row.floor = row.goal = round(1 / MV_LIMIT, 3)
                row.note += f"; {1 / row.ratio:.2f} times the time of torch.mv, limit {MV_LIMIT}"
        rows.append(row)
    return rows


def main() -> None:
    arguments = common.parser(__doc__).parse_args()
    clock = common.begin(arguments)
    rows = []
    with torch.inference_mode():
        for dim in (16, 64, 256, 512):
            for batch in (1, 16):
                for dtype in (torch.float32, torch.bfloat16):
                    rows += measure(dim, batch, dtype, arguments)
        rows += [
            common.Row("limits", "copy, read and written", "GB/s",
                       common.copy_rate(clock, arguments.device) / 1e9, clock=clock.name),
            common.Row("limits", "torch.mm", "GFLOP/s",
                       common.mm_rate(clock, arguments.device) / 1e9, dtype="float32", clock=clock.name),
        ]  # fmt: skip
    common.finish("dilated_conv_update", rows, arguments)


if __name__ == "__main__":
    main()

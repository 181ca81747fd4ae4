"""AudioTransformer, the large model with Haar pooling after every layer: forward + backward beside plain PyTorch.

Random seconds of audio; the loss's gradient for every parameter. Sides: audiomodels' model, in which haar_pool is this
project's kernel; the same weights in plain PyTorch, with the levels pooled by views and means; each of them under
torch.compile; and the model without Haar pooling. Ratios are multiples of plain eager PyTorch in the same run. All but
haar_pool is torch's in all of them, so what can be gained or lost is haar_pool's part: its six calls, forward +
backward, are timed beside the step that they are a part of. The goal is at most 3 % of it (33 times as fast).

bfloat16 is autocast. Limit: torch.mm, in which a step spends most of its time; the FLOPs are counted by torch.
"""

import argparse
from collections.abc import Callable
from types import ModuleType

import common
import torch
from benchmark_haar_pool import level_loop
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from audiokernels import explain, haar_levels, haar_pool

NAME = "audio_transformer"
PLAIN = "plain PyTorch"
POOLS = "haar_pool of all layers"
LEAST = 1 / 0.03  # a step's time over haar_pool's
N_CLASS = 200


class Plain(nn.Module):
    """The layers of an AudioTransformer, with Haar pooling in torch's own words."""

    def __init__(self, model: nn.Module, positions: Callable[[int, int], Tensor]):
        super().__init__()
        self.model = model
        config = model.config
        self.n_token = config.sample_rate // config.patch
        self.register_buffer("places", positions(self.n_token, config.n_embd))
        self.pool = level_loop(haar_levels(config.n_embd, self.n_token), "block")

    def forward(self, audio: Tensor) -> Tensor:
        model = self.model
        x = model.embed(model.filters(audio.unflatten(1, (self.n_token, -1))).relu()) + self.places
        for block in model.blocks:
            x = self.pool(block(x))
        return model.head(model.norm(x.mean(1)))


def step_of(model: nn.Module, audio: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """One step's work but for the optimizer: the gradient of the loss for every parameter."""
    parameters = list(model.parameters())

    def step() -> tuple[Tensor, ...]:
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(audio)
        return torch.autograd.grad(nn.functional.binary_cross_entropy_with_logits(logits.float(), labels), parameters)

    return step


def pools_of(config: object, batch: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Callable[[], None]]:
    """(its input, what haar_pool does in one step: forward + backward of every layer)."""
    n_token = config.sample_rate // config.patch
    levels = haar_levels(config.n_embd, n_token)
    x = torch.randn(batch, n_token, config.n_embd, device=device).to(dtype).requires_grad_()
    grad = torch.randn_like(x)

    def pools() -> None:
        for _ in range(config.n_layer):
            torch.autograd.grad(haar_pool(x, levels=levels), x, grad)

    return x, pools


def check(sides: dict[str, Callable[[], tuple[Tensor, ...]]], reference: str, bound: float) -> None:
    """The gradient of all parameters together against plain PyTorch's: the difference's norm over its norm."""
    want = torch.cat([part.flatten() for part in sides[reference]()])
    for side, step in sides.items():
        found = torch.cat([part.flatten() for part in step()])
        common.gate(f"{side}, gradient", float((found - want).norm() / want.norm()), bound)


def measure(transformer: ModuleType, batch: int, dtype: torch.dtype, arguments: argparse.Namespace) -> list[common.Row]:
    device, name = arguments.device, str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    sizes = {"n_filter": 64, "n_embd": 16, "n_hidden": 16, "n_layer": 2} if arguments.quick else {}
    config = transformer.AudioTransformerConfig(n_class=N_CLASS, haar="every", **sizes)
    ours = transformer.AudioTransformer(config).to(device)
    without = transformer.AudioTransformer(transformer.AudioTransformerConfig(n_class=N_CLASS, **sizes)).to(device)
    plain = Plain(ours, transformer.positions).to(device)
    audio = 0.1 * torch.randn(batch, config.sample_rate, device=device)
    labels = (torch.rand(batch, N_CLASS, device=device) < 0.02).float()

    modules = {PLAIN: plain, NAME: ours}
    if not arguments.quick and batch == 64 and dtype == torch.float32:  # it compiles for a minute
        torch._dynamo.reset()
        modules |= {f"{side}, torch.compile": torch.compile(module) for side, module in list(modules.items())}
    sides = {side: step_of(module, audio, labels, dtype) for side, module in modules.items()}
    check(sides, PLAIN, 1e-4 if dtype == torch.float32 else 0.1)
    sides["without Haar"] = step_of(without, audio, labels, dtype)
    rounds, seconds = (3, 0.002) if arguments.quick else (7, 0.1)
    clock = common.clock_of(device)
    x, pools = pools_of(config, batch, dtype, device)
    timings = common.interleave({**sides, POOLS: pools}, clock, rounds=rounds, seconds=seconds)

    with FlopCounterMode(display=False) as counter:
        sides[NAME]()
    kernel = explain(haar_pool, x, levels=haar_levels(config.n_embd, x.shape[1])).kernel
    case, columns = "forward + backward", {"dtype": name, "batch": batch}
    rows = []
    for side in sides:
        timing = timings[side]
        note = f"{1e3 * timing.median:.3g} ms, {counter.get_total_flops() / timing.median / 1e9:.3g} GFLOP/s"
        if side == NAME:
            note += f", {kernel}"
        ratio = timing.times_as_fast_as(timings[PLAIN])
        rows.append(
            common.rate_row(case, side, timing, batch, "crops/s", ratio=ratio, ratio_to=PLAIN, note=note, **columns)
        )
    share = 1 / timings[POOLS].times_as_fast_as(timings[NAME])
    rows.append(common.time_row(case, POOLS, timings[POOLS], "ms", ratio=1 / share, ratio_to="in a step", floor=LEAST,
                                goal=LEAST, note=f"{100 * share:.2f} % of a step", **columns))  # fmt: skip
    rows[1].floor = rows[1].goal = 1.0  # no slower than plain PyTorch
    return rows


def main() -> None:
    arguments = common.parser(__doc__).parse_args()
    clock = common.begin(arguments)
    models = common.optional("audiomodels.audio_transformer")
    if models is None:
        raise SystemExit("this benchmark times a model of audiomodels: pip install 'audiokernels[models]'")
    size = 256 if arguments.quick else 0
    rate = common.mm_rate(clock, arguments.device, size=size) / 1e9
    rows = [common.Row("limits", "mm", "GFLOP/s", rate, dtype="float32", clock=clock.name)]
    cases = [(64, torch.float32), (64, torch.bfloat16), (1, torch.float32)]
    if arguments.quick:
        cases = [(1, torch.float32), (16, torch.bfloat16)]
    for batch, dtype in cases:
        rows += measure(models, batch, dtype, arguments)
    common.finish(NAME, rows, arguments)


if __name__ == "__main__":
    main()

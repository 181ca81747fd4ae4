"""Sample-level transformer generation, samples a second: the fused kernel beside plain PyTorch.

The models: 128 channels, a window of 1600 samples, an MLP of 512, 256 classes, rotary positions; 3 layers of 4 heads
and 8 layers of 8; random weights at which signals keep their size through the layers. The window is full. One core.

Sides: transformer_generate with float32, bfloat16 and int8 packs (cache float32, bfloat16, bfloat16), and float32 over
a bfloat16 cache; an eager ring of keys and values, and the same with its layers under torch.compile
(audiomodels.peers). Samples are those of all streams together; ratios are multiples of the eager ring in the same batch
and run. Limits in the same table: reading the pack and the cache once a sample, torch.mm, a large copy. At batch 1 the
reading limit is also given as a multiple of the eager ring: a target above it cannot be met on this machine by any
kernel that reads them.

On a GPU the other sides are one step of PyTorch in bfloat16: eager, replayed as a CUDA graph, and compiled before that;
ratios are multiples of the last.
"""

import argparse
from collections.abc import Callable

import common
import torch
import transformer_peers
import wavenet_peers
from torch import Tensor

from audiokernels import (
    TransformerPack,
    explain,
    philox_uniform,
    transformer_generate,
    transformer_pack,
    transformer_state,
)
from audiokernels.backends import REFERENCE
from audiokernels.transformer_generate import transformer_generate_ref

N_EMBD, WINDOW, N_CLASS = 128, 1600, 256
MODELS = {"3 layers, 4 heads": (3, 4), "8 layers, 8 heads": (8, 8)}
MIXED = "float32, bfloat16 cache"
DTYPES = {"float32": torch.float32, MIXED: torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
BOUNDS = {"float32": 1e-5, MIXED: 0.01, "bfloat16": 0.03, "int8": 0.06}  # of the largest logit of the float32 reference
HEADER = 16  # numbers of a state before the rings
EDGE = 2.0**-14  # a draw may differ where the uniform number lies this close to an edge of the CDF
TARGETS = {  # multiples of the eager ring on one core at batch 1
    ("3 layers, 4 heads", "float32"): 5,
    ("3 layers, 4 heads", MIXED): 5,
    ("3 layers, 4 heads", "bfloat16"): 8,
    ("8 layers, 8 heads", "float32"): 6,
    ("8 layers, 8 heads", MIXED): 6,
    ("8 layers, 8 heads", "bfloat16"): 10,
}
GPU_TARGETS = {"3 layers, 4 heads": 64_000, "8 layers, 8 heads": 32_000}  # samples/s of an H100 at batch 1
GRAPH = "PyTorch, compiled, CUDA graph"
EAGER, COMPILED = "eager ring of keys and values", "the same, torch.compile"


def standard_weights(n_layer: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    e = N_EMBD

    def linear(name: str, rows: int, columns: int, *layers: int, gain: float = 1.0) -> dict[str, Tensor]:
        weight = gain * columns**-0.5 * torch.randn(*layers, rows, columns, generator=g)
        return {f"{name}_weight": weight, f"{name}_bias": 0.1 * torch.randn(*layers, rows, generator=g)}

    weights = {"embedding": torch.randn(N_CLASS, e, generator=g)}
    for name, shape in (("norm1", (n_layer, e)), ("norm2", (n_layer, e)), ("norm", (e,))):
        weights |= {f"{name}_weight": torch.ones(shape), f"{name}_bias": torch.zeros(shape)}
    weights |= linear("qkv", 3 * e, e, n_layer) | linear("proj", e, e, n_layer)
    return (
        weights
        | linear("up", 4 * e, e, n_layer)
        | linear("down", e, 4 * e, n_layer)
        | linear("out", N_CLASS, e, gain=3)
    )


class Bench:
    """The packs of one model, and its rows."""

    def __init__(self, name: str, arguments: argparse.Namespace, clock: common.Clock):
        (n_layer, self.n_head), self.name = MODELS[name], name
        self.device, self.quick, self.clock = arguments.device, arguments.quick, clock
        self.weights = {k: v.to(self.device) for k, v in standard_weights(n_layer).items()}
        self.window = 64 if self.quick else WINDOW
        self.packs = {
            dtype_name: transformer_pack(self.weights, n_head=self.n_head, window=self.window, dtype=dtype)
            for dtype_name, dtype in DTYPES.items()
        }
        self.packs[MIXED] = self.packs[MIXED].with_cache(torch.bfloat16)
        told = self.explain("float32")
        self.slow = told.kernel == REFERENCE
        if self.slow:
            print(f"transformer_generate on {self.device} takes the {told.kernel}: {told.why}")
        self.n = 4 if self.quick or self.slow else 64 if self.device == "cpu" else 2048  # samples a call
        self.rounds, self.seconds = (2, 0.01) if self.quick else (9, 0.2)
        self.peers = common.optional("audiomodels.peers")

    def uniforms(self, batch: int, n: int, seed: int = 0) -> Tensor:
        return philox_uniform(seed, batch, n).to(self.device)

    def explain(self, dtype: str, batch: int = 1):
        pack = self.packs[dtype]
        return explain(transformer_generate, pack, transformer_state(pack, batch), self.uniforms(batch, 1))

    # ---- correct first

    def check(self) -> None:
        batch, n = 2, 24 if self.quick else 100
        uniforms, exact = self.uniforms(batch, n), self.packs["float32"]
        codes = transformer_generate(exact, transformer_state(exact, batch), uniforms)
        common.gate("draws visit fewer than 10 codes", 10 / len(codes.unique()), 1.0)
        state = transformer_state(exact, batch)
        expected = transformer_generate_ref(exact.data, exact.shape.to_ints(), state, uniforms, codes, None, 1.0, True)[
            1
        ]
        largest = float(expected.abs().max())
        for name, pack in self.packs.items():
            state = transformer_state(pack, batch)
            _, logits = transformer_generate(pack, state, uniforms, codes=codes, return_logits=True)
            error = float((logits - expected).abs().max()) / largest
            common.gate(f"{name}: teacher-forced logits against the float32 reference", error, BOUNDS[name])
        step = transformer_peers.KeyValueStep(self.weights, self.n_head, self.window, batch)
        drawn = step.generate(uniforms)
        common.gate("draws of the captured peer", common.off_edge(codes, drawn, expected, uniforms), EDGE)
        if self.peers:
            for rows in (batch, 1):
                drawn = self.peer(rows).generate(uniforms[:rows])
                common.gate("draws of the eager peer", common.off_edge(codes[:rows], drawn, expected, uniforms), EDGE)

    # ---- then time

    def peer(self, batch: int, compile: bool = False):
        return self.peers.KeyValueRings(self.weights, self.n_head, self.window, batch=batch, compile=compile)

    def kernel(self, pack: TransformerPack, batch: int) -> Callable[[], object]:
        """A call that draws self.n samples of every stream; the state goes on from call to call."""
        state, uniforms = transformer_state(pack, batch), self.uniforms(batch, self.n)
        state[:, HEADER:] = 0.0  # written, so that it is memory, and not one page of zeros
        state[:, 0] = self.window  # as KeyValueRings.fill: the ring is full
        return lambda: transformer_generate(pack, state, uniforms)

    def rows(self, batch: int) -> list[common.Row]:
        sides = {name: self.kernel(pack, batch) for name, pack in self.packs.items()}
        uniforms = self.uniforms(batch, self.n)
        if self.peers:
            for name in (EAGER, *([COMPILED] if batch == 1 and not self.quick else [])):
                peer = self.peer(batch, compile=name == COMPILED)
                peer.fill()
                sides[name] = lambda peer=peer: peer.generate(uniforms)
        times = common.interleave(sides, self.clock, rounds=self.rounds, seconds=self.seconds)
        rows = []
        for name, timing in times.items():
            ours = name in DTYPES
            side, dtype = ("transformer_generate", name) if ours else (name, "float32")
            row = common.rate_row(f"{self.name}, batch {batch}", side, timing, batch * self.n, "samples/s",
                                  dtype=dtype, batch=batch)  # fmt: skip
            if ours:
                row.note = self.explain(name, batch).kernel
            if EAGER in times and name != EAGER:
                row.ratio, row.ratio_to = timing.times_as_fast_as(times[EAGER]), EAGER
                if ours and batch == 1 and self.device == "cpu":
                    row.floor = row.goal = TARGETS.get((self.name, name))
            rows.append(row)
        if batch == 1 and EAGER in times:
            rows += self.reading(times[EAGER])
        return rows

    # ---- on a GPU

    def gpu_rows(self, batch: int) -> list[common.Row]:
        sides = {name: self.kernel(pack, batch) for name, pack in self.packs.items()}
        work = dict.fromkeys(sides, batch * self.n)
        for name, step in self.gpu_peers(batch).items():
            sides[name], work[name] = step, batch
        times = common.interleave(sides, self.clock, rounds=self.rounds, seconds=self.seconds)
        rows = []
        for name, timing in times.items():
            ours = name in DTYPES
            row = common.rate_row(f"GPU, {self.name}, batch {batch}", "transformer_generate" if ours else name, timing,
                                  work[name], "samples/s", dtype=name if ours else "bfloat16", batch=batch)  # fmt: skip
            if ours:
                row.note = self.explain(name, batch).kernel
                if batch == 1 and name == "bfloat16":
                    row.note += f"; goal on an H100: {GPU_TARGETS[self.name]:,}"
            if GRAPH in times and name != GRAPH:
                row.ratio, row.ratio_to = row.median / (batch / times[GRAPH].median), GRAPH
            rows.append(row)
        return rows

    def gpu_peers(self, batch: int) -> dict[str, Callable[[], object]]:
        """One step a call, the rings full."""
        half = {name: tensor.to(torch.bfloat16) for name, tensor in self.weights.items()}
        steps = [transformer_peers.KeyValueStep(half, self.n_head, self.window, batch) for _ in range(3)]
        for step in steps:
            step.uniform.copy_(self.uniforms(batch, 1))
            step.fill()
        made = {"PyTorch, eager": steps[0], "PyTorch, CUDA graph": wavenet_peers.captured(steps[1], compiled=False)}
        if not self.quick:
            made[GRAPH] = wavenet_peers.captured(steps[2], compiled=True)
        return made

    def reading(self, eager: common.Timing) -> list[common.Row]:
        """What reading pack and cache once a sample allows at most, as the rows of the kernel are given."""
        rows = []
        for name in DTYPES:
            n_bytes = self.explain(name).bytes
            rate = common.read_rate(n_bytes, self.clock, self.device)
            ratio = rate / n_bytes * eager.median / self.n
            rows.append(
                common.Row(f"{self.name}, batch 1", "limit: pack and cache read once a sample", "samples/s",
                           rate / n_bytes, dtype=name, batch=1, clock=self.clock.name, ratio=ratio, ratio_to=EAGER,
                           note=f"{n_bytes / 1e6:.2f} MB at {rate / 1e9:.1f} GB/s")
            )  # fmt: skip
        return rows

    def limits(self) -> list[common.Row]:
        rows, flop = [], self.explain("float32").flops
        for name in ("float32", "bfloat16"):
            rate = common.mm_rate(self.clock, self.device, DTYPES[name], 256 if self.quick else 0)
            side, note = f"torch.mm: large batches, {self.name}", f"{rate / 1e9:,.0f} GFLOP/s"
            rows.append(
                common.Row("limits", side, "samples/s", rate / flop, dtype=name, clock=self.clock.name, note=note)
            )
        rate = common.copy_rate(self.clock, self.device, 1 << 24 if self.quick else 0)
        return [*rows, common.Row("limits", "copy, read and written", "GB/s", rate / 1e9, clock=self.clock.name)]


def main() -> None:
    arguments = common.parser(__doc__).parse_args()
    clock, rows = common.begin(arguments), []
    with torch.inference_mode():
        for name in list(MODELS)[: 1 if arguments.quick else None]:
            bench = Bench(name, arguments, clock)
            bench.check()
            for batch in (1, 16):
                rows += bench.gpu_rows(batch) if bench.device == "cuda" else bench.rows(batch)
        rows += bench.limits()
    common.finish("transformer_generate", rows, arguments)


if __name__ == "__main__":
    main()

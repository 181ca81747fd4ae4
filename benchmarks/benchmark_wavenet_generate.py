"""WaveNet generation, samples a second: the fused kernel beside plain PyTorch, on the standard model.

The model: 20 layers (twice dilations 1 .. 512), kernel 2, 64 residual, 256 skip and 256 head channels, 256 classes;
random weights at which signals keep their size through the layers and draws visit many codes. One core unless said.

Sides: wavenet_generate with float32, bfloat16 and int8 packs; eager ring buffers and eager recomputation
(audiomodels.peers). Samples are those of all streams together; ratios are multiples of the eager ring buffers in the
same batch and run. Limits in the same table: reading the pack once a sample (batch 1), torch.mm, a large copy. The
ring-buffer peer is itself checked against the figures known of it elsewhere, in units of torch.mm and of torch.mv.

On a GPU the sides are float16, bfloat16 and int8 (clusters, where the GPU has them), float32 (the general kernel),
and the ring buffers of wavenet_peers.py in float16: eager, in a CUDA graph, compiled and in a CUDA graph; with and
without condition, 20 and 40 layers. The cluster kernel counts itself where the time of a step goes. The note of a row
holds the clock of the multiprocessors while it ran.

torch.compile of the ring-buffer step is no side of the CPU table: tried on torch 2.13, it took minutes to compile and
then ran 0.9 to 1.1 times as fast as eager (with the position as an integer, it is compiled again and again).
"""

import argparse
import os
import subprocess
from collections.abc import Callable

import common
import torch
import wavenet_peers
from torch import Tensor
from torch.nn import functional as F

from audiokernels import WaveNetPack, explain, philox_uniform, wavenet_generate, wavenet_pack, wavenet_state
from audiokernels.backends import REFERENCE
from audiokernels.wavenet_generate import wavenet_generate_ref
from audiokernels.wavenet_stages import wavenet_stages

DILATIONS = [2**i for i in range(10)] * 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
BOUNDS = {
    "float32": 1e-5,
    "float16": 0.004,
    "bfloat16": 0.03,
    "int8": 0.06,
}  # of the largest logit, to the reference
EDGE = 2.0**-14  # a draw may differ where the uniform number lies this close to an edge of the CDF
TARGETS = {  # (batch, dtype): floor and goal, multiples of the eager ring buffers on one core
    (1, "float32"): (7, 8),
    (1, "bfloat16"): (14, 16),
    (1, "int8"): (20, 30),
    (4, "float32"): (8, 8),
    (16, "float32"): (4, 4),
    (16, "bfloat16"): (8, 8),
}
GPU_TARGETS = {1: (176e3, 230e3), 16: (2.5e6, 3.5e6), 256: (25e6, 45e6)}  # samples/s on an H100, float16
GRAPH = "PyTorch, CUDA graph"
CONDITION_CHANNELS, CONDITION_HOP = 80, 200
FLOP = 2 * 868_352  # of one sample, as the figures below count them
# The peer's samples/s on one core of a Zen 5 server, where torch.mm did 100 GFLOP/s and torch.mv took 1.0 us.
KNOWN_RATES, KNOWN_MM, KNOWN_MV = {1: 3505, 4: 9400, 16: 22_000}, 100e9, 1.0e-6
RING, RECOMPUTE = "eager ring buffers", "eager recomputation"


def standard_weights(condition: int = 0, n: int = len(DILATIONS)) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    r, s, d, a = 64, 256, 256, 256

    def rn(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=g)

    weights = {
        "embedding": rn(a, r, scale=1.0),
        "conv_weight": rn(n, 2 * r, r, 2, scale=(2 * r) ** -0.5),
        "conv_bias": rn(n, 2 * r, scale=0.1),
        "res_weight": rn(n - 1, r, r, scale=r**-0.5),
        "res_bias": rn(n - 1, r, scale=0.1),
        "skip_weight": rn(n, s, r, scale=r**-0.5),
        "skip_bias": rn(n, s, scale=0.1),
        "head_weight": rn(d, s, scale=s**-0.5),
        "head_bias": rn(d, scale=0.1),
        "out_weight": rn(a, d, scale=3 * d**-0.5),
        "out_bias": rn(a, scale=0.1),
    }
    if condition:
        weights["condition_weight"] = rn(n, 2 * r, condition, scale=condition**-0.5)
    return weights


class Bench:
    """The model's packs, and its rows."""

    def __init__(self, arguments: argparse.Namespace, clock: common.Clock):
        self.device, self.quick, self.clock = arguments.device, arguments.quick, clock
        self.weights = standard_weights()
        self.packs = self.pack(self.weights)
        self.weights = {name: tensor.to(self.device) for name, tensor in self.weights.items()}
        self.rounds, self.seconds = (2, 0.01) if self.quick else (9, 0.2 if self.device == "cpu" else 0.1)
        told = self.explain(self.packs["float32"])
        slow = told.kernel == REFERENCE
        self.n = 16 if self.quick or slow else 512 if self.device == "cpu" else 4096  # samples a call
        if slow:
            print(f"wavenet_generate on {self.device} takes the {told.kernel}: {told.why}")
        self.peers = common.optional("audiomodels.peers")
        self.models = common.optional("audiomodels.wavenet")

    def pack(self, weights: dict[str, Tensor], hop: int = 1) -> dict[str, WaveNetPack]:
        return {
            name: wavenet_pack(weights, DILATIONS, dtype=dtype, hop=hop).to(self.device)
            for name, dtype in DTYPES.items()
        }

    def uniforms(self, batch: int, n: int, seed: int = 0) -> Tensor:
        return philox_uniform(seed, batch, n).to(self.device)

    def explain(self, pack: WaveNetPack, batch: int = 1):
        return explain(wavenet_generate, pack, wavenet_state(pack, batch), self.uniforms(batch, 1))

    # ---- correct first

    def check(self) -> None:
        batch, n = 4, 64 if self.quick else 200
        uniforms, exact = self.uniforms(batch, n), self.packs["float32"]
        codes = wavenet_generate(exact, wavenet_state(exact, batch), uniforms)
        common.gate("draws visit fewer than 40 codes", 40 / len(codes.unique()), 1.0)
        expected = reference_logits(exact, uniforms, codes)
        largest = float(expected.abs().max())
        for name, pack in self.packs.items():
            _, logits = wavenet_generate(pack, wavenet_state(pack, batch), uniforms, codes=codes, return_logits=True)
            error = float((logits - expected).abs().max()) / largest
            common.gate(f"{name}: teacher-forced logits against the float32 reference", error, BOUNDS[name])
        if self.peers:
            drawn = self.peers.ring_buffers(self.weights, DILATIONS, uniforms)
            common.gate("draws of the ring-buffer peer", common.off_edge(codes, drawn, expected, uniforms), EDGE)

    def naive_model(self):
        """A WaveNet of the same sizes for the recomputing peer, which takes a model; None where there is none."""
        if not (self.peers and self.models):
            return None
        model = self.models.WaveNet().eval()
        pack, uniforms = model.pack(), self.uniforms(1, 4)
        codes, logits = wavenet_generate(pack, wavenet_state(pack, 1), uniforms, return_logits=True)
        drawn = self.peers.recompute(model, uniforms)
        common.gate("draws of the recomputing peer", common.off_edge(codes, drawn, logits, uniforms), EDGE)
        return model

    # ---- then time

    def kernel(self, pack: WaveNetPack, batch: int, condition: Tensor | None = None) -> Callable[[], object]:
        """A call that draws self.n samples of every stream; the state goes on from call to call."""
        state, uniforms = wavenet_state(pack, batch), self.uniforms(batch, self.n)
        if condition is None:
            return lambda: wavenet_generate(pack, state, uniforms)
        fresh = state.clone()  # begins at a frame each time

        def call() -> None:
            state.copy_(fresh)
            wavenet_generate(pack, state, uniforms, condition=condition)

        return call

    def batch(self, batch: int, model, threads: int = 1) -> list[common.Row]:
        sides, work = {}, {}
        for name, pack in self.packs.items():
            sides[name], work[name] = self.kernel(pack, batch), batch * self.n
        if self.peers and not (self.quick and threads > 1):  # its many small products wait for a second core
            uniforms = self.uniforms(batch, self.n)
            sides[RING] = lambda: self.peers.ring_buffers(self.weights, DILATIONS, uniforms)
            work[RING] = batch * self.n
        if model is not None:
            one, past = self.uniforms(batch, 1), torch.randint(256, (batch, model.receptive_field))
            sides[RECOMPUTE] = lambda: self.peers.recompute(model, one, past)
            work[RECOMPUTE] = batch
        torch.set_num_threads(threads)
        clock = common.clock_of(self.device, threads)
        times = common.interleave(sides, clock, rounds=self.rounds, seconds=self.seconds)
        torch.set_num_threads(1)
        case = f"batch {batch}" + (f", {threads} threads" if threads > 1 else "")
        rows = []
        for name, timing in times.items():
            ours = name in DTYPES
            row = common.rate_row(case, "wavenet_generate" if ours else name, timing, work[name], "samples/s",
                                  dtype=name if ours else "float32", batch=batch, threads=threads)  # fmt: skip
            if ours:
                row.note = self.explain(self.packs[name], batch).kernel
            if RING in times and name != RING:
                row.ratio, row.ratio_to = row.median / (batch * self.n / times[RING].median), RING
                if name != RECOMPUTE:
                    row.ratio = timing.times_as_fast_as(times[RING])
                if threads == 1 and self.device == "cpu":
                    row.floor, row.goal = TARGETS.get((batch, name), (None, None)) if ours else (None, None)
            rows.append(row)
        return rows

    def conditioned(self, batch: int) -> list[common.Row]:
        """The same model with local condition: what projecting and adding it costs."""
        packs = self.pack(standard_weights(CONDITION_CHANNELS), hop=CONDITION_HOP)
        frames = -(-self.n // CONDITION_HOP)
        condition = torch.randn(batch, frames, CONDITION_CHANNELS, generator=torch.Generator().manual_seed(0))
        sides = {}
        for name in DTYPES:
            sides[name, "off"] = self.kernel(self.packs[name], batch)
            sides[name, "on"] = self.kernel(packs[name], batch, condition.to(self.device))
        times = common.interleave(sides, self.clock, rounds=self.rounds, seconds=self.seconds)
        case = f"condition of {CONDITION_CHANNELS} channels, a frame every {CONDITION_HOP} samples, batch {batch}"
        rows = []
        for (name, state), timing in times.items():
            row = common.rate_row(case, f"condition {state}", timing, batch * self.n, "samples/s", dtype=name,
                                  batch=batch)  # fmt: skip
            if state == "on":
                row.ratio, row.ratio_to = timing.times_as_fast_as(times[name, "off"]), "condition off"
            rows.append(row)
        return rows

    # ---- on a GPU

    def gpu(self) -> list[common.Row]:
        rows = []
        for batch in (1, 16) if self.quick else (1, 16, 256):
            for condition in (False, True):
                rows += self.gpu_batch(batch, condition)
        return rows + self.gpu_stages()

    def gpu_batch(self, batch: int, conditioned: bool) -> list[common.Row]:
        weights = standard_weights(CONDITION_CHANNELS if conditioned else 0)
        packs = self.pack(weights, hop=CONDITION_HOP if conditioned else 1)
        frames = torch.randn(batch, -(-self.n // CONDITION_HOP), CONDITION_CHANNELS, device=self.device)
        sides = {name: self.kernel(pack, batch, frames if conditioned else None) for name, pack in packs.items()}
        work = dict.fromkeys(sides, batch * self.n)
        for name, step in self.gpu_peers(weights, batch, conditioned).items():
            sides[name], work[name] = step, batch
        times = common.interleave(sides, self.clock, rounds=self.rounds, seconds=self.seconds)
        case = f"GPU, batch {batch}, condition {'on' if conditioned else 'off'}"
        rows = []
        for name, timing in times.items():
            ours = name in DTYPES
            row = common.rate_row(case, "wavenet_generate" if ours else name, timing, work[name], "samples/s",
                                  dtype=name if ours else "float16", batch=batch)  # fmt: skip
            if ours:
                row.note = f"{self.explain(packs[name], batch).kernel}; {sm_clock(sides[name], timing.median)}"
            if name != GRAPH:
                row.ratio, row.ratio_to = row.median / (batch / times[GRAPH].median), GRAPH
            if name == "float16" and batch in GPU_TARGETS:
                floor, goal = GPU_TARGETS[batch]
                row.note += f"; on an H100: floor {floor:,.0f}, goal {goal:,.0f}"
            rows.append(row)
        return rows

    def gpu_peers(self, weights: dict[str, Tensor], batch: int, conditioned: bool) -> dict[str, Callable[[], object]]:
        """One step a call."""
        half = {name: tensor.to(self.device, torch.float16) for name, tensor in weights.items()}
        steps = [wavenet_peers.RingStep(half, DILATIONS, batch) for _ in range(3)]
        for step in steps:
            step.uniform.copy_(self.uniforms(batch, 1))
            if conditioned:
                step.condition = torch.randn(len(DILATIONS), batch, 128, device=self.device).half()
        made = {"PyTorch, eager": steps[0], GRAPH: wavenet_peers.captured(steps[1], compiled=False)}
        if not (self.quick or conditioned):  # it takes a minute to compile
            made["PyTorch, compiled, CUDA graph"] = wavenet_peers.captured(steps[2], compiled=True)
        return made

    def gpu_stages(self) -> list[common.Row]:
        """Microseconds of a step by stage, as the cluster kernel counts them; known codes; and 40 layers over 20."""
        packs = {
            n: wavenet_pack(standard_weights(n=n), (DILATIONS * 2)[:n], dtype=torch.float16).to(self.device)
            for n in (20, 40)
        }
        rows = []
        for batch in (1, 16) if self.quick else (1, 256):
            rows += self.stages_of_batch(packs[20], batch)
        sides = {f"{n} layers": self.kernel(pack, 1) for n, pack in packs.items()}
        state, uniforms = wavenet_state(packs[20], 1), self.uniforms(1, self.n)
        known = torch.randint(256, (1, self.n), device=self.device)
        sides["20 layers, known codes"] = lambda: wavenet_generate(packs[20], state, uniforms, codes=known)
        times = common.interleave(sides, self.clock, rounds=self.rounds, seconds=self.seconds)
        us = {name: 1e6 * timing.median / self.n for name, timing in times.items()}
        whole = [common.Row("GPU, a step, batch 1", name, "us", value, dtype="float16", batch=1, clock=self.clock.name)
                 for name, value in us.items()]  # fmt: skip
        whole[1].ratio, whole[1].ratio_to = us["40 layers"] / us["20 layers"], "20 layers; at most 2.2"
        return rows + whole

    def stages_of_batch(self, pack: WaveNetPack, batch: int) -> list[common.Row]:
        """The mean over the blocks of a kind; block 0 alone embeds."""
        state, uniforms = wavenet_state(pack, batch), self.uniforms(batch, self.n)
        wavenet_stages(pack, state, uniforms)  # warms up
        found = wavenet_stages(pack, state, uniforms)
        rows = []
        for stage in [*found.blocks[0], *found.blocks[-1]] if found else []:
            us = [block[stage] for block in found.blocks if stage in block]
            note = f"{len(us)} blocks, {min(us):.2f} .. {max(us):.2f}; SM clock {found.gigahertz:.3f} GHz"
            rows.append(
                common.Row(f"GPU, stages of a step, batch {batch}", stage, "us", sum(us) / len(us), dtype="float16",
                           batch=batch, clock="SM cycles", note=note)
            )  # fmt: skip
        return rows

    def training(self) -> list[common.Row]:
        """Targets a second trained by audiomodels.WaveNet with Adam, each with its full receptive field before it."""
        if not self.models:
            return []
        model = self.models.WaveNet().to(self.device)
        batch, length, context = (1, 16, 15) if self.quick else (2, 2048, model.receptive_field - 1)
        codes = torch.randint(256, (batch, context + length + 1), device=self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

        def step(autocast: bool) -> None:
            optimizer.zero_grad()
            with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
                logits = model(codes[:, :-1], length=length)
            loss = F.cross_entropy(logits.float().flatten(0, 1), codes[:, -length:].flatten())
            loss.backward()
            optimizer.step()

        threads = 1 if self.quick else os.cpu_count() or 1
        torch.set_num_threads(threads)
        sides = {"float32": lambda: step(False), "bfloat16": lambda: step(True)}
        clock = common.clock_of(self.device, threads)
        times = common.interleave(sides, clock, rounds=2 if self.quick else 5, seconds=0.01)
        torch.set_num_threads(1)
        case = f"training, {batch} crops of {length} targets after {context} samples of context"
        return [
            common.rate_row(case, "audiomodels.WaveNet", timing, batch * length, "samples/s", dtype=name, batch=batch,
                            threads=threads)
            for name, timing in times.items()
        ]  # fmt: skip

    # ---- the limits, and the peer's own check

    def limits(self) -> list[common.Row]:
        clock, rows = self.clock, []

        def add(side: str, value: float, unit: str, dtype: str = "", note: str = "") -> None:
            rows.append(common.Row("limits", side, unit, value, dtype=dtype, clock=clock.name, note=note))

        for name, pack in self.packs.items():
            n_bytes = pack.data.numel()
            rate = common.read_rate(n_bytes, clock, self.device)
            note = f"{n_bytes / 1e6:.2f} MB at {rate / 1e9:.1f} GB/s"
            add("the pack read once a sample: batch 1", rate / n_bytes, "samples/s", name, note)
        for name in ("float32", "bfloat16"):
            rate = common.mm_rate(clock, self.device, DTYPES[name], 256 if self.quick else 0)
            add("torch.mm: large batches", rate / FLOP, "samples/s", name, f"{rate / 1e9:,.0f} GFLOP/s")
        n_bytes = 1 << 24 if self.quick else 0
        add("copy, read and written", common.copy_rate(clock, self.device, n_bytes) / 1e9, "GB/s")
        return rows

    def peer_check(self, rows: list[common.Row]) -> list[common.Row]:
        """Is the ring-buffer peer as good as it is known to be? In units of torch.mm, and of one torch.mv call."""
        if self.device != "cpu":
            return []
        mm = common.mm_rate(self.clock, size=256 if self.quick else 0)  # measured again: beside torch.mv
        matrix, vector = torch.randn(64, 128), torch.randn(128)
        mv = common.interleave({"mv": lambda: torch.mv(matrix, vector)}, self.clock, seconds=0.02)["mv"].median
        checked = []
        for row in rows:
            if row.side != RING or row.threads != 1 or row.batch not in KNOWN_RATES:
                continue
            known, step = KNOWN_RATES[row.batch], row.batch / row.median
            units = {
                "FLOP/s over those of torch.mm": (row.median * FLOP / mm, known * FLOP / KNOWN_MM),
                "steps in the time of a 64 x 128 torch.mv": (mv / step, KNOWN_MV * known / row.batch),
            }
            for name, (here, there) in units.items():
                note = f"known: {there:.3g}; here {1e6 * step / len(DILATIONS):.1f} us a layer and step"
                checked.append(
                    common.Row("the ring-buffer peer", name, "", here, batch=row.batch, clock=row.clock, note=note,
                               ratio=here / there, ratio_to="known", floor=0.9, goal=0.9)
                )  # fmt: skip
        return checked


def reference_logits(pack: WaveNetPack, uniforms: Tensor, codes: Tensor) -> Tensor:
    state = wavenet_state(pack, uniforms.shape[0])
    return wavenet_generate_ref(pack.data, pack.shape.to_ints(), state, uniforms, codes, None, 1.0, True)[1]


def sm_clock(call: Callable[[], object], seconds: float) -> str:
    """The clock of the multiprocessors while `call`, which takes so long, runs, as nvidia-smi tells it."""
    for _ in range(max(1, round(1.5 / seconds))):
        call()
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    torch.cuda.synchronize()
    return f"SM clock {found or 'unknown'}"


def main() -> None:
    arguments = common.parser(__doc__).parse_args()
    bench = Bench(arguments, common.begin(arguments))
    with torch.inference_mode():
        bench.check()
        rows = []
        if arguments.device == "cuda":  # peers of its own: eager ring buffers take 2 ms a step there
            rows += bench.gpu()
        else:
            model = bench.naive_model()
            for batch in (1, 16) if arguments.quick else (1, 4, 16):
                rows += bench.batch(batch, model)
            rows += bench.batch(16, None, threads=2)
            rows += bench.conditioned(1)
            if not arguments.quick:
                rows += bench.conditioned(16)
        rows += bench.limits() + bench.peer_check(rows)
    rows += bench.training()
    common.finish("wavenet_generate", rows, arguments)


if __name__ == "__main__":
    main()

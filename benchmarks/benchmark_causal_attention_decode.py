"""Microseconds of one step of generation: causal_attention_decode and kv_cache_update, one new position, a full ring.

Sides, on the same numbers: the two ops; torch SDPA of one query over all slots, which no ring, window or position
concerns; torch.mv of a matrix as large as the keys of a row and head. On the CPU the cost of a call is what counts at
small sizes: at most 3.5 times torch.mv's at 64 slots. On a GPU each side is a replay of a CUDA graph; SDPA by backend.
Limit: reading the caches at the rate of a copy.
"""

import argparse
from collections.abc import Callable

import common
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from audiokernels import causal_attention_decode, explain, kv_cache_update

NAME, MV_LIMIT = "causal_attention_decode", 3.5
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.02}
# {(headdim, slots): (known us of cuDNN on an H100, goal)}, batch 1, bfloat16, 8 heads: compared as multiples of cuDNN
GPU_TARGETS = {(16, 4096): (7.2, 5.0)}


def tensors(headdim: int, slots: int, batch: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(0)

    def rn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    nheads = 1 if device == "cpu" else 8
    return {
        "q": rn(batch, nheads, 1, headdim),
        "k_cache": rn(batch, nheads, slots, headdim),
        "v_cache": rn(batch, nheads, slots, headdim),
        "k": rn(batch, nheads, 1, headdim),
        "v": rn(batch, nheads, 1, headdim),
        "cache_seqlens": torch.full((batch,), 5 * slots + 3, dtype=torch.int32, device=device),
    }


def replay(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    torch.cuda.synchronize()
    return graph.replay


def measure(
    headdim: int, slots: int, batch: int, dtype: torch.dtype, arguments: argparse.Namespace
) -> list[common.Row]:
    device = arguments.device
    t = tensors(headdim, slots, batch, dtype, device)
    q, k_cache, v_cache, seqlens = (t[name] for name in ("q", "k_cache", "v_cache", "cache_seqlens"))
    kv_cache_update(k_cache, v_cache, t["k"], t["v"], seqlens)
    what = f"headdim {headdim}, {slots} slots, batch {batch}, {dtype}"
    written = (k_cache[:, :, 3] - t["k"][:, :, 0]).abs().amax() + (v_cache[:, :, 3] - t["v"][:, :, 0]).abs().amax()
    common.gate(f"kv_cache_update, {what}", float(written), 1e-9)
    right = F.scaled_dot_product_attention(q.double(), k_cache.double(), v_cache.double())  # order does not matter
    error = (causal_attention_decode(q, k_cache, v_cache, seqlens).double() - right).abs().max()
    common.gate(f"{NAME}, {what}", float(error / right.abs().max()), BOUNDS[dtype])

    matrix, vector = k_cache[0, 0].contiguous(), q[0, 0, 0].contiguous()
    sides: dict[str, Callable[[], object]] = {
        NAME: lambda: causal_attention_decode(q, k_cache, v_cache, seqlens),
        "kv_cache_update": lambda: kv_cache_update(k_cache, v_cache, t["k"], t["v"], seqlens),
        "torch.mv": lambda: torch.mv(matrix, vector),
    }
    if device == "cpu":
        sides["SDPA"] = lambda: F.scaled_dot_product_attention(q, k_cache, v_cache)
    else:
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

            def attend(backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k_cache, v_cache)

            if dtype != torch.float32:
                sides[f"SDPA {name}"] = attend
        sides = {name: replay(call) for name, call in sides.items()}
    rounds, seconds = (3, 0.002) if arguments.quick else (15, 0.02)
    times = common.interleave(sides, common.clock_of(device), rounds=rounds, seconds=seconds)
    rows = []
    for name, timing in times.items():
        case = f"headdim {headdim}, {slots} slots, {q.shape[1]} heads"
        row = common.time_row(case, name, timing, dtype=str(dtype).removeprefix("torch."), batch=batch)
        ours = name in (NAME, "kv_cache_update")
        peer = "torch.mv" if device == "cpu" or "SDPA cuDNN" not in times else "SDPA cuDNN"
        if ours:
            row.ratio, row.ratio_to = timing.times_as_fast_as(times[peer]), peer
            args = (k_cache, v_cache, t["k"], t["v"]) if name == "kv_cache_update" else (q, k_cache, v_cache)
            row.note = explain(name, *args, seqlens).kernel
        if ours and (device, slots, batch) == ("cpu", 64, 1):
            row.floor = row.goal = round(1 / MV_LIMIT, 3)
        if name == NAME and peer == "SDPA cuDNN" and batch == 1 and (headdim, slots) in GPU_TARGETS:
            known, goal = GPU_TARGETS[headdim, slots]
            row.goal = round(known / goal, 3)
        rows.append(row)
    return rows


def main() -> None:
    arguments = common.parser(__doc__).parse_args()
    clock = common.begin(arguments)
    sizes = [(16, 64), (16, 1024), (64, 1024)] if arguments.device == "cpu" else [(16, 4096), (16, 16384), (64, 4096)]
    rows = []
    with torch.inference_mode():
        for headdim, slots in sizes[:1] if arguments.quick else sizes:
            for batch in (1, 16):
                for dtype in (torch.float32, torch.bfloat16):
                    rows += measure(headdim, slots, batch, dtype, arguments)
        rate = common.copy_rate(clock, arguments.device, 1 << 24 if arguments.quick else 0) / 1e9
        rows.append(common.Row("limits", "copy, read and written", "GB/s", rate, clock=clock.name))
    common.finish(NAME, rows, arguments)


if __name__ == "__main__":
    main()

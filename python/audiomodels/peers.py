"""What the fused kernel is compared with: WaveNet generation in plain PyTorch, written as well as eager PyTorch allows.

    ring_buffers   the past inputs of every layer are kept (Fast WaveNet): O(layers) a sample
    recompute      the model is run on its whole receptive field for every sample

Both take the numbers and the model that the kernel takes, so that their codes can be compared with its codes.
"""

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

import audiokernels

if TYPE_CHECKING:  # ring_buffers needs torch alone, on machines without the [models] extra too
    from audiomodels.wavenet import WaveNet


@torch.inference_mode()
def ring_buffers(weights: dict[str, Tensor], dilations: list[int], uniforms: Tensor) -> Tensor:
    """Draw from a fresh state. weights: WaveNet.weights(), no condition; uniforms (batch, n) -> codes (batch, n) int64.

    A ring is a list of tensors, so that nothing is copied; a layer is two products; all skip sums are one product; a
    single stream is vectors, for which torch has a faster product than for matrices of one row.
    """
    batch, n = uniforms.shape
    rows, linear = ((), _linear_of_vector) if batch == 1 else ((batch,), F.linear)
    width, n_layer = weights["conv_weight"].shape[3], len(dilations)
    convs = list(zip(weights["conv_weight"].transpose(2, 3).flatten(2), weights["conv_bias"], strict=True))
    res = list(zip(weights["res_weight"], weights["res_bias"], strict=True))
    skip = weights["skip_weight"].transpose(0, 1).flatten(1), weights["skip_bias"].sum(0)
    head, out = ((weights[f"{name}_weight"], weights[f"{name}_bias"]) for name in ("head", "out"))
    n_class, residual = weights["embedding"].shape
    silence = weights["embedding"].new_zeros(*rows, residual)
    rings = [[silence] * ((width - 1) * d) for d in dilations]
    code, codes = torch.full(rows, n_class // 2, device=silence.device), []
    for t in range(n):
        x, hs = weights["embedding"][code], []
        for layer, (ring, d) in enumerate(zip(rings, dilations, strict=True)):
            taps = [ring[(t + k * d) % len(ring)] for k in range(width - 1)] + [x]
            if ring:
                ring[t % len(ring)] = x
            a, b = linear(torch.cat(taps, -1), *convs[layer]).chunk(2, -1)
            h = torch.tanh(a) * torch.sigmoid(b)
            hs.append(h)
            if layer + 1 < n_layer:
                x = x + linear(h, *res[layer])
        logits = linear(F.relu(linear(F.relu(linear(torch.cat(hs, -1), *skip)), *head)), *out)
        code = draw(logits, uniforms[:, t].view(*rows, 1))
        codes.append(code)
    return torch.stack(codes, -1).view(batch, n) if codes else torch.empty_like(uniforms, dtype=torch.int64)


def _linear_of_vector(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmv(bias, weight, x)


@torch.inference_mode()
def recompute(model: "WaveNet", uniforms: Tensor, past: Tensor | None = None) -> Tensor:
    """Draw after `past` (batch, m) (default: a fresh state). uniforms (batch, n) -> codes (batch, n) int64.

    In its favour, each layer is run only on the times that the one prediction needs.
    """
    start = torch.full((uniforms.shape[0], 1), model.config.n_class // 2, device=uniforms.device)
    codes = start if past is None else torch.cat([start, past.long()], 1)
    for t in range(uniforms.shape[1]):
        logits = model(codes[:, -model.receptive_field :], length=1)[:, 0]
        codes = torch.cat([codes, draw(logits, uniforms[:, t : t + 1])[:, None]], 1)
    return codes[:, codes.shape[1] - uniforms.shape[1] :]


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: logits (..., n_class), uniform (..., 1) in [0, 1) -> codes (...)."""
    cdf = torch.softmax(logits, -1).cumsum(-1)
    return torch.searchsorted(cdf, uniform * cdf[..., -1:], right=True)[..., 0].clamp_(max=logits.shape[-1] - 1)


def samples_per_second(model: "WaveNet", *, batch: int = 1, seconds: float = 1.0, rounds: int = 5) -> dict[str, float]:
    """Total samples/s of the fused kernel and of both peers: medians over rounds in which each has its turn.

    One thread, by its CPU time, so that other programs count little. seconds: length of a turn. A recomputing step is
    timed with its receptive field full.
    """
    pack, weights, dilations = model.pack(), model.weights(), model.config.dilations
    weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    state = audiokernels.wavenet_state(pack, batch)
    past = torch.randint(0, model.config.n_class, (batch, model.receptive_field))
    sides: dict[str, Callable[[Tensor], object]] = {
        "fused kernel": lambda uniforms: audiokernels.wavenet_generate(pack, state, uniforms),
        "ring buffers": lambda uniforms: ring_buffers(weights, dilations, uniforms),
        "recomputation": lambda uniforms: recompute(model, uniforms, past),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counts = {name: _calibrated(side, batch, seconds) for name, side in sides.items()}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                n = counts[name]
                rates[name].append(batch * n / _time(side, batch, n))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in rates.items()}


def _time(side: Callable[[Tensor], object], batch: int, n: int) -> float:
    uniforms = torch.rand(batch, n)
    start = time.thread_time()
    side(uniforms)
    return max(time.thread_time() - start, 1e-9)


def _calibrated(side: Callable[[Tensor], object], batch: int, seconds: float) -> int:
    """How many samples a turn of about `seconds` draws."""
    n = 1
    while (took := _time(side, batch, n)) < seconds / 8:
        n *= 2
    return max(1, round(n * seconds / took))

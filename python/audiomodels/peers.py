"""What the fused kernels are compared with: generation in plain PyTorch, written as well as eager PyTorch allows.

    ring_buffers    WaveNet: the past inputs of every layer are kept (Fast WaveNet): O(layers) a sample
    recompute       WaveNet: the model is run on its whole receptive field for every sample
    KeyValueRings   SampleTransformer: the keys and values of the window are kept, a ring a layer

All take the numbers and the model that the kernel takes, so that their codes can be compared with its codes.
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


class KeyValueRings:
    """Sample-level transformer generation step by step, with rotary positions and no context network.

    A step is nine calls a layer beside the rotation: for q and k together it is one complex product (their rows are
    sorted for it), key and value enter their ring in one copy, attention is torch's own, biases are in the products.

    Args:
        weights: SampleTransformer.weights(), in float32.
        n_head, window: of the model.
        batch: number of streams.
        compile: the layers of a step as one function of torch.compile. For full rings only.
    """

    def __init__(self, weights: dict[str, Tensor], n_head: int, window: int, *, batch: int = 1, compile: bool = False):
        self.w, self.n_head, self.window, self.position = weights, n_head, window, 0
        n_layer, self.n_embd = weights["qkv_weight"].shape[0], weights["embedding"].shape[1]
        self.head = self.n_embd // n_head
        self.rows, self.linear = ((), _linear_of_vector) if batch == 1 else ((batch,), F.linear)
        pairs = torch.arange(self.head).view(2, -1).T.flatten()  # channel i beside channel i + head / 2
        order = torch.cat(
            [pairs + h * self.head for h in range(2 * n_head)] + [torch.arange(2 * self.n_embd, 3 * self.n_embd)]
        )
        self.layers = [
            {
                "norm1": (weights["norm1_weight"][i], weights["norm1_bias"][i]),
                "norm2": (weights["norm2_weight"][i], weights["norm2_bias"][i]),
                "qkv": (weights["qkv_weight"][i][order], weights["qkv_bias"][i][order]),
                **{name: (weights[f"{name}_weight"][i], weights[f"{name}_bias"][i]) for name in ("proj", "up", "down")},
            }
            for i in range(n_layer)
        ]
        like = weights["embedding"]
        self.rings = [like.new_zeros(2, *self.rows, n_head, window, self.head) for _ in range(n_layer)]
        self.code = torch.full(self.rows, like.shape[0] // 2, device=like.device)
        self.step = torch.compile(self._layers, dynamic=False) if compile else self._layers
        self.compiled = compile

    @torch.inference_mode()
    def fill(self) -> None:
        """Rings full of small numbers, as if a window had been generated: for timing."""
        for ring in self.rings:
            ring.normal_(std=0.1)
        self.position += self.window

    @torch.inference_mode()
    def generate(self, uniforms: Tensor) -> Tensor:
        """Draw the next samples: uniforms (batch, n) -> codes (batch, n) int64."""
        batch, n = uniforms.shape
        device, codes = uniforms.device, []
        i = torch.arange(0, self.head, 2, device=device, dtype=torch.float64)
        position = torch.arange(self.position, self.position + n, device=device)
        angle = position[:, None] * 10000.0 ** (-i / self.head)
        turns = torch.stack([angle.cos(), angle.sin()], -1).float()
        for t in range(n):
            slot, seen = self.position % self.window, min(self.position + 1, self.window)
            slot = torch.tensor([slot], device=device) if self.compiled else slot
            logits = self.step(self.w["embedding"][self.code], turns[t], slot, seen)
            self.code = draw(logits, uniforms[:, t].view(*self.rows, 1))
            codes.append(self.code)
            self.position += 1
        return torch.stack(codes, -1).view(batch, n)

    def _turned(self, pairs: Tensor, turn: Tensor) -> Tensor:
        if not self.compiled:
            return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)  # torch.compile writes no code for complex numbers
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1)

    def _layers(self, x: Tensor, turn: Tensor, slot: int | Tensor, seen: int) -> Tensor:
        e, heads = self.n_embd, (self.n_head, self.head)
        for layer, ring in zip(self.layers, self.rings, strict=True):
            qkv = self.linear(F.layer_norm(x, (e,), *layer["norm1"]), *layer["qkv"])
            q, k = self._turned(qkv[..., : 2 * e].unflatten(-1, (2, self.n_head, -1, 2)), turn).flatten(-2).unbind(-3)
            new = torch.stack([k, qkv[..., 2 * e :].unflatten(-1, heads)])
            if isinstance(slot, int):
                ring[..., slot, :] = new
            else:
                ring.index_copy_(-2, slot, new.unsqueeze(-2))
            keys, values = ring[..., :seen, :]
            many = (1,) * (1 - len(self.rows))
            out = F.scaled_dot_product_attention(
                q.view(*many, *q.shape).unsqueeze(-2), keys.view(*many, *keys.shape), values.view(*many, *values.shape)
            )
            x = x + self.linear(out.reshape(*self.rows, e), *layer["proj"])
            inner = F.relu(self.linear(F.layer_norm(x, (e,), *layer["norm2"]), *layer["up"]))
            x = x + self.linear(inner, *layer["down"])
        w = self.w
        return self.linear(F.layer_norm(x, (e,), w["norm_weight"], w["norm_bias"]), w["out_weight"], w["out_bias"])


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

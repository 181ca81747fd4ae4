"""Transformer generation in PyTorch as fast as a GPU user would get it: a step on tensors of fixed address.

Rings of keys and values, position and code stay where they are, so that a step runs eagerly, replays in a CUDA graph,
and can be compiled before it is captured (wavenet_peers.captured).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


class KeyValueStep:
    """Draws one sample of `batch` streams a call; weights as transformer_pack takes them, computed in their dtype.

    Rotary positions, no context network.
    """

    def __init__(self, weights: dict[str, Tensor], n_head: int, window: int, batch: int):
        w = self.weights = weights
        (n_class, n_embd), n_layer = w["embedding"].shape, len(w["qkv_weight"])
        self.heads, self.window, self.full = (n_head, n_embd // n_head), window, False
        device = w["embedding"].device
        self.rings = [w["embedding"].new_zeros(2, batch, n_head, window, n_embd // n_head) for _ in range(n_layer)]
        i = torch.arange(0, self.heads[1], 2, device=device, dtype=torch.float64)
        self.frequency = 10000.0 ** (-i / self.heads[1])
        self.slots = torch.arange(window, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.code = torch.full((batch,), n_class // 2, device=device)
        self.uniform = torch.zeros(batch, 1, device=device)  # the caller's to fill

    def fill(self) -> None:
        """Rings full of small numbers, as if a window had been generated: for timing."""
        for ring in self.rings:
            ring.normal_(std=0.1)
        self.position += self.window
        self.full = True

    def __call__(self) -> Tensor:
        """The next codes (batch,), in the same tensor each time."""
        w, x = self.weights, self.weights["embedding"][self.code]
        angle = self.position * self.frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        slot = self.position % self.window
        seen = None if self.full else (self.slots <= self.position)[None]

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        def linear(x: Tensor, name: str, layer: int) -> Tensor:
            return F.linear(x, w[f"{name}_weight"][layer], w[f"{name}_bias"][layer])

        def norm(x: Tensor, name: str, layer: int) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], w[f"{name}_weight"][layer], w[f"{name}_bias"][layer])

        for layer, ring in enumerate(self.rings):
            q, k, v = linear(norm(x, "norm1", layer), "qkv", layer).unflatten(1, (3, *self.heads)).unbind(1)
            ring.index_copy_(3, slot, torch.stack([turned(k), v])[:, :, :, None])
            out = F.scaled_dot_product_attention(turned(q)[:, :, None], ring[0], ring[1], attn_mask=seen)
            x = x + linear(out.flatten(1), "proj", layer)
            x = x + linear(F.relu(linear(norm(x, "norm2", layer), "up", layer)), "down", layer)
        x = F.layer_norm(x, x.shape[-1:], w["norm_weight"], w["norm_bias"])
        cdf = torch.softmax(F.linear(x, w["out_weight"], w["out_bias"]).float(), -1).cumsum(-1)
        drawn = torch.searchsorted(cdf, self.uniform * cdf[:, -1:], right=True)[:, 0]
        self.code.copy_(drawn.clamp_(max=cdf.shape[1] - 1))
        self.position += 1
        return self.code

    def generate(self, uniforms: Tensor) -> Tensor:
        """Draw the next samples: uniforms (batch, n) -> codes (batch, n) int64."""
        codes = []
        for u in uniforms.split(1, 1):
            self.uniform.copy_(u)
            codes.append(self().clone())
        return torch.stack(codes, 1)

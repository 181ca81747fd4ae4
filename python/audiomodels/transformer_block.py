"""The layer of the causal transformers: attention over a window of the past, then an MLP, each with a norm before it.

    x += proj(attention(norm1(x)))       rotary positions (Su et al. 2021, arXiv 2104.09864) where asked for
    x += down(activation(up(norm2(x))))

SampleTransformer and CodeLM are made of it. Its attention is audiokernels.causal_attention, or, with a ring of keys and
values, causal_attention_decode: the same numbers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import audiokernels

MLP_RATIO = 4
ROTARY_BASE = 10000.0
START = 4.0  # of the biases of q and k that Block.start_at adds


class Block(nn.Module):
    """Attention over `window` steps, then an MLP, each added to its input."""

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        window: int,
        n_layer: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.relu,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.n_head, self.window, self.activation = n_head, window, activation
        self.norm1, self.norm2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.up, self.down = nn.Linear(n_embd, MLP_RATIO * n_embd), nn.Linear(MLP_RATIO * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():  # so that the stream's size does not grow with the depth (GPT-2)
            for linear in (self.proj, self.down):
                linear.weight.mul_((2 * n_layer) ** -0.5)

    def forward(
        self, x: Tensor, n: int, turn: tuple[Tensor, Tensor] | None, cache: list[Tensor] | None = None
    ) -> Tensor:
        """x (batch, time, E) -> its last n steps after the layer.

        turn: cos and sin of x's positions (time, D / 2). cache: [k, v, steps before (batch,)]: x is the next of them.
        """
        q, k, v = (
            part.transpose(1, 2) for part in self.qkv(self.norm1(x)).unflatten(2, (3, self.n_head, -1)).unbind(2)
        )
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is None:
            attended = audiokernels.causal_attention(q[:, :, x.shape[1] - n :], k, v, window=self.window)
        else:
            audiokernels.kv_cache_update(*cache[:2], k, v, cache[2])
            attended = audiokernels.causal_attention_decode(q, *cache, window=self.window)
        x = x[:, x.shape[1] - n :] + self.dropout(self.proj(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(self.activation(self.up(self.norm2(x)))))

    @torch.no_grad()
    def start_at(self, lags: Sequence[int]) -> None:
        """Let head i of a fresh layer look lags[i] steps back, most of all; for rotary positions.

        The biases of q and k alone give a key `lag` steps back a score of START^2 / sqrt(D) for the sum over all angles
        of cos((lag - lags[i]) * angle), which the weights add to.
        """
        cos, sin = angles(torch.tensor(lags), self.qkv.in_features // self.n_head)
        q, k, _ = self.qkv.bias.unflatten(0, (3, self.n_head, -1))
        q[:, : cos.shape[1]] += START
        k += START * torch.cat([cos, sin], 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i of x (..., time, D) with channel i + D / 2 by the angles of their cos and sin (time, D / 2)."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def angles(position: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """cos and sin (time, ceil(channels / 2)) of position * base^(-2i / channels); the angle is float64."""
    i = torch.arange(0, channels, 2, device=position.device, dtype=torch.float64)
    angle = position[:, None] * ROTARY_BASE ** (-i / channels)
    return angle.cos().float(), angle.sin().float()

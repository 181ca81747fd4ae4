"""AudioTransformer: sound events straight from the waveform, by attention and dense layers, without a convolution.

    tokens  = W_64 relu(W_2048 patch + b) + b'        one second of 16 kHz -> 40 patches of 25 ms -> (40, 64)
    per layer:  x += attention(norm(x));  x += W_2 gelu(W_1 norm(x));  x = haar_pool(x);  x = means of two tokens
    logits  = W_head norm(mean over the tokens) + b

Verma & Berger, "Audio transformers: transformer architectures for large scale audio understanding. Adieu convolutions"
(arXiv 2105.00335v1). The rows of W_2048 are the learned filter bank that `audiokernels plot-filters` draws. Two ways to
go through time at several rates, neither with a parameter: average pooling halves the number of tokens between layers;
Haar pooling (audiokernels.haar_pool, block mode) keeps them and lets half of the channels change at every token, a
quarter at every second one, and so on, the last one not at all. Attention is bidirectional over at most 40 tokens, so
it is torch's own. Unlike there, as far as it is known: layer norms come first, and the filters have a ReLU, without
which two dense layers in a row would be one.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from audiokernels import haar_levels, haar_pool
from audiomodels.tagger import Tagger, TaggerConfig, check_audio


@dataclass(frozen=True)
class AudioTransformerConfig(TaggerConfig):
    """Sizes of an AudioTransformer; the default is the large model. `SMALL` and `LARGE` are the published ones."""

    n_layer: int = 6  # small: 3
    n_head: int = 8
    n_embd: int = 64  # width of a token
    n_hidden: int = 128  # width of a layer's feed-forward part
    n_filter: int = 2048  # rows of the first dense layer
    patch: int = 400  # samples of a token: 25 ms
    pool_every: int = 0  # average pooling by two after every so many layers, not after the last; 0: none
    haar: Literal["none", "every", "last", "shuffled"] = "none"  # after which layers; shuffled: every, random levels

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (
            ("n_layer", 1, 1024),
            ("n_head", 1, 1024),
            ("n_embd", 2, 65536),
            ("n_hidden", 1, 1 << 20),
            ("n_filter", 1, 1 << 20),
            ("patch", 1, self.sample_rate),
            ("pool_every", 0, 1024),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be {low} .. {high}, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")


SMALL = AudioTransformerConfig(n_layer=3)
LARGE = AudioTransformerConfig()


class Block(nn.Module):
    """One transformer layer over (batch, tokens, n_embd)."""

    def __init__(self, config: AudioTransformerConfig):
        super().__init__()
        self.n_head = config.n_head
        self.norm_1 = nn.LayerNorm(config.n_embd)
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.norm_2 = nn.LayerNorm(config.n_embd)
        self.up = nn.Linear(config.n_embd, config.n_hidden)
        self.down = nn.Linear(config.n_hidden, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class AudioTransformer(Tagger):
    """model(audio (batch, samples)) -> logits (batch, n_class). See AudioTransformerConfig for the sizes."""

    config_class = AudioTransformerConfig

    def __init__(self, config: AudioTransformerConfig = LARGE):
        super().__init__()
        self.config = config
        self.filters = nn.Linear(config.patch, config.n_filter)
        self.embed = nn.Linear(config.n_filter, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.n_class)

    def forward(self, audio: Tensor) -> Tensor:
        """Logits of audio, float (batch, samples), full scale [-1, 1]; samples a multiple of config.patch."""
        x = self.tokens(audio)
        x = x + positions(x.shape[1], x.shape[2]).to(x)
        for layer, block in enumerate(self.blocks, 1):
            x = block(x)
            if self.config.haar != "none" and (self.config.haar != "last" or layer == len(self.blocks)):
                x = haar_pool(x, levels=self._levels(x.shape[1]))
            if self.config.pool_every and layer % self.config.pool_every == 0 and layer < len(self.blocks):
                x = F.avg_pool1d(x.transpose(1, 2), 2, ceil_mode=True).transpose(1, 2)
        return self.head(self.norm(x.mean(1)))

    def tokens(self, audio: Tensor) -> Tensor:
        """The front end: (batch, samples) -> (batch, samples / patch, n_embd)."""
        check_audio(audio)
        if audio.shape[1] < 1 or audio.shape[1] % self.config.patch:
            raise ValueError(f"audio must be a multiple of {self.config.patch} samples, got {audio.shape[1]}")
        patches = audio.to(self.filters.weight.dtype).unflatten(1, (-1, self.config.patch))
        return self.embed(F.relu(self.filters(patches)))

    def _levels(self, n_token: int) -> tuple[int, ...]:
        levels = haar_levels(self.config.n_embd, n_token)
        if self.config.haar == "shuffled":  # the control: as many channels a level, but any of them
            levels = tuple(random.Random(0).sample(levels, len(levels)))
        return levels


def positions(n_token: int, dim: int) -> Tensor:
    """(n_token, dim): sines and cosines of the position (Vaswani et al., arXiv 1706.03762, section 3.5)."""
    rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000) / dim))
    angle = torch.arange(n_token)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :dim]

"""WaveNet: the next sample's class from all samples before it, by a stack of dilated causal convolutions.

    x_0   = embedding[code]
    z     = sum_k W_k x_l[t - (width - 1 - k) d_l] + b_l + V_l condition,   h_l = tanh(z_a) * sigmoid(z_b)
    x_l+1 = x_l + W_res h_l + b_res,    skip = sum_l W_skip,l h_l + b_skip
    logits = W_out relu(W_head relu(skip) + b_head) + b_out

van den Oord et al., "WaveNet: a generative model for raw audio" (arXiv 1609.03499), sections 2.1 to 2.5; unlike there
the codes enter through an embedding, and the embedding has no tanh after it. Training computes all time steps at once
(below); generation is one call of the op audiokernels.wavenet_generate, which keeps a ring of past inputs a layer.
Labels and local conditions follow section 2.5: both are channels of one condition, projected into every layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import audiokernels
from audiomodels.generator import Generator, check_codes, check_config, check_parameters, start_near_levels_near


@dataclass(frozen=True)
class WaveNetConfig:
    """Sizes of a WaveNet, and the sound that its codes stand for."""

    n_layer: int = 20  # gated layers
    dilation_cycle: int = 10  # dilations are 1, 2, 4, ..., 2^(cycle - 1), again and again
    residual_channels: int = 64  # R: width of the stream that layers read and add to, and of the gate
    skip_channels: int = 256  # S: width of the sum over layers that the head reads
    head_channels: int = 256  # width of the head's hidden layer
    n_class: int = 256  # codes are 0 .. n_class - 1
    kernel_size: int = 2  # taps of a convolution
    condition_channels: int = 0  # numbers in a frame of local condition; 0: none
    condition_hop: int = 1  # samples that a frame of condition lasts
    n_label: int = 0  # global labels (speakers, instruments); 0: none
    sample_rate: int = 16000  # Hz
    companding: str = "mulaw"  # how a code stands for a level: mulaw or linear

    def __post_init__(self):
        limits = {
            "dilation_cycle": (1, 20),
            "residual_channels": (1, 65536),
            "skip_channels": (1, 65536),
            "head_channels": (1, 65536),
            "kernel_size": (1, 1024),
        }
        check_config(self, limits)
        check_parameters(self.n_parameter)

    @property
    def dilations(self) -> list[int]:
        return [2 ** (layer % self.dilation_cycle) for layer in range(self.n_layer)]

    @property
    def receptive_field(self) -> int:
        """Samples that a prediction sees."""
        return (self.kernel_size - 1) * sum(self.dilations) + 1

    @property
    def n_condition(self) -> int:
        """Channels of the condition that the layers see: the local ones and the label's embedding."""
        return self.condition_channels + (self.residual_channels if self.n_label else 0)

    @property
    def n_parameter(self) -> int:
        r, s, d, n = self.residual_channels, self.skip_channels, self.head_channels, self.n_layer
        conv = (self.kernel_size * r + 1 + self.n_condition) * 2 * r
        ends = self.n_class * r + s + (s + 1) * d + (d + 1) * self.n_class + self.n_label * r
        return n * (conv + r * s) + (n - 1) * (r + 1) * r + ends


class Block(nn.Module):
    """One gated layer. Time is the first dimension, so that every tap is one contiguous piece of memory."""

    def __init__(self, channels: int, width: int, dilation: int, last: bool):
        super().__init__()
        self.width, self.dilation = width, dilation
        self.conv = nn.Linear(width * channels, 2 * channels)  # taps side by side, the current sample last
        self.res = None if last else nn.Linear(channels, channels)  # nothing reads the last layer's

    def forward(self, x: Tensor, n: int, condition: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """x (time >= n, batch, R) -> the last n steps of the next x and of h, both (n, batch, R)."""
        past = (self.width - 1) * self.dilation
        x = x[max(0, x.shape[0] - n - past) :]
        if x.shape[0] < n + past:  # before the first sample: silence, zero at every layer
            x = F.pad(x, (0, 0, 0, 0, n + past - x.shape[0], 0))
        z = self.conv(torch.cat([x[k * self.dilation :][:n] for k in range(self.width)], dim=2))
        if condition is not None:
            z = z + condition
        a, b = z.chunk(2, dim=2)
        h = torch.tanh(a) * torch.sigmoid(b)
        return (None if self.res is None else x[past:] + self.res(h)), h


class WaveNet(nn.Module, Generator):
    """model(codes) -> logits; model.generate(n) -> codes. See WaveNetConfig for the sizes."""

    config_class = WaveNetConfig
    ops = audiokernels.wavenet_state, audiokernels.wavenet_generate

    def __init__(self, config: WaveNetConfig = WaveNetConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        r, n_layer = config.residual_channels, config.n_layer
        self.embedding = nn.Embedding(config.n_class, r)
        self.blocks = nn.ModuleList(
            Block(r, config.kernel_size, dilation, last=layer + 1 == n_layer)
            for layer, dilation in enumerate(config.dilations)
        )
        self.label = nn.Embedding(config.n_label, r) if config.n_label else None
        self.condition = nn.Linear(config.n_condition, n_layer * 2 * r, bias=False) if config.n_condition else None
        self.skip = nn.Linear(n_layer * r, config.skip_channels)  # all layers' skip sums as one product
        self.head = nn.Linear(config.skip_channels, config.head_channels)
        self.out = nn.Linear(config.head_channels, config.n_class)
        start_near_levels_near(self.embedding.weight, self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def receptive_field(self) -> int:
        """Samples that a prediction sees."""
        return self.config.receptive_field

    @property
    def train_context(self) -> int:
        """Samples that training shows before a target."""
        return self.receptive_field

    def forward(
        self, codes: Tensor, condition: Tensor | None = None, label: Tensor | None = None, *, length: int | None = None
    ) -> Tensor:
        """Logits of the code after each of `codes`.

        Args:
            codes: integers (batch, time), 0 .. n_class - 1. What lies before them is silence (zero in every layer).
            condition: float (batch, frames, condition_channels); frame i holds for logits i * condition_hop ..
                (i + 1) * condition_hop - 1; frames = ceil(time / condition_hop). In a model with them only.
            label: integers (batch,), 0 .. n_label - 1. In a model with them only.
            length: only the last `length` predictions, which costs less than all of them.

        Returns:
            float (batch, length or time, n_class); logits[:, t] predicts codes[:, t + 1].
        """
        check_codes(codes)
        batch, time = codes.shape
        length = time if length is None else length
        if not 0 <= length <= time:
            raise ValueError(f"length must be 0 .. {time}, got {length}")
        frames = self._condition(batch, time, condition, label)
        if frames is not None:
            frames = self.condition(frames.transpose(0, 1)).chunk(len(self.blocks), dim=2)
            frame_of = torch.arange(time, device=codes.device) // self._hop
        x, steps, hs = self.embedding(codes.T.long()), self._steps(time, length), []
        for layer, (block, n) in enumerate(zip(self.blocks, steps, strict=True)):
            x, h = block(x, n, None if frames is None else frames[layer][frame_of[time - n :]])
            hs.append(h[n - length :].transpose(0, 1))
        skip = F.relu(self.skip(torch.cat(hs, dim=2)))
        return self.out(F.relu(self.head(skip)))

    def _steps(self, time: int, length: int) -> list[int]:
        """Time steps of each layer that the last `length` logits need."""
        steps = []
        for block in reversed(self.blocks):
            steps.append(min(time, length))
            length += (block.width - 1) * block.dilation
        return steps[::-1]

    def weights(self) -> dict[str, Tensor]:
        """The weights under the names and in the shapes that audiokernels.wavenet_pack takes."""
        blocks, n_layer = self.blocks, len(self.blocks)
        taps = (self.config.kernel_size, self.config.residual_channels)
        weights = {
            "embedding": self.embedding.weight,
            "conv_weight": torch.stack([block.conv.weight.unflatten(1, taps).transpose(1, 2) for block in blocks]),
            "conv_bias": torch.stack([block.conv.bias for block in blocks]),
            "res_weight": self.skip.weight.new_empty(0, taps[1], taps[1]),
            "res_bias": self.skip.bias.new_empty(0, taps[1]),
            "skip_weight": self.skip.weight.unflatten(1, (n_layer, -1)).transpose(0, 1),
            "skip_bias": F.pad(self.skip.bias[None], (0, 0, 0, n_layer - 1)),  # one bias serves all layers
            "head_weight": self.head.weight,
            "head_bias": self.head.bias,
            "out_weight": self.out.weight,
            "out_bias": self.out.bias,
        }
        if n_layer > 1:
            weights["res_weight"] = torch.stack([block.res.weight for block in blocks[:-1]])
            weights["res_bias"] = torch.stack([block.res.bias for block in blocks[:-1]])
        if self.condition is not None:
            weights["condition_weight"] = self.condition.weight.unflatten(0, (n_layer, -1))
        return weights

    def pack(self, dtype: torch.dtype = torch.float32) -> "audiokernels.WaveNetPack":
        """The weights as audiokernels.wavenet_generate takes them, in float32, bfloat16 or int8."""
        return audiokernels.wavenet_pack(self.weights(), self.config.dilations, dtype=dtype, hop=self._hop)

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

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import audiokernels
from audiomodels._optional import require
from audiomodels.pretrained import Pretrained

MAX_PARAMETERS = 1_000_000_000
LABEL_HOP = 1 << 20  # samples that a frame lasts where the label, which never changes, is the whole condition


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
            "n_layer": (1, 1000),
            "dilation_cycle": (1, 20),
            "residual_channels": (1, 65536),
            "skip_channels": (1, 65536),
            "head_channels": (1, 65536),
            "n_class": (2, 32768),
            "kernel_size": (1, 1024),
            "condition_channels": (0, 65536),
            "condition_hop": (1, 1 << 20),
            "n_label": (0, 1_000_000),
            "sample_rate": (1000, 768_000),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            try:
                value = operator.index(value)  # numpy's and torch's integers too
            except TypeError:
                raise TypeError(f"{name} must be an integer, got {value!r}") from None
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low} .. {high}, got {value}")
            object.__setattr__(self, name, value)
        if self.companding not in ("mulaw", "linear"):
            raise ValueError(f"companding must be 'mulaw' or 'linear', got {self.companding!r}")
        if self.n_parameter > MAX_PARAMETERS:
            raise ValueError(f"a model of {self.n_parameter:,} parameters is more than {MAX_PARAMETERS:,}")

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


class WaveNet(nn.Module, Pretrained):
    """model(codes) -> logits; model.generate(n) -> codes. See WaveNetConfig for the sizes."""

    config_class = WaveNetConfig

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
        self._init_classes()

    @torch.no_grad()
    def _init_classes(self) -> None:
        """Near levels start near each other: class c is a row of cosines in c, on the way in and on the way out.

        Measured on 3.2 s of guitar, 300 steps: 2.42 bits on the rest of it, against 3.21 with torch's random rows.
        """
        angle = (torch.arange(self.config.n_class) + 0.5) * (torch.pi / self.config.n_class)
        for weight, scale in ((self.embedding.weight, 1.0), (self.out.weight, self.config.head_channels**-0.5)):
            weight.copy_(scale * torch.cos(angle[:, None] * torch.arange(1, weight.shape[1] + 1)))
        self.out.bias.zero_()

    @property
    def receptive_field(self) -> int:
        """Samples that a prediction sees."""
        return self.config.receptive_field

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
        if codes.ndim != 2:
            raise ValueError(f"codes must have shape (batch, time), got {tuple(codes.shape)}")
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

    @property
    def _hop(self) -> int:
        return self.config.condition_hop if self.config.condition_channels else LABEL_HOP

    def _condition(self, batch: int, time: int, condition: Tensor | None, label: Tensor | None) -> Tensor | None:
        """Check condition and label for `time` samples; join them: (batch, frames, n_condition), or None."""
        channels, n_label, frames = self.config.condition_channels, self.config.n_label, -(-time // self._hop)
        parts = []
        if (condition is None) != (channels == 0):
            raise ValueError(f"condition must be given exactly for a model with condition channels ({channels} here)")
        if condition is not None:
            if tuple(condition.shape) != (batch, frames, channels):
                raise ValueError(
                    f"condition must have shape {(batch, frames, channels)} for {time} samples at a hop of "
                    f"{self._hop}, got {tuple(condition.shape)}"
                )
            parts.append(condition)
        if (label is None) != (n_label == 0):
            raise ValueError(f"label must be given exactly for a model with labels ({n_label} here)")
        if label is not None:
            if tuple(label.shape) != (batch,) or (batch and not 0 <= int(label.min()) <= int(label.max()) < n_label):
                raise ValueError(f"label must be {batch} integers in 0 .. {n_label - 1}, got {label.tolist()}")
            parts.append(self.label(label.long())[:, None].expand(-1, frames, -1))
        return torch.cat(parts, dim=2) if parts else None

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

    def generate(self, n: int, prompt: Tensor | None = None, *, progress: bool = False, **options) -> Tensor:
        """Draw n samples: codes (batch, n), without the prompt; uint8 up to 256 classes, int16 above.

        Args:
            n: samples to draw.
            prompt: codes (batch, m) or (m,) that come before them.
            progress: show a bar.
            options: condition, label, temperature, seed, batch, dtype: see `stream`, whose blocks these codes are.
        """
        dtype = torch.uint8 if self.config.n_class <= 256 else torch.int16
        codes, done = torch.empty(options.get("batch", 1), max(0, n), dtype=dtype, device=self.out.weight.device), 0
        with require("tqdm").tqdm(total=n, unit="sample", unit_scale=True, disable=not progress) as bar:
            for block in self.stream(n, prompt, **options):
                codes[:, done : done + block.shape[1]] = block
                done += block.shape[1]
                bar.update(block.shape[1])
        return codes

    @torch.no_grad()
    def stream(
        self,
        n: int,
        prompt: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        label: Tensor | int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Tensor]:
        """Draw n samples and yield them as they are made, in blocks of a tenth of a second: codes (batch, <= block).

        Args:
            n: samples to draw.
            prompt: codes (batch, m) or (m,) that come before them; without, a stream begins at silence.
            condition: (batch, frames, condition_channels), frame i for samples i * condition_hop ..
                (i + 1) * condition_hop - 1 of prompt and new samples together.
            label: (batch,), or one for all.
            temperature: logits are divided by it; 0 takes the most probable code.
            seed: with the position in the stream and the row it gives each draw (audiokernels.philox_uniform), so
                a row's codes do not depend on the other rows, nor on the blocks.
            batch: streams; those of prompt and condition must be as many, or one for all.
            dtype: the weights' in the kernel: torch.float32, torch.bfloat16 or torch.int8.

        For blocks of any size, from another thread, see audiokernels.WaveNetStream(model.pack(), ...).
        """
        if n < 0 or batch < 1:
            raise ValueError(f"n must be >= 0 and batch >= 1, got n={n}, batch={batch}")
        device = self.out.weight.device
        prompt = _rows("prompt", torch.zeros(0, dtype=torch.uint8) if prompt is None else prompt, 2, batch)
        total = prompt.shape[1] + n
        frames = self._condition(
            batch,
            total,
            None if condition is None else _rows("condition", condition, 3, batch).to(device, torch.float32),
            None if label is None else _rows("label", torch.as_tensor(label), 1, batch).to(device),
        )
        pack, hop = self.pack(dtype), self._hop
        state = audiokernels.wavenet_state(pack, batch)

        def draw(first: int, last: int, codes: Tensor | None = None) -> Tensor:
            uniforms = audiokernels.philox_uniform(seed, batch, last - first, position=first).to(device)
            touched = None if frames is None else frames[:, first // hop :][:, : (last - 1) // hop - first // hop + 1]
            return audiokernels.wavenet_generate(
                pack, state, uniforms, codes=codes, condition=touched, temperature=temperature
            )

        start, block = prompt.shape[1], max(1, self.config.sample_rate // 10)
        if start:
            draw(0, start, prompt.to(device))
        for first in range(start, total, block):
            yield draw(first, min(first + block, total))


def _rows(name: str, x: Tensor, ndim: int, batch: int) -> Tensor:
    """x with `batch` rows, one row repeated if need be."""
    x = x[None] if x.ndim == ndim - 1 else x
    if x.ndim != ndim or x.shape[0] not in (1, batch):
        raise ValueError(f"{name} must have {batch} rows (or one for all), got shape {tuple(x.shape)}")
    return x.expand(batch, *x.shape[1:])

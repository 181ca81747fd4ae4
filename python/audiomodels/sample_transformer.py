"""SampleTransformer: the next sample's class from the samples in a window before it, by causal attention.

    x   = embedding[code] (+ context code, + condition, + sinusoidal position)
    x  += proj(attention(norm(x)))                       rotary positions, a window of 1600 samples in every layer
    x  += down(relu(up(norm(x)))),    where asked for x = haar_pool(x, mode="causal");    n_layer times
    logits = out(norm(x)) (+ context code)

Verma & Chafe, "A generative model for raw audio using transformer architectures" (arXiv 2106.16036): 8-bit samples,
100 ms of context, 128 channels, 3 layers of 4 heads, or 6 and 8 layers of 8. Their conditioning is `context_channels`:
six causal convolutions over the past 4,000 samples give a code of 128 numbers at every sample, which enters by
`fusion`. They slide with the sample, so the strides of a network that reads one crop of 4,000 are dilations here. What
the paper leaves open is chosen: norms come first, the MLP is four times as wide, positions are rotary, and fresh heads
look at lags of their own (start_lags).

The window slides in every layer over the whole stream, so that generation with a ring of keys and values computes
exactly the full forward pass (one call of audiokernels.transformer_generate). `model.mode = "recompute"` is the paper's
sliding crop instead: every prediction is made from the last `window` samples alone, at `window` times the cost.

`latent_patch` adds a long context as in Verma, "GoodBye WaveNet" (arXiv 2206.08297): convolutions make a latent of
every patch, a transformer reads up to `latent_context` samples' worth of them, and its output for the patches so far
is a condition of the samples in the next one.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import audiokernels
from audiomodels.generator import Generator, check_codes, check_config, check_parameters, start_near_levels_near
from audiomodels.transformer_block import MLP_RATIO, Block, angles

POSITIONS = ("rotary", "sinusoidal")
FUSIONS = ("logits", "add", "film")
MODES = ("full", "recompute")
RANDOM_OFFSETS = 1 << 16  # in training, sinusoidal positions begin anywhere below this
CROPS = 16  # that mode "recompute" runs at a time


@dataclass(frozen=True)
class SampleTransformerConfig:
    """Sizes of a SampleTransformer, and the sound that its codes stand for."""

    n_layer: int = 3  # layers of attention and MLP
    n_head: int = 4  # heads of attention; each has n_embd / n_head channels, an even number, 8 .. 256
    n_embd: int = 128  # width of the stream that layers read and add to
    window: int = 1600  # samples that a query sees, itself among them
    positions: str = "rotary"  # rotary or sinusoidal
    context_channels: int = 0  # of the convolutions over the past; 0: none
    context_widths: tuple[int, ...] = (5, 5, 5, 4, 4, 2)  # their taps; the product is the samples they see, 4,000
    context_code: int = 128  # numbers that they make of them
    fusion: str = "logits"  # where that code goes: logits, add (to the embedding) or film (scales and shifts it)
    haar: bool = False  # causal Haar pooling after every layer
    latent_patch: int = 0  # samples of a patch, a power of two; 0: no latents
    latent_layers: int = 4  # layers of the transformer over latents
    latent_context: int = 1 << 20  # samples that a latent sees
    checkpoint: bool = False  # in training, compute a layer again instead of keeping what it computed
    n_class: int = 256  # codes are 0 .. n_class - 1
    condition_channels: int = 0  # numbers in a frame of local condition; 0: none
    condition_hop: int = 1  # samples that a frame of condition lasts
    n_label: int = 0  # global labels (speakers, instruments); 0: none
    sample_rate: int = 16000  # Hz
    companding: str = "mulaw"  # how a code stands for a level: mulaw or linear

    def __post_init__(self):
        limits = {
            "n_head": (1, 1024),
            "n_embd": (8, 65536),
            "window": (1, 1 << 20),
            "context_channels": (0, 65536),
            "context_code": (1, 65536),
            "latent_patch": (0, 1 << 16),
            "latent_layers": (1, 1000),
            "latent_context": (1, 1 << 30),
        }
        check_config(self, limits)
        for name, allowed in (("positions", POSITIONS), ("fusion", FUSIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("haar", "checkpoint"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        head = self.n_embd // self.n_head
        if self.n_embd % self.n_head or head % 2 or not 8 <= head <= 256:
            raise ValueError(
                "n_head must divide n_embd into heads of an even number of channels, 8 .. 256, "
                f"got {self.n_embd} / {self.n_head}"
            )
        widths = self.context_widths
        if not isinstance(widths, list | tuple) or any(not isinstance(w, int) or not 1 <= w <= 1024 for w in widths):
            raise ValueError(f"context_widths must be integers from 1 to 1024, got {widths!r}")
        if not widths or math.prod(widths) > 1 << 20:
            raise ValueError(f"context_widths must be at least one, their product at most 2^20, got {widths!r}")
        object.__setattr__(self, "context_widths", tuple(widths))  # JSON has lists
        if self.latent_patch & (self.latent_patch - 1) or self.latent_patch == 1:
            raise ValueError(f"latent_patch must be 0 or a power of two from 2 on, got {self.latent_patch}")
        if self.latent_patch and self.condition_channels and self.condition_hop != self.latent_patch:
            raise ValueError(f"condition_hop must be latent_patch ({self.latent_patch}), got {self.condition_hop}")
        check_parameters(self.n_parameter)

    @property
    def n_condition(self) -> int:
        """Channels of the condition: the local ones, the label's embedding and the latents'."""
        return self.condition_channels + self.n_embd * (bool(self.n_label) + bool(self.latent_patch))

    @property
    def context(self) -> int:
        """Samples that the context network sees."""
        return math.prod(self.context_widths) if self.context_channels else 0

    @property
    def haar_levels(self) -> tuple[int, ...]:
        """The level of every channel's pooling, fast ones first: the dyadic plan, no longer than the window."""
        if not self.haar:
            return ()
        levels = audiokernels.haar_levels(self.n_embd, 1 << 62)
        top = self.window.bit_length() - 1
        return tuple(min(max(levels) + 1 if level < 0 else level, top) for level in levels)

    @property
    def n_parameter(self) -> int:
        e, x, n = self.n_embd, self.context_channels, self.n_layer
        layers = n + (self.latent_layers if self.latent_patch else 0)
        block = 4 * e + (4 * e + 4) * e + 2 * MLP_RATIO * e * e + (MLP_RATIO + 1) * e
        ends = 2 * self.n_class * e + self.n_class + 2 * e + self.n_condition * e + self.n_label * e
        if x:
            rows = [x] * (len(self.context_widths) - 1) + [self.context_code]
            ends += self.n_class * x + sum((w * x + 1) * r for w, r in zip(self.context_widths, rows, strict=True))
            ends += (self.context_code + 1) * self.fused
        if self.latent_patch:
            ends += self.n_class * e + sum((stride * e + 1) * e for stride in self.latent_strides)
        return layers * block + ends

    @property
    def fused(self) -> int:
        """Numbers that the context code becomes."""
        return {"logits": self.n_class, "add": self.n_embd, "film": 2 * self.n_embd}[self.fusion]

    @property
    def latent_strides(self) -> list[int]:
        """Of the convolutions that make a latent of a patch."""
        twos = self.latent_patch.bit_length() - 1
        return [4] * (twos // 2) + [2] * (twos % 2)


def start_lags(window: int) -> list[int]:
    """Where the heads of a fresh model look, in samples back: 1, 2, 3, 4, 6, 8, 12, 16 and so on, within the window.

    A prediction of the next sample needs the last ones told apart. Fresh heads, whose positions are nearly alike, take
    millions of samples to learn that.
    """
    lags = [lag << octave for octave in range(window.bit_length()) for lag in (2, 3)]
    return [min(1, window - 1)] + [lag for lag in lags if lag < window]


class Context(nn.Module):
    """Causal convolutions over the codes: a code of the past prod(widths) samples at every sample."""

    def __init__(self, config: SampleTransformerConfig):
        super().__init__()
        x, widths = config.context_channels, config.context_widths
        self.widths, self.dilations = widths, [math.prod(widths[:i]) for i in range(len(widths))]
        self.embedding = nn.Embedding(config.n_class, x)
        rows = [x] * (len(widths) - 1) + [config.context_code]
        self.convs = nn.ModuleList(nn.Linear(w * x, r) for w, r in zip(widths, rows, strict=True))  # newest tap last

    def forward(self, codes: Tensor, n: int) -> Tensor:
        """codes (batch, time) -> the last n codes (batch, n, context_code)."""
        past = [(width - 1) * d for width, d in zip(self.widths, self.dilations, strict=True)]
        x = self.embedding(codes[:, max(0, codes.shape[1] - n - sum(past)) :])
        for layer, conv in enumerate(self.convs):
            steps = min(codes.shape[1], n + sum(past[layer + 1 :]))
            x = F.pad(x, (0, 0, max(0, steps + past[layer] - x.shape[1]), 0))  # before the first sample: silence
            taps = [x[:, k * self.dilations[layer] :][:, :steps] for k in range(self.widths[layer])]
            x = F.relu(conv(torch.cat(taps, 2)))
        return x


class Latents(nn.Module):
    """A latent of every patch, and a transformer over them."""

    def __init__(self, config: SampleTransformerConfig):
        super().__init__()
        e = config.n_embd
        self.head = e // config.n_head
        self.embedding = nn.Embedding(config.n_class, e)
        self.convs = nn.ModuleList(nn.Conv1d(e, e, stride, stride) for stride in config.latent_strides)
        window = max(1, config.latent_context // config.latent_patch)
        self.blocks = nn.ModuleList(
            Block(e, config.n_head, window, config.latent_layers) for _ in range(config.latent_layers)
        )

    def forward(self, codes: Tensor, run: Callable, caches: list[list[Tensor]] | None = None) -> Tensor:
        """codes (batch, patches * patch) -> (batch, patches, E); run calls a layer; caches: these are the next ones."""
        x = self.embedding(codes).transpose(1, 2)
        for conv in self.convs:
            x = F.relu(conv(x))
        x, first = x.transpose(1, 2), 0 if caches is None else int(caches[0][2][0])
        turn = angles(torch.arange(first, first + x.shape[1], device=x.device), self.head)
        for layer, block in enumerate(self.blocks):
            x = run(block, x, x.shape[1], turn, None if caches is None else caches[layer])
        return x


class SampleTransformer(nn.Module, Generator):
    """model(codes) -> logits; model.generate(n) -> codes. See SampleTransformerConfig for the sizes."""

    config_class = SampleTransformerConfig
    ops = audiokernels.transformer_state, audiokernels.transformer_generate

    def __init__(self, config: SampleTransformerConfig = SampleTransformerConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.mode = "full"
        """"full": the window slides in every layer; "recompute": every prediction from a crop of its own."""
        e = config.n_embd
        self.embedding = nn.Embedding(config.n_class, e)
        self.blocks = nn.ModuleList(
            Block(e, config.n_head, config.window, config.n_layer) for _ in range(config.n_layer)
        )
        if config.positions == "rotary":
            lags = cycle(start_lags(config.window))
            for block in self.blocks:
                block.start_at([next(lags) for _ in range(config.n_head)])
        self.context = Context(config) if config.context_channels else None
        self.fuse = nn.Linear(config.context_code, config.fused) if config.context_channels else None
        self.label = nn.Embedding(config.n_label, e) if config.n_label else None
        self.latents = Latents(config) if config.latent_patch else None
        self.condition = nn.Linear(config.n_condition, e, bias=False) if config.n_condition else None
        self.norm = nn.LayerNorm(e)
        self.out = nn.Linear(e, config.n_class)
        start_near_levels_near(self.embedding.weight, self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def receptive_field(self) -> int:
        """Samples that a prediction sees; with latents, beside the latent_context that they see."""
        config = self.config
        attended = self._span * config.n_layer if self.mode == "full" else config.window - 1
        context = max(0, config.context - 1)
        return 1 + (max(attended, context) if config.fusion == "logits" else attended + context)

    @property
    def train_context(self) -> int:
        """Samples that training shows before a target: enough for the window's edge, not for every layer's."""
        return min(self.receptive_field, 2 * self.config.window + self.config.context)

    @property
    def _span(self) -> int:
        """Samples before its own that one layer's output depends on."""
        return self.config.window - 1 + (1 << max(self.config.haar_levels, default=0)) - 1

    def forward(
        self, codes: Tensor, condition: Tensor | None = None, label: Tensor | None = None, *, length: int | None = None
    ) -> Tensor:
        """Logits of the code after each of `codes`.

        Args:
            codes: integers (batch, time), 0 .. n_class - 1. A query sees no further back than the first of them.
            condition: float (batch, frames, condition_channels); frame i holds for logits i * condition_hop ..
                (i + 1) * condition_hop - 1; frames = ceil(time / condition_hop). In a model with them only.
            label: integers (batch,), 0 .. n_label - 1. In a model with them only.
            length: only the last `length` predictions, which costs less than all of them.

        Returns:
            float (batch, length or time, n_class); logits[:, t] predicts codes[:, t + 1].
        """
        check_codes(codes)
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        batch, time = codes.shape
        length = time if length is None else length
        if not 0 <= length <= time:
            raise ValueError(f"length must be 0 .. {time}, got {length}")
        codes = codes.long()
        frames = self._condition(batch, time, condition, label)
        if self.latents is not None:
            frames = self._with_latents(codes, frames)
        if self.mode == "recompute":
            return self._recompute(codes, frames, length)
        seen = min(time, length + self.config.n_layer * self._span)
        x, late = self._embed(codes, frames, seen, length)
        offset = time - seen
        if self.training and self.config.positions == "sinusoidal":
            offset += int(torch.randint(RANDOM_OFFSETS, ()))
        return self._logits(self._stack(x, length, offset), late)

    def _embed(self, codes: Tensor, frames: Tensor | None, n: int, length: int) -> tuple[Tensor, Tensor | None]:
        """What the first layer reads at the last n codes, without positions, and what the last logits get added."""
        time, late = codes.shape[1], None
        x = self.embedding(codes[:, time - n :])
        if self.context is not None:
            fused = self.fuse(self.context(codes, length if self.config.fusion == "logits" else n))
            if self.config.fusion == "logits":
                late = fused
            elif self.config.fusion == "add":
                x = x + fused
            else:
                scale, shift = fused.chunk(2, 2)
                x = x + x * scale + shift
        if frames is not None:
            x = x + self.condition(frames)[:, torch.arange(time - n, time, device=codes.device) // self._hop]
        return x, late

    def _stack(self, x: Tensor, length: int, offset: int) -> Tensor:
        """All layers on x (batch, time, E), whose first position is `offset`: the last `length` steps."""
        config, time, turn = self.config, x.shape[1], None
        position = torch.arange(offset, offset + time, device=x.device)
        if config.positions == "rotary":
            turn = angles(position, config.n_embd // config.n_head)
        else:
            cos, sin = angles(position, config.n_embd)
            x = x + torch.cat([sin, cos], 1)[:, : config.n_embd].to(x.dtype)
        for layer, block in enumerate(self.blocks):
            need = min(time, length + (config.n_layer - 1 - layer) * self._span)
            pooled = min(time, need + self._span - config.window + 1)  # the pooling looks back too
            turned = None if turn is None else tuple(part[time - x.shape[1] :] for part in turn)
            x = self._run(block, x, pooled, turned, None)
            if config.haar:
                x = audiokernels.haar_pool(x, levels=config.haar_levels, mode="causal")[:, pooled - need :]
        return x

    def _run(self, block: nn.Module, *args) -> Tensor:
        if self.config.checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _logits(self, x: Tensor, late: Tensor | None) -> Tensor:
        logits = self.out(self.norm(x))
        return logits if late is None else logits + late

    def _recompute(self, codes: Tensor, frames: Tensor | None, length: int) -> Tensor:
        """The last `length` predictions, each from the `window` codes before it, as if there were no others."""
        window, time = self.config.window, codes.shape[1]
        seen = min(time, length + window - 1)
        x, late = self._embed(codes, frames, seen, length)
        rows = []
        whole = min(length, max(0, length - (time - window)))  # those whose crop begins at the first code
        if whole:
            rows.append(self._stack(x[:, : seen - (length - whole)], whole, 0))
        if length > whole:
            crops = x.unfold(1, window, 1).transpose(2, 3)  # (batch, crops, window, E)
            for some in crops[:, crops.shape[1] - (length - whole) :].split(CROPS, 1):
                rows.append(self._stack(some.flatten(0, 1), 1, 0).unflatten(0, some.shape[:2]).squeeze(2))
        return self._logits(torch.cat(rows, 1) if rows else x[:, :0], late)

    # ---- long context

    @property
    def _hop(self) -> int:
        return self.config.latent_patch or self._frame_hop  # not super()._hop: torch.compile cannot follow that

    def _with_latents(self, codes: Tensor, frames: Tensor | None) -> Tensor:
        """The condition, with the latents of the patches before each frame's: (batch, frames, n_condition)."""
        patch = self.config.latent_patch
        complete = max(0, -(-codes.shape[1] // patch) - 1)
        latents = self.embedding.weight.new_zeros(codes.shape[0], 0, self.config.n_embd)
        if complete:
            latents = self.latents(codes[:, : complete * patch], self._run)
        latents = F.pad(latents, (0, 0, 1, 0))[:, : -(-codes.shape[1] // patch)]
        return latents if frames is None else torch.cat([frames, latents.to(frames.dtype)], 2)

    # ---- generation

    def weights(self) -> dict[str, Tensor]:
        """The weights under the names and in the shapes that audiokernels.transformer_pack takes."""
        weights = {"embedding": self.embedding.weight}
        for name in ("norm1", "qkv", "proj", "norm2", "up", "down"):
            for kind in ("weight", "bias"):
                weights[f"{name}_{kind}"] = torch.stack([getattr(getattr(b, name), kind) for b in self.blocks])
        for name in ("norm", "out"):
            weights |= {f"{name}_{kind}": getattr(getattr(self, name), kind) for kind in ("weight", "bias")}
        if self.condition is not None:
            weights["condition_weight"] = self.condition.weight
        if self.context is not None:
            weights |= {"context_embedding": self.context.embedding.weight}
            weights |= {"fuse_weight": self.fuse.weight, "fuse_bias": self.fuse.bias}
            for i, (conv, width) in enumerate(zip(self.context.convs, self.context.widths, strict=True)):
                weights[f"context_weight_{i}"] = conv.weight.unflatten(1, (width, -1)).transpose(1, 2)
                weights[f"context_bias_{i}"] = conv.bias
        return weights

    def pack(self, dtype: torch.dtype = torch.float32) -> "audiokernels.TransformerPack":
        """The weights as audiokernels.transformer_generate takes them, in float32, bfloat16 or int8."""
        config = self.config
        return audiokernels.transformer_pack(
            self.weights(),
            n_head=config.n_head,
            window=config.window,
            positions=config.positions,
            fusion=config.fusion if self.context is not None else "none",
            haar=config.haar_levels,
            dtype=dtype,
            hop=self._hop,
        )

    def _stepper(
        self, batch: int, frames: Tensor | None, sampling: audiokernels.Sampling, dtype: torch.dtype
    ) -> Callable[[int, Tensor, Tensor | None], Tensor]:
        if self.mode == "recompute":
            return self._recomputing_stepper(batch, frames, sampling, dtype)
        if self.latents is None:
            return super()._stepper(batch, frames, sampling, dtype)
        return self._latent_stepper(batch, frames, sampling, dtype)

    def _start(self, batch: int) -> Tensor:
        return torch.full((batch, 1), self.config.n_class // 2, device=self._device)

    def _recomputing_stepper(
        self, batch: int, frames: Tensor | None, sampling: audiokernels.Sampling, dtype: torch.dtype
    ) -> Callable[[int, Tensor, Tensor | None], Tensor]:
        """The model itself for every sample."""
        if dtype != torch.float32 or self.latents is not None or frames is not None:
            raise ValueError("mode 'recompute' generates in float32, without condition, label and latents")
        past = self._start(batch)

        def step(first: int, uniforms: Tensor, codes: Tensor | None) -> Tensor:
            nonlocal past
            made = []
            for t in range(uniforms.shape[1]):
                if codes is not None:
                    code = codes[:, t].long()
                else:
                    code = sampling.draw(self(past, length=1)[:, 0], uniforms[:, t])
                past = torch.cat([past[:, max(0, past.shape[1] - self.receptive_field) :], code[:, None]], 1)
                made.append(code)
            return torch.stack(made, 1).to(torch.uint8 if self.config.n_class <= 256 else torch.int16)

        return step

    def _latent_stepper(
        self, batch: int, frames: Tensor | None, sampling: audiokernels.Sampling, dtype: torch.dtype
    ) -> Callable[[int, Tensor, Tensor | None], Tensor]:
        """A patch at a time: when one is complete, its latent becomes the condition of the next."""
        patch, pack = self.config.latent_patch, self.pack(dtype)
        state = audiokernels.transformer_state(pack, batch)
        blocks, head = self.latents.blocks, self.latents.head
        steps = torch.zeros(batch, dtype=torch.int32, device=self._device)
        like = self.embedding.weight
        caches = [
            [like.new_zeros(batch, block.n_head, block.window, head) for _ in range(2)] + [steps] for block in blocks
        ]
        latent, seen = like.new_zeros(batch, 1, self.config.n_embd), self._start(batch)

        def step(first: int, uniforms: Tensor, codes: Tensor | None) -> Tensor:
            nonlocal latent, seen
            made, last = [], first + uniforms.shape[1]
            for begin in range(first // patch * patch, last, patch):
                part = slice(max(first, begin) - first, min(last, begin + patch) - first)
                frame = latent if frames is None else torch.cat([frames[:, begin // patch :][:, :1], latent], 2)
                made.append(
                    audiokernels.transformer_generate(
                        pack,
                        state,
                        uniforms[:, part],
                        codes=None if codes is None else codes[:, part],
                        condition=frame,
                        **asdict(sampling),
                    )
                )
                seen = torch.cat([seen, made[-1].long()], 1)
                if seen.shape[1] > patch:  # the codes that the steps of this patch read, and the next one's first
                    latent = self.latents(seen[:, :patch], lambda block, *args: block(*args), caches)
                    steps.add_(1)
                    seen = seen[:, patch:]
            return torch.cat(made, 1)

        return step

"""What models that draw samples share: generate() and stream(), conditions and labels, the checks of their configs."""

import numbers
import operator
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import audiokernels
from audiomodels._optional import require
from audiomodels.pretrained import Pretrained

MAX_PARAMETERS = 1_000_000_000
LABEL_HOP = 1 << 20  # samples that a frame lasts where the label, which never changes, is the whole condition
LIMITS = {  # of fields that several configs have
    "n_layer": (1, 1000),
    "n_class": (2, 32768),
    "condition_channels": (0, 65536),
    "condition_hop": (1, 1 << 20),
    "n_label": (0, 1_000_000),
    "sample_rate": (1000, 768_000),
}


def check_config(config: Any, limits: dict[str, tuple[int, int]]) -> None:
    """Make the fields of `limits`, and those of LIMITS that the config has, integers.

    Errors: TypeError or ValueError naming the field, the rule and what came.

    The config is a frozen dataclass with `companding` and `n_parameter`.
    """
    for name, (low, high) in {**{k: v for k, v in LIMITS.items() if hasattr(config, k)}, **limits}.items():
        value = getattr(config, name)
        try:
            value = operator.index(value)  # numpy's and torch's integers too
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {value!r}") from None
        if not low <= value <= high:
            raise ValueError(f"{name} must be {low} .. {high}, got {value}")
        object.__setattr__(config, name, value)
    if config.companding not in ("mulaw", "linear"):
        raise ValueError(f"companding must be 'mulaw' or 'linear', got {config.companding!r}")


def check_codes(codes: Tensor) -> None:
    """TypeError or ValueError unless codes are integers (batch, time): sound itself would become code 0 everywhere."""
    if codes.is_floating_point():
        raise TypeError(f"codes must be integers (see audiomodels.quantize), got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"codes must have shape (batch, time), got {tuple(codes.shape)}")


def check_counts(n: int, batch: int) -> None:
    """TypeError or ValueError unless `batch` streams of n samples can be drawn; seconds * rate is no integer yet."""
    for name, value in (("n", n), ("batch", batch)):
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if n < 0 or batch < 1:
        raise ValueError(f"n must be >= 0 and batch >= 1, got n={n}, batch={batch}")


def check_parameters(n_parameter: int) -> None:
    """ValueError for a model too large to be meant."""
    if n_parameter > MAX_PARAMETERS:
        raise ValueError(f"a model of {n_parameter:,} parameters is more than {MAX_PARAMETERS:,}")


@torch.no_grad()
def start_near_levels_near(embedding: Tensor, out: Tensor) -> None:
    """Near levels start near each other: class c is a row of cosines in c, on the way in and on the way out.

    Measured on 3.2 s of guitar, a WaveNet, 300 steps: 2.42 bits on the rest of it, against 3.21 with torch's random
    rows. embedding, out: the weights (n_class, channels) of the first and the last layer.
    """
    angle = (torch.arange(embedding.shape[0]) + 0.5) * (torch.pi / embedding.shape[0])
    for weight, scale in ((embedding, 1.0), (out, out.shape[1] ** -0.5)):
        weight.copy_(scale * torch.cos(angle[:, None] * torch.arange(1, weight.shape[1] + 1)))


class Generator(Pretrained):
    """Base of a model that draws samples. It has pack(dtype), and the two ops that take the pack."""

    ops: tuple[Callable, Callable]  # <room>_state and <room>_generate of audiokernels

    def generate(self, n: int, prompt: Tensor | None = None, *, progress: bool = False, **options: Any) -> Tensor:
        """Draw n samples: codes (batch, n), without the prompt; uint8 up to 256 classes, int16 above.

        Args:
            n: samples to draw.
            prompt: codes (batch, m) or (m,) that come before them.
            progress: show a bar.
            options: condition, label, seed, batch, dtype, temperature, top_k, top_p: see `stream`, whose blocks these
                codes are.
        """
        batch, dtype = options.get("batch", 1), torch.uint8 if self.config.n_class <= 256 else torch.int16
        check_counts(n, batch)
        codes, done = torch.empty(batch, n, dtype=dtype, device=self._device), 0
        with require("tqdm").tqdm(total=n, unit="sample", unit_scale=True, disable=not progress) as bar:
            if prompt is not None:
                bar.set_description("reading the prompt")
            for block in self.stream(n, prompt, **options):
                bar.set_description(refresh=False)
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
        seed: int = 0,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        **sampling: float,
    ) -> Iterator[Tensor]:
        """Draw n samples and yield them as they are made, in blocks of a tenth of a second: codes (batch, <= block).

        Args:
            n: samples to draw.
            prompt: codes (batch, m) or (m,) that come before them; without, a stream begins at silence.
            condition: (batch, frames, condition_channels), frame i for samples i * condition_hop ..
                (i + 1) * condition_hop - 1 of prompt and new samples together.
            label: (batch,), or one for all.
            seed: with the position in the stream and the row it gives each draw (audiokernels.philox_uniform), so
                a row's codes do not depend on the other rows, nor on the blocks.
            batch: streams; those of prompt and condition must be as many, or one for all.
            dtype: the weights' in the kernel: torch.float32, torch.bfloat16 or torch.int8.
            sampling: temperature, top_k, top_p: of audiokernels.Sampling.

        A WaveNet's blocks of any size, from another thread: audiokernels.WaveNetStream(model.pack(), ...).
        """
        check_counts(n, batch)
        device, sampling = self._device, audiokernels.Sampling(**sampling)
        prompt = _rows("prompt", torch.zeros(0, dtype=torch.uint8) if prompt is None else prompt, 2, batch)
        total = prompt.shape[1] + n
        frames = self._condition(
            batch,
            total,
            None if condition is None else _rows("condition", condition, 3, batch).to(device, torch.float32),
            None if label is None else _rows("label", torch.as_tensor(label), 1, batch).to(device),
        )
        step = self._stepper(batch, frames, sampling, dtype)

        def draw(first: int, last: int, codes: Tensor | None = None) -> Tensor:
            return step(first, audiokernels.philox_uniform(seed, batch, last - first, position=first).to(device), codes)

        start, block = prompt.shape[1], max(1, self.config.sample_rate // 10)
        if start:
            draw(0, start, prompt.to(device))
        for first in range(start, total, block):
            yield draw(first, min(first + block, total))

    def to_codes(self, codes: Tensor) -> Tensor:
        """What `generate` gives as codes 0 .. n_class - 1 (they differ for 16-bit PCM alone)."""
        return codes

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def _hop(self) -> int:
        """Samples that a frame of all that conditions lasts."""
        return self._frame_hop

    @property
    def _frame_hop(self) -> int:
        return self.config.condition_hop if self.config.condition_channels else LABEL_HOP

    def _stepper(
        self, batch: int, frames: Tensor | None, sampling: audiokernels.Sampling, dtype: torch.dtype
    ) -> Callable[[int, Tensor, Tensor | None], Tensor]:
        """step(first, uniforms (batch, n), known codes or None) -> the next codes (batch, n), first the position.

        frames: all of the condition, (batch, frames, n_condition) or None.
        """
        pack, hop = self.pack(dtype), self._hop
        fresh, generate = self.ops
        state = fresh(pack, batch)

        def step(first: int, uniforms: Tensor, codes: Tensor | None) -> Tensor:
            last = first + uniforms.shape[1]
            touched = None if frames is None else frames[:, first // hop :][:, : (last - 1) // hop - first // hop + 1]
            return generate(pack, state, uniforms, codes=codes, condition=touched, **asdict(sampling))

        return step

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


def _rows(name: str, x: Tensor, ndim: int, batch: int) -> Tensor:
    """x with `batch` rows, one row repeated if need be."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    x = x[None] if x.ndim == ndim - 1 else x
    if x.ndim != ndim or x.shape[0] not in (1, batch):
        raise ValueError(f"{name} must have {batch} rows (or one for all), got shape {tuple(x.shape)}")
    return x.expand(batch, *x.shape[1:])

"""What all generators share: config checks, the loop around a model's blocks, the rule by which a sample is drawn.

A generator has `stream(n, prompt, ...)`, which yields blocks of codes; `generate` joins them. A model without a fused
kernel derives from `StepGenerator` and gives one step in plain torch: `initial_state` and `step`.
"""

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import audiokernels
from audiomodels._optional import require
from audiomodels.quantize import code_dtype

MAX_PARAMETERS = 1_000_000_000
SAMPLE_RATES = (1000, 768_000)  # Hz


def check_config(config: Any, limits: Mapping[str, tuple[int, int]]) -> None:
    """Make each named field of a frozen dataclass an int, and check that it lies within its (least, most); check its
    companding and n_parameter too. Errors: TypeError, ValueError that name the field, the rule and what came."""
    for name, (low, high) in limits.items():
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
    if config.n_parameter > MAX_PARAMETERS:
        raise ValueError(f"a model of {config.n_parameter:,} parameters is more than {MAX_PARAMETERS:,}")


def check_codes(codes: Tensor, length: int | None) -> int:
    """Check codes (batch, time) of a forward and how many predictions are asked for; returns the latter."""
    if codes.ndim != 2:
        raise ValueError(f"codes must have shape (batch, time), got {tuple(codes.shape)}")
    length = codes.shape[1] if length is None else length
    if not 0 <= length <= codes.shape[1]:
        raise ValueError(f"length must be 0 .. {codes.shape[1]}, got {length}")
    return length


def class_rows(n_class: int, width: int, scale: float = 1.0) -> Tensor:
    """(n_class, width): class c is a row of cosines in c, so that near levels start near each other."""
    angle = (torch.arange(n_class) + 0.5) * (torch.pi / n_class)
    return scale * torch.cos(angle[:, None] * torch.arange(1, width + 1))


def rows(name: str, x: Tensor, ndim: int, batch: int) -> Tensor:
    """x with `batch` rows, one row repeated if need be."""
    x = x[None] if x.ndim == ndim - 1 else x
    if x.ndim != ndim or x.shape[0] not in (1, batch):
        raise ValueError(f"{name} must have {batch} rows (or one for all), got shape {tuple(x.shape)}")
    return x.expand(batch, *x.shape[1:])


def prompt_rows(n: int, prompt: Tensor | None, batch: int) -> Tensor:
    """Check what a stream is asked for; the prompt as (batch, m)."""
    if n < 0 or batch < 1:
        raise ValueError(f"n must be >= 0 and batch >= 1, got n={n}, batch={batch}")
    return rows("prompt", torch.zeros(0, dtype=torch.uint8) if prompt is None else prompt, 2, batch)


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """logits (batch, n_class), uniforms (batch,) in [0, 1) -> codes (batch,) int64: the first class whose cumulative
    probability exceeds the uniform number, in float32; the most probable one at temperature 0."""
    if temperature == 0:
        return logits.argmax(1)
    cdf = ((logits.float() - logits.float().amax(1, keepdim=True)) / temperature).exp().cumsum(1)
    total = cdf[:, -1:]
    return torch.minimum((cdf <= uniforms[:, None] * total).sum(1), (cdf < total).sum(1))


class Generator:
    """Base of a model that has `config` and `stream`."""

    def generate(self, n: int, prompt: Tensor | None = None, *, progress: bool = False, **options: Any) -> Tensor:
        """Draw n samples: codes (batch, n), without the prompt; uint8 up to 256 classes, int16 above.

        Args:
            n: samples to draw.
            prompt: codes (batch, m) or (m,) that come before them.
            progress: show a bar.
            options: temperature, seed, batch and what else `stream` takes, whose blocks these codes are.
        """
        blocks = [torch.empty(options.get("batch", 1), 0, dtype=self.generated_dtype, device=self.device)]
        with require("tqdm").tqdm(total=n, unit="sample", unit_scale=True, disable=not progress) as bar:
            for block in self.stream(n, prompt, **options):
                blocks.append(block)
                bar.update(block.shape[1])
        return torch.cat(blocks, 1)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.parameters()).device

    @property
    def generated_dtype(self) -> torch.dtype:
        """The integer type of generated codes."""
        return code_dtype(self.config.n_class)


class StepGenerator(Generator):
    """Base of a model that generates in plain torch, a sample at a time. It gives `initial_state` and `step`."""

    uniforms_per_sample = 1

    def initial_state(self, batch: int) -> Any:
        """The state of `batch` streams before their first sample."""
        raise NotImplementedError

    def step(
        self, state: Any, last: Tensor, *, forced: Tensor | None = None, uniforms: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The sample after `last`, both codes (batch,) int64, and its logits; `state` is advanced in place.

        forced: the sample, where it is known. uniforms: (batch, uniforms_per_sample), from which it is drawn otherwise.
        """
        raise NotImplementedError

    def to_codes(self, codes: Tensor) -> Tensor:
        """Codes from outside as int64 0 .. n_class - 1."""
        codes = codes.long()
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.n_class:
            raise ValueError(f"codes must be in 0 .. {self.config.n_class - 1}, got {codes.min()} .. {codes.max()}")
        return codes

    def from_codes(self, codes: Tensor) -> Tensor:
        """int64 codes 0 .. n_class - 1 as `generate` gives them."""
        return codes.to(self.generated_dtype)

    @torch.no_grad()
    def stream(
        self, n: int, prompt: Tensor | None = None, *, temperature: float = 1.0, seed: int = 0, batch: int = 1
    ) -> Iterator[Tensor]:
        """Draw n samples and yield them as they are made, in blocks of a tenth of a second: codes (batch, <= block).

        Args:
            n: samples to draw.
            prompt: codes (batch, m) or (m,) that come before them; without, a stream begins at silence.
            temperature: logits are divided by it; 0 takes the most probable code.
            seed: with the position in the stream and the row it gives each draw (audiokernels.philox_uniform), so
                a row's codes do not depend on the other rows, nor on the blocks.
            batch: streams; those of the prompt must be as many, or one for all.
        """
        prompt = self.to_codes(prompt_rows(n, prompt, batch).to(self.device))
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
        state, k, start = self.initial_state(batch), self.uniforms_per_sample, prompt.shape[1]
        last = torch.full((batch,), self.config.n_class // 2, device=self.device)
        for code in prompt.unbind(1):
            last, _ = self.step(state, last, forced=code)
        block = max(1, self.config.sample_rate // 10)
        for first in range(start, start + n, block):
            count = min(block, start + n - first)
            uniforms = audiokernels.philox_uniform(seed, batch, count * k, position=first * k).to(self.device)
            made = []
            for uniform in uniforms.unflatten(1, (count, k)).unbind(1):
                last, _ = self.step(state, last, uniforms=uniform, temperature=temperature)
                made.append(last)
            yield self.from_codes(torch.stack(made, 1))

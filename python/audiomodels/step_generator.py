"""Generation in plain torch, a sample at a time, for models without a fused kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from audiokernels import Sampling
from audiomodels.generator import Generator


class StepGenerator(Generator):
    """Base of a model that draws its samples by `initial_state` and `step`, and takes no condition."""

    train_context = 4000  # codes before the first target of a crop, over which the state settles; no bound is known

    def initial_state(self, batch: int) -> Any:
        """The state of `batch` streams before their first sample."""
        raise NotImplementedError

    def step(
        self, state: Any, last: Tensor, *, forced: Tensor | None = None, uniforms: Tensor | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The sample after `last`, both codes (batch,) int64, and its logits; `state` is advanced in place.

        forced: the sample, where it is known. uniforms: (batch,), from which it is drawn otherwise, as `sampling` says.
        """
        raise NotImplementedError

    def to_codes(self, codes: Tensor) -> Tensor:
        """Codes from outside as int64 0 .. n_class - 1."""
        if codes.is_floating_point():
            raise TypeError(f"codes must be integers (see audiomodels.quantize), got {codes.dtype}")
        codes = codes.long()
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.n_class:
            raise ValueError(f"codes must be in 0 .. {self.config.n_class - 1}, got {codes.min()} .. {codes.max()}")
        return codes

    def from_codes(self, codes: Tensor) -> Tensor:
        """int64 codes 0 .. n_class - 1 as `generate` gives them."""
        return codes.to(torch.uint8 if self.config.n_class <= 256 else torch.int16)

    def _condition(self, batch: int, time: int, condition: Tensor | None, label: Tensor | None) -> None:
        if condition is not None or label is not None:
            raise ValueError("condition and label must not be given: this model takes none")

    def _stepper(
        self, batch: int, frames: Tensor | None, sampling: Sampling, dtype: torch.dtype
    ) -> Callable[[int, Tensor, Tensor | None], Tensor]:
        if dtype != torch.float32:
            raise ValueError(f"dtype must be torch.float32 for a model without a kernel, got {dtype}")
        state, last = self.initial_state(batch), torch.full((batch,), self.config.n_class // 2, device=self._device)

        def step(first: int, uniforms: Tensor, codes: Tensor | None) -> Tensor:
            nonlocal last
            made = []
            if codes is not None:
                codes = self.to_codes(codes)
            for t in range(uniforms.shape[1]):
                if codes is None:
                    last, _ = self.step(state, last, uniforms=uniforms[:, t], sampling=sampling)
                else:
                    last, _ = self.step(state, last, forced=codes[:, t])
                made.append(last)
            return self.from_codes(torch.stack(made, 1))

        return step

"""Tensors that depend on a few numbers alone, such as filter banks: made once, whoever asks first."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def constant(most: int) -> Callable:
    """Decorator: keep the `most` newest results of a function from hashable arguments to a tensor on the CPU.

    Not functools.lru_cache: what is first made under torch.inference_mode, torch.device or torch.export would stay an
    inference, foreign or fake tensor for every later caller. Under torch.compile and torch.export it is made anew, as
    part of the graph. The caller must not write into it.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept: dict[tuple[Any, ...], Tensor] = {}

        @wraps(function)
        def call(*args: Any, **options: Any) -> Tensor:
            if torch.compiler.is_compiling():
                return function(*args, **options)
            key = (*args, *options.items())
            found = kept.get(key)
            if found is None:
                with torch.inference_mode(False), torch.device("cpu"):
                    found = function(*args, **options)
                if type(found) is not Tensor:  # made under a mode that somebody set
                    return found
                while len(kept) >= most:
                    kept.pop(next(iter(kept)), None)
                kept[key] = found
            return found

        return call

    return decorate

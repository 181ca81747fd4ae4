"""The op library that every room defines its ops in, and the compiled module where there is one."""

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

lib = torch.library.Library("audiokernels", "DEF")


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("audiokernels._C"), ""
    except ModuleNotFoundError:
        note = Path(__file__).with_name("not_compiled.txt")
        reason = note.read_text() if note.is_file() else "the package was copied or installed without being built"
        return None, f"no kernel is compiled: {reason}"
    except ImportError as error:
        return None, f"the compiled module was found but could not be loaded: {error}"


C, C_error = _load()
"""The compiled module `_C`, or None and the reason why not."""

if C is None:
    warnings.warn(
        f"audiokernels runs on its slow plain-torch reference: {C_error}. `python -m audiokernels` tells more.",
        RuntimeWarning,
        stacklevel=2,
    )


def version() -> str:
    """That of the installed package; "unknown" where its folder was only copied."""
    try:
        return importlib.metadata.version("audiokernels")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def triton_launcher(op: str, module: str, check: Callable[..., None]) -> None:
    """Serve `op` on CUDA by the function of its name in audiokernels.`module`, imported at the first call.

    Where Triton is not installed, and on ROCm, nothing is registered. `check` gets the arguments of every call first.
    """
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return

    @cache
    def kernel() -> Callable:
        return getattr(importlib.import_module(f"audiokernels.{module}"), op)

    def launch(*args, **kwargs):
        check(*args, **kwargs)
        return kernel()(*args, **kwargs)

    lib.impl(op, launch, "CUDA")

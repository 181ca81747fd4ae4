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
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from audiokernels._checks import has_tangent

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


def register_autograd(
    op: str, backward: Callable[..., tuple], setup_context: Callable[..., None], jvp: Callable | None = None
) -> None:
    """torch.library.register_autograd for an op of `lib`, with a forward mode, within reach of torch.func.

    torch's own makes an autograd.Function, which torch.func wants to take apart itself. One of a single level is like a
    derivative of torch's ops: each level of torch.func meets it as the op goes down through the dispatcher.

    Args:
        op: its name; what is positional in its schema has no default.
        backward: (ctx, *gradients of the results) -> a gradient or None for each positional argument.
        setup_context: (ctx, positional arguments, dict of the others, output); saves what backward and jvp want.
        jvp: (ctx, a tangent or None for each positional argument) -> tangents of the results. None: tangents are
            refused; without a Derivative torch would drop them, silently.
    """
    overload = getattr(torch.ops.audiokernels, op).default
    defaults = {argument.name: argument.default_value for argument in overload._schema.arguments if argument.kwarg_only}

    def below(keyset, *args, **options):
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    class Derivative(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, keyset, options, *args):
            if torch._C._are_functorch_transforms_active():
                with torch.enable_grad(), _set_fwd_grad_enabled(True):  # off for this level; a level below has its own
                    output = below(keyset, *args, **options)
            else:
                output = below(keyset, *args, **options)
            setup_context(ctx, args, defaults | options, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return None, None, *backward(ctx, *grads)

        @staticmethod
        def jvp(ctx, _keyset, _options, *tangents):
            with _set_fwd_grad_enabled(torch._C._are_functorch_transforms_active()):
                return jvp(ctx, *tangents)

    def kernel(keyset, *args, **options):
        tangents = has_tangent(*args)
        if tangents and jvp is None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd): take torch.func.jacrev or gradients"
            )
        if not (tangents or torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, *args, **options)
        if not torch._C._are_functorch_transforms_active():
            return Derivative.apply(keyset, options, *args)
        with enable_single_level_autograd_function():
            return Derivative.apply(keyset, options, *args)

    lib.impl(op, kernel, "Autograd", with_keyset=True)

"""Checks that rooms share: each names the argument, the rule and what came."""

import operator

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dense(name: str, tensor: Tensor, ndim: int) -> None:
    """Raise TypeError or ValueError unless it is a strided tensor of `ndim` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        came = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {came}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless its dtype is one that the ops take."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_whole(name: str, value: int, least: int, most: int | None = None) -> int:
    """`value` as an int, from any kind of integer (numpy's too). Raise ValueError unless least <= value <= most."""
    if not is_whole(value) or value < least or (most is not None and value > most):
        rule = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {rule}, got {value!r}")
    return int(value)


def is_whole(value: object) -> bool:
    """Whether it is an integer of any kind, bool left out."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def is_size(value: object) -> bool:
    """The same, and torch's symbolic ones, which is_whole would fix to a number."""
    return not isinstance(value, bool) and (isinstance(value, (int, torch.SymInt)) or is_whole(value))


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless both are on one device."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {tensor.device}")


def check_not_expanded(name: str, tensor: Tensor) -> None:
    """Raise ValueError if elements share memory: what is written in place must have its own."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{name} must not be an expanded view, got strides {tensor.stride()}")


def mark_written(*tensors: Tensor) -> None:
    """Tell autograd of writes in place, as torch's own ops do: what has saved one of them refuses to go backward."""
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():  # the compiler knows the first only
        torch.autograd.graph.increment_version(tensors)


def refuse_grad(op: str, instead: str = "detach the tensor", /, **tensors: Tensor | None) -> None:
    """Raise RuntimeError if one of them requires grad or has a tangent, for an op without derivatives."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.requires_grad:
            raise RuntimeError(
                f"{op} has no gradient, but {name} requires grad: call it under torch.inference_mode() or "
                f"torch.no_grad(), or {instead}"
            )
        if has_tangent(tensor):
            raise RuntimeError(
                f"{op} has no gradient, but {name} has a tangent (of torch.func.jvp, for example), which would be "
                f"lost: pass torch.autograd.forward_ad.unpack_dual({name}).primal"
            )


def has_tangent(*args: object) -> bool:
    """Whether forward-mode AD gave a tangent to one of the tensors among `args`."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args)

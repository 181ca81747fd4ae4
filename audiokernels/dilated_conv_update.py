"""One step of a causal dilated Conv1d, for sample-by-sample generation with any such layer.

    out = bias + sum_k weight[:, :, k] x[t - (width - 1 - k) * dilation]

x[t] is the call's input, the earlier ones lie in `conv_state`, a ring that the caller owns: input t in slot
t mod (width - 1) * dilation. Le Paine et al., "Fast WaveNet generation algorithm" (arXiv 1611.09482). A step reads
the weights once and costs 2 * batch * dim_out * dim_in * width operations, whatever the dilation.
"""

import torch
from torch import Tensor

from audiokernels._checks import (
    check_dense,
    check_device,
    check_floating,
    check_not_expanded,
    is_size,
    mark_written,
    refuse_grad,
)
from audiokernels._library import C, lib
from audiokernels.backends import REFERENCE, Explanation, describe, implementation

lib.define(
    "dilated_conv_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor position, "
    "*, SymInt dilation) -> Tensor"
)


def dilated_conv_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor, *, dilation: int
) -> Tensor:
    """The next output of `nn.Conv1d(dim_in, dim_out, width, dilation=dilation)` over all inputs so far.

    Sums are float32 (float64 for float64). Call it under torch.inference_mode(): it has no gradient.

    Args:
        x: (batch, dim_in), float32, bfloat16, float16 or float64: the inputs of this step.
        conv_state: (batch, (width - 1) * dilation, dim_in), dtype of x: the ring of past inputs, zeros at the start;
            x takes the place of the oldest one. With width 1 it is empty.
        weight: (dim_out, dim_in, width), dtype of x, as nn.Conv1d has it; the last tap meets x.
        bias: (dim_out,), dtype of x, or None.
        position: (batch,) int32 >= 0, steps before this one; the caller adds 1 after every layer has seen it (and may
            take it modulo the ring's length). On a GPU a negative one is taken modulo the ring's length.
        dilation: >= 1, in samples.

    Returns:
        (batch, dim_out), dtype of x.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came; conv_state is unchanged then.
        RuntimeError: an input requires grad while grad mode is on.
    """
    if torch.is_grad_enabled():
        refuse_grad("dilated_conv_update", x=x, conv_state=conv_state, weight=weight, bias=bias)
    try:
        out = _op(x, conv_state, weight, bias, position, dilation=dilation)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        _check(x, conv_state, weight, bias, position, dilation)
        raise
    mark_written(conv_state)
    return out


def dilated_conv_update_ref(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor, *, dilation: int
) -> Tensor:
    """The same in plain torch, for any device."""
    _check(x, conv_state, weight, bias, position, dilation)
    batch, width = x.shape[0], weight.shape[2]
    taps = x[:, None]
    if width > 1:
        row = torch.arange(batch, device=x.device)
        steps = torch.arange(width - 1, device=x.device) * dilation
        slots = (position[:, None].long() + steps) % ((width - 1) * dilation)
        taps = torch.cat([conv_state[row[:, None], slots], taps], dim=1)
        conv_state[row, slots[:, 0]] = x
    accumulate = torch.promote_types(x.dtype, torch.float32)
    out = torch.einsum("bki,oik->bo", taps.to(accumulate), weight.to(accumulate))
    if bias is not None:
        out = out + bias
    return out.to(x.dtype)


def _check(x, conv_state, weight, bias, position, dilation) -> None:
    """Raise TypeError or ValueError for the first argument that breaks a rule of dilated_conv_update."""
    tensors = {"x": (x, 2), "conv_state": (conv_state, 3), "weight": (weight, 3), "position": (position, 1)}
    if bias is not None:
        tensors["bias"] = (bias, 1)
    for name, (tensor, ndim) in tensors.items():
        check_dense(name, tensor, ndim)
        check_device(name, tensor, "x", x)
    check_floating("x", x)
    for name, (tensor, _) in tensors.items():
        expected = torch.int32 if name == "position" else x.dtype
        if tensor.dtype != expected:
            what = "int32" if name == "position" else f"{expected}, the dtype of x"
            raise TypeError(f"{name} must be {what}, got {tensor.dtype}")
    if not is_size(dilation):
        raise TypeError(f"dilation must be an integer, got {type(dilation).__name__}")
    if not 1 <= dilation < 1 << 62:
        raise ValueError(f"dilation must be >= 1 (and below 2^62), got {dilation}")
    (batch, dim_in), (dim_out, weight_in, width) = x.shape, weight.shape
    if width < 1:
        raise ValueError(f"weight must have a width >= 1, got shape {tuple(weight.shape)}")
    if weight_in != dim_in:
        raise ValueError(f"weight must have dim_in = {dim_in} as x has it, got shape {tuple(weight.shape)}")
    shapes = {
        "conv_state": (conv_state, (batch, (width - 1) * dilation, dim_in), "(batch, (width - 1) * dilation, dim_in)"),
        "position": (position, (batch,), "(batch,)"),
        "bias": (bias, (dim_out,), "(dim_out,)"),
    }
    for name, (tensor, expected, rule) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must have shape {rule} = {expected}, got {tuple(tensor.shape)}")
    check_not_expanded("conv_state", conv_state)
    if type(position) is Tensor and position.device.type == "cpu" and batch > 0 and int(position.min()) < 0:
        raise ValueError(f"position must be >= 0, got {int(position.min())}")


def _fake(x, conv_state, weight, bias, position, *, dilation):
    if torch.is_grad_enabled():
        refuse_grad("dilated_conv_update", x=x, conv_state=conv_state, weight=weight, bias=bias)
    _check(x, conv_state, weight, bias, position, dilation)
    return x.new_empty(x.shape[0], weight.shape[0])


def _vmap(info, in_dims, x, conv_state, weight, bias, position, *, dilation):
    if in_dims[1] is None:
        raise ValueError("conv_state must be mapped by vmap: each mapped call writes its own")
    args = (x, conv_state, weight, bias, position)
    calls = [
        [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=False)]
        for i in range(info.batch_size)
    ]
    return torch.stack([_op(*call, dilation=dilation) for call in calls]), 0


def _describe(x, conv_state, weight, bias, position, *, dilation) -> Explanation:
    _check(x, conv_state, weight, bias, position, dilation)
    (batch, dim_in), (dim_out, _, width) = x.shape, weight.shape
    numbers = weight.numel() + dim_out + batch * (dim_in * (width + 1) + dim_out)
    device, float64 = x.device.type, x.dtype == torch.float64
    kernel, why = REFERENCE, implementation("dilated_conv_update", device)
    if not why.startswith(REFERENCE):
        cuda = device == "cuda"
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if cuda else 0
        kernel, why = C.dilated_conv_update_plan(cuda, float64, batch, dim_out, dim_in * width, multiprocessors)
    return Explanation(kernel, why, 2 * batch * dim_out * dim_in * width, numbers * x.element_size())


lib.impl("dilated_conv_update", dilated_conv_update_ref, "CompositeExplicitAutograd")
torch.library.register_fake("audiokernels::dilated_conv_update", _fake, lib=lib)
torch.library.register_vmap("audiokernels::dilated_conv_update", _vmap, lib=lib)
describe("dilated_conv_update", _describe)
_op = torch.ops.audiokernels.dilated_conv_update.default

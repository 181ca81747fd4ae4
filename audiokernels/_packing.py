"""Matrices in the order in which a generation step streams them; shared by the packs of all generators.

A matrix is stored transposed, outputs in lanes (rows padded to 16), inputs ascending, so that one pass over memory
multiplies a vector and no horizontal sum is ever needed:

    matrix      bias float32 (rows16), then
                float32:  (taps, K, rows16)
                float16, bfloat16: (taps, K / 2, rows16, 2)      K padded to even
                int8:     scale float32 (taps, rows16), offset int32 (taps, rows16), (taps, K / 4, rows16, 4)
                          weight = scale * int8, the scales with 11 significant bits;
                          K padded to a multiple of 4; offset = -128 * sum of the row, for kernels that feed
                          the activations as unsigned bytes

csrc/packed_product.h multiplies with them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

LANES = 16
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float16)
GROUP = {dtype: 4 // dtype.itemsize for dtype in DTYPES}  # inputs that lie side by side in one 32-bit lane
MAX_INPUTS = 65536  # 255 * 127 * inputs stays below 2^31


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def check_weights(weights: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise TypeError or ValueError unless these are the finite float tensors that are expected, on one device."""
    if set(weights) != set(expected):
        missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
        raise ValueError(f"weights must hold exactly {sorted(expected)}; missing {missing}, unknown {extra}")
    devices = set()
    for name, size in expected.items():
        tensor = weights[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"weights[{name!r}] must be a float tensor, got {getattr(tensor, 'dtype', type(tensor))}")
        if tuple(tensor.shape) != size:
            raise ValueError(f"weights[{name!r}] must have shape {size}, got {tuple(tensor.shape)}")
        known = tensor.clamp(min=0) if name == "out_bias" else tensor  # -infinity there: a class that is never drawn
        if not tensor.is_meta and not bool(known.isfinite().all()):
            raise ValueError(f"weights[{name!r}] must be finite, got NaN or infinity")
        devices.add(tensor.device)
    if len(devices) > 1:
        raise ValueError(f"weights must lie on one device, got {sorted(map(str, devices))}")


def check_bytes(name: str, data: Tensor, expected: int, room: str) -> None:
    """Raise TypeError or ValueError unless data is what <room>_pack makes: so many bytes, side by side."""
    if not isinstance(data, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(data).__name__}")
    if data.dtype != torch.uint8 or tuple(data.shape) != (expected,) or not data.is_contiguous():
        came = f"{data.dtype} of shape {tuple(data.shape)} and strides {data.stride()}"
        raise ValueError(f"{name} must hold {expected} bytes as {room}_pack made them, got {came}")


def matrix_bytes(dtype: torch.dtype, rows: int, taps: int, inputs: int) -> int:
    """Bytes of a matrix of `rows` (a multiple of 16) outputs."""
    group = GROUP[dtype]
    scales = 8 * taps * rows if dtype == torch.int8 else 0
    return 4 * rows + scales + taps * round_up(inputs, group) // group * rows * 4


def pad(x: Tensor, dim: int, multiple: int) -> Tensor:
    missing = round_up(x.shape[dim], multiple) - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)


def to_bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def pack_matrix(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """weight (rows, taps, inputs), bias (rows,), rows a multiple of 16 -> the matrix's sections as bytes."""
    group = GROUP[dtype]
    weight = pad(weight, 2, group)
    rows, taps, inputs = weight.shape
    sections = [bias]
    if dtype == torch.int8:
        scale = _int8_scale(weight.abs().amax(2).T.contiguous())
        quantized = (weight / torch.where(scale > 0, scale, 1).T[:, :, None]).round().clamp(-127, 127)
        sections += [scale, (-128 * quantized.sum(2)).to(torch.int32).T]
        weight = quantized
    lanes = weight.permute(1, 2, 0).reshape(taps, inputs // group, group, rows).transpose(2, 3)
    return [to_bytes(section) for section in (*sections, lanes.to(dtype))]


def _int8_scale(largest: Tensor) -> Tensor:
    """largest / 127, rounded up to 11 significant bits: float32 holds its products with int8 exactly, so that kernels
    that widen the weights to float16 round them once."""
    return (((largest / 127).view(torch.int32) + 0x1FFF) & ~0x1FFF).view(torch.float32)


def unpack_matrix(data: Tensor, rows: int, taps: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of pack_matrix in float32: weight (rows, taps, inputs) as the kernel sees it, bias (rows,)."""
    group = GROUP[dtype]
    scales = 4 * taps * rows if dtype == torch.int8 else 0
    parts = data.split([4 * rows, scales, scales, data.numel() - 4 * rows - 2 * scales])
    bias = parts[0].view(torch.float32)
    lanes = parts[3].view(dtype).reshape(taps, -1, rows, group).to(torch.float32)
    weight = lanes.permute(2, 0, 1, 3).reshape(rows, taps, -1)[:, :, :inputs]
    if dtype == torch.int8:
        weight = weight * parts[1].view(torch.float32).reshape(taps, rows).T[:, :, None]
    return weight, bias

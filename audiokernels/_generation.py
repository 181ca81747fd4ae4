"""What the generators share: the head of a state, and the checks of a call.

A state is one float32 tensor (batch, n): position % 2^20, position // 2^20, last code, 13 unused numbers, then what the
generator remembers. csrc/generation.h has the same constants.
"""

from typing import Any

import torch
from torch import Tensor

from audiokernels._checks import check_not_expanded, check_whole
from audiokernels._packing import check_bytes

HEADER = 16
POSITION_BASE = 1 << 20


def fresh_state(pack: Any, batch: int, floats: int) -> Tensor:
    """float32 (batch, floats) on the pack's device: position 0, last code n_class // 2, the rest zero."""
    batch = check_whole("batch", batch, 0)
    state = torch.zeros(batch, floats, dtype=torch.float32, device=pack.data.device)
    state[:, 2] = pack.shape.n_class // 2
    return state


def position_of(state: Tensor) -> Tensor:
    """Samples that each stream of a state has behind it: int64 (batch,)."""
    return state[:, 0].to(torch.int64) + POSITION_BASE * state[:, 1].to(torch.int64)


def write_header(state: Tensor, position: Tensor, code: Tensor) -> None:
    """Put position and last code, (batch,) each, into a state."""
    state[:, 0], state[:, 1], state[:, 2] = position % POSITION_BASE, position // POSITION_BASE, code


def condition_frames(shape: Any, state: Tensor, n: int) -> int:
    """Frames of condition that the next n samples touch, counted from the frame that holds the position."""
    if n == 0 or state.shape[0] == 0:
        return 0
    return int((position_of(state) % shape.hop + n - 1).max()) // shape.hop + 1


def check_generation(room, pack, floats, state, uniforms, codes, condition) -> None:
    """Raise TypeError or ValueError for the first argument of <room>_generate that breaks a rule of types or shapes.

    Looks at no tensor's values, and so does not wait for a GPU. floats: numbers of a row of state. The pack's shape has
    n_class, condition (channels), hop and pack_bytes().
    """
    shape = pack.shape
    check_bytes("pack", pack.data, shape.pack_bytes(), room)
    device = pack.data.device
    tensors = {"state": state, "uniforms": uniforms, "codes": codes, "condition": condition}
    for name, tensor in tensors.items():
        if tensor is None and name in ("codes", "condition"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if name == "codes":
            if tensor.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
                raise TypeError(f"codes must be uint8, int16, int32 or int64, got {tensor.dtype}")
        elif tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the pack's device {device}, got {tensor.device}")
        ndim = 3 if name == "condition" else 2
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")
    batch, n = uniforms.shape
    if state.shape != (batch, floats):
        expected = (batch, floats)
        raise ValueError(f"state must have shape {expected} for this pack and uniforms, got {tuple(state.shape)}")
    if state.numel() and state.stride(1) != 1:
        raise ValueError(f"state must be contiguous along its last dimension, got strides {state.stride()}")
    check_not_expanded("state", state)
    if codes is not None and (codes.shape[0] != batch or codes.shape[1] > n):
        raise ValueError(f"codes must have shape ({batch}, m <= {n}), got {tuple(codes.shape)}")
    if (condition is None) != (shape.condition == 0):
        came = "None" if condition is None else f"shape {tuple(condition.shape)}"
        raise ValueError(f"condition must be given exactly for a pack with condition channels, got {came}")


def check_frames(shape: Any, condition: Tensor, batch: int, n: int) -> None:
    """Raise ValueError unless condition has as many frames as n samples touch, wherever in a frame they begin."""
    least, most = (n - 1) // shape.hop + 1, (n + shape.hop - 2) // shape.hop + 1
    frames = condition.shape[1]
    if n and ((condition.shape[0], condition.shape[2]) != (batch, shape.condition) or not least <= frames <= most):
        expected = f"({batch}, {least} .. {most}, {shape.condition})"
        raise ValueError(f"condition must have shape {expected} (hop {shape.hop}), got {tuple(condition.shape)}")


def check_values(room, shape, state, uniforms, codes, condition) -> None:
    """The same for what tensors hold, and for the frames of condition, which depend on the position."""
    if uniforms.numel() and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        worst = uniforms[~((uniforms >= 0) & (uniforms < 1))][0].item()
        raise ValueError(f"uniforms must be in [0, 1), got {worst}")
    if codes is not None and codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < shape.n_class):
        raise ValueError(f"codes must be in 0 .. {shape.n_class - 1}, got {int(codes.min())} .. {int(codes.max())}")
    header = state[:, :3]
    if header.numel() and not bool(((header >= 0) & (header == header.floor()) & (header < 2**24)).all()):
        raise ValueError(f"state must come from {room}_state: its header does not hold a position and a code")
    if header.numel() and (float(header[:, 2].max()) >= shape.n_class or float(header[:, 0].max()) >= POSITION_BASE):
        raise ValueError(
            f"state must belong to a pack of {shape.n_class} classes, got code {float(header[:, 2].max())}"
        )
    if condition is not None:
        batch, n = uniforms.shape
        expected = (batch, condition_frames(shape, state, n), shape.condition)
        if tuple(condition.shape) != expected:
            raise ValueError(f"condition must have shape {expected} (hop {shape.hop}), got {tuple(condition.shape)}")

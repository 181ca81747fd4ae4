"""Sample-level transformer generation: one call draws n samples of `batch` streams.

    x   = embedding[last code] (+ fused context code, + W condition, + sinusoidal position)
    x  += W_proj attention(q, k, v) + b,    q, k, v = W_qkv norm(x) + b,   q and k turned by the position (rotary)
    x  += W_down relu(W_up norm(x) + b) + b,    where asked for x = haar_pool(x, mode="causal"); n_layer times
    logits = W_out norm(x) + b (+ fused context code),    code = inverse CDF of softmax(logits / T) at u

A query sees its own position and the window - 1 before it: their keys and values are kept in a ring a layer, so that
the steps compute exactly the full forward pass with a window. The context network is a stack of causal convolutions
over the codes, in the form that slides with the sample: the strides of its layers become dilations, and each keeps a
ring of its past inputs. Verma & Chafe, "A generative model for raw audio using transformer architectures" (arXiv
2106.16036); rotary positions: Su et al., "RoFormer" (2104.09864). A step reads the weights and the ring once: at 128
channels and a window of 1600, 0.8 MB and 1.6 MB a layer in float32.
"""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from audiokernels._checks import mark_written, refuse_grad
from audiokernels._generation import (
    HEADER,
    check_frames,
    check_generation,
    check_values,
    fresh_state,
    position_of,
    write_header,
)
from audiokernels._library import lib
from audiokernels._packing import LANES, round_up
from audiokernels.backends import REFERENCE, Explanation, describe, implementation
from audiokernels.sampling import Sampling
from audiokernels.transformer_pack import KEY_BLOCK, TransformerPack, TransformerShape, transformer_unpack
from audiokernels.transformer_plan import gpu_facts, read_once, transformer_generate_plan

lib.define(
    "transformer_generate(Tensor weights, int[] shape, Tensor(a!) state, Tensor uniforms, Tensor? codes, "
    "Tensor? condition, float temperature, bool return_logits, SymInt? top_k=None, float? top_p=None) -> "
    "(Tensor, Tensor)"
)
lib.define(  # the kernel for GPUs; plan: TransformerPlan.to_ints()
    "_transformer_generate_cuda(Tensor weights, int[] shape, Tensor(a!) state, Tensor uniforms, Tensor? codes, "
    "Tensor? condition, float temperature, bool return_logits, SymInt? top_k, float? top_p, SymInt[] plan) -> "
    "(Tensor, Tensor)"
)
lib.define(  # that the device runs at once
    "_transformer_clusters(Tensor device, SymInt blocks, SymInt shared_bytes) -> SymInt"
)

NORM_EPSILON = 1e-5
ROTARY_BASE = 10000.0


def state_sections(shape: TransformerShape) -> list[tuple[str, int]]:
    """(name, float32 numbers) of the parts of a state's row, in order.

    context.i   (slots, X16): the ring of past inputs of a layer of the context network
    k.i         (H, capacity / 64, D / g, 64, g), g = 1 in float32 and 2 in bfloat16, two of which are one number here
    v.i         (H, capacity / g, D16, g)
    haar.i      of each run with a level > 0: (2^level, count), a ring of past rows
    """
    sections = [("header", HEADER)]
    for layer, (width, dilation) in enumerate(zip(shape.widths, shape.dilations, strict=True)):
        sections.append((f"context.{layer}", (width - 1) * dilation * round_up(shape.context, LANES)))
    slots, per_number = shape.n_head * shape.capacity, 4 // shape.cache_dtype.itemsize
    for layer in range(shape.n_layer):
        sections.append((f"k.{layer}", slots * shape.headdim // per_number))
        sections.append((f"v.{layer}", slots * shape.head_rows // per_number))
        if shape.haar:
            runs = zip(shape.haar[::2], shape.haar[1::2], strict=True)
            sections.append((f"haar.{layer}", sum(count << level for level, count in runs if level)))
    return sections


def state_floats(shape: TransformerShape) -> int:
    """float32 numbers of state a stream."""
    return sum(size for _, size in state_sections(shape))


def transformer_state(pack: TransformerPack, batch: int) -> Tensor:
    """A fresh state for `batch` streams: position 0, last code n_class // 2, all history empty.

    Returns:
        float32 (batch, n) on the pack's device. Row b is stream b, whole: index, clone, cat, save and restore rows
        freely. It belongs to its pack: where the cache is bfloat16, two of its numbers lie in one float32.
    """
    if not isinstance(pack, TransformerPack):
        raise TypeError(f"pack must be a TransformerPack, got {type(pack).__name__}")
    return fresh_state(pack, batch, state_floats(pack.shape))


def transformer_position(state: Tensor) -> Tensor:
    """Samples that each stream of a state has behind it: int64 (batch,)."""
    return position_of(state)


@overload
def transformer_generate(
    pack: TransformerPack, state: Tensor, uniforms: Tensor, *,
    codes: Tensor | None = None, condition: Tensor | None = None, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, return_logits: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def transformer_generate(
    pack: TransformerPack, state: Tensor, uniforms: Tensor, *,
    codes: Tensor | None = None, condition: Tensor | None = None, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, return_logits: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def transformer_generate(
    pack: TransformerPack, state: Tensor, uniforms: Tensor, *,
    codes: Tensor | None = None, condition: Tensor | None = None, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, return_logits: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def transformer_generate(
    pack: TransformerPack,
    state: Tensor,
    uniforms: Tensor,
    *,
    codes: Tensor | None = None,
    condition: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    return_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw the next n samples of every stream and advance `state` in place.

    Args:
        pack: from transformer_pack.
        state: from transformer_state (or an earlier call), float32 (batch, ...), on the pack's device; mutated.
        uniforms: float32 (batch, n) in [0, 1): one number draws one sample (see philox_uniform).
        codes: integer (batch, m), m <= n: known codes, forced on the first m steps: a prompt, or teacher forcing with
            m = n.
        condition: float32 (batch, frames, condition_channels), raw; frame i holds for samples i * hop ..
            (i + 1) * hop - 1 of the stream. Pass the frames that these n samples touch, the first one being that of
            the state's position. (On a GPU the position is not asked for: one frame too many is ignored, and where
            one is missing, the last one holds on.)
        temperature: >= 0; logits are divided by it; 0 takes the largest logit.
        top_k, top_p: draw only from the k most probable classes, then only from the smallest set of most probable ones
            that holds the share p of what is left; see Sampling.
        return_logits: also return the logits.

    Returns:
        codes (batch, n), uint8 up to 256 classes, int16 above; with return_logits also float32
        (batch, n, n_class), the logits from which codes[:, t] was drawn.
        On one kernel the codes do not depend on chunking, batch position or threads; on the CPU in float32 and int8
        not on the instruction set either, on a GPU not on the number of blocks. There the call returns before they are
        drawn, and numbers out of range in uniforms, codes or the state, which are errors on the CPU, give codes that
        mean nothing.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came; the state is unchanged then.
        RuntimeError: an input requires grad while grad mode is on (generation has no gradient).
    """
    if torch.is_grad_enabled():
        refuse_grad("transformer_generate", state=state, uniforms=uniforms, condition=condition)
    try:
        shape = pack.shape.to_ints()
        out, logits = _op(pack.data, shape, state, uniforms, codes, condition, temperature, return_logits, top_k, top_p)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        Sampling(temperature, top_k, top_p)
        check_call(pack, state, uniforms, codes, condition)
        raise
    mark_written(state)
    return (out, logits) if return_logits else out


def check_call(pack, state, uniforms, codes, condition) -> None:
    """Raise TypeError or ValueError for the first argument that breaks a rule; Sampling checks its own."""
    check_arguments(pack, state, uniforms, codes, condition)
    check_values("transformer", pack.shape, state, uniforms, codes, condition)


def check_arguments(pack, state, uniforms, codes, condition) -> None:
    """The part of check_call that looks at no tensor's values, and so does not wait for a GPU."""
    if not isinstance(pack, TransformerPack):
        raise TypeError(f"pack must be a TransformerPack, got {type(pack).__name__}")
    check_generation("transformer", pack, state_floats(pack.shape), state, uniforms, codes, condition)


# ---- the reference


def transformer_generate_ref(
    data: Tensor,
    shape_ints: list[int],
    state: Tensor,
    uniforms: Tensor,
    codes: Tensor | None,
    condition: Tensor | None,
    temperature: float,
    return_logits: bool,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The op in plain torch, any device: float32 arithmetic on the pack's weights, one step at a time."""
    shape = TransformerShape.from_ints(shape_ints)
    sampling = Sampling(temperature, top_k, top_p)
    check_call(TransformerPack(data, shape), state, uniforms, codes, condition)
    batch, n = uniforms.shape
    out = torch.empty(batch, n, dtype=shape.code_dtype, device=data.device)
    logits_out = uniforms.new_empty((batch, n, shape.n_class) if return_logits else (0,))
    if batch == 0 or n == 0:
        return out, logits_out
    step = _Step(shape, transformer_unpack(data, shape), state)
    forced = 0 if codes is None else codes.shape[1]
    position, code = position_of(state), state[:, 2].to(torch.int64)
    first = torch.div(position, shape.hop, rounding_mode="floor")
    for t in range(n):
        frame = None
        if condition is not None:
            touched = torch.div(position, shape.hop, rounding_mode="floor") - first
            frame = condition[torch.arange(batch, device=data.device), touched]
        logits = step(position, code, frame)
        code = codes[:, t].to(torch.int64) if t < forced else sampling.draw(logits, uniforms[:, t])
        out[:, t] = code.to(out.dtype)
        if return_logits:
            logits_out[:, t] = logits
        position = position + 1
    write_header(state, position, code)
    return out, logits_out


class _Step:
    """One step of every stream: step(position (batch,), last code (batch,), frame (batch, C) or None) -> logits."""

    def __init__(self, shape: TransformerShape, w: dict[str, tuple[Tensor, Tensor]], state: Tensor):
        self.shape, self.w = shape, w
        self.rows = torch.arange(state.shape[0], device=state.device)
        names, sizes = zip(*state_sections(shape), strict=True)
        self.ring = dict(zip(names, state.split(sizes, 1), strict=True))

    def __call__(self, position: Tensor, code: Tensor, frame: Tensor | None) -> Tensor:
        s, w, late = self.shape, self.w, 0.0
        x = w["embedding"][0][code]
        if s.widths:
            fused = F.linear(self.context(position, w["context"][0][code]), *w["fuse"])
            if s.fusion == "logits":
                late = fused[:, : s.n_class]
            elif s.fusion == "add":
                x = x + fused[:, : s.n_embd]
            else:
                scale, shift = fused.unflatten(1, (2, -1))[:, :, : s.n_embd].unbind(1)
                x = x + x * scale + shift
        if frame is not None:
            x = x + frame @ w["condition"][0]
        cos, sin = angles(position, s.headdim if s.positions == "rotary" else s.n_embd)
        if s.positions == "sinusoidal":
            x = x + torch.cat([sin, cos], 1)[:, : s.n_embd]
        for layer in range(s.n_layer):
            attended = self.attend(layer, position, F.linear(_norm(x), *w[f"qkv.{layer}"]), cos, sin)
            x = x + F.linear(attended, *w[f"proj.{layer}"])[:, : s.n_embd]
            inner = F.relu(F.linear(_norm(x), *w[f"up.{layer}"]))[:, : s.n_inner]
            x = x + F.linear(inner, *w[f"down.{layer}"])[:, : s.n_embd]
            if s.haar:
                x = self.pool(layer, position, x)
        return F.linear(_norm(x), *w["out"])[:, : s.n_class] + late

    def context(self, position: Tensor, x: Tensor) -> Tensor:
        """The context network's code (batch, Y): its rings move by a step."""
        for layer, (width, d) in enumerate(zip(self.shape.widths, self.shape.dilations, strict=True)):
            weight, bias = self.w[f"context.{layer}"]
            taps, length = [x], (width - 1) * d
            if length:
                ring = self.ring[f"context.{layer}"].unflatten(1, (length, -1))[:, :, : self.shape.context]
                taps = [ring[self.rows, (position - (width - 1 - k) * d) % length] for k in range(width - 1)] + taps
                ring[self.rows, position % length] = x
            x = F.relu(F.linear(torch.cat(taps, 1), weight.flatten(1), bias))
            x = x[:, : self.shape.context if layer + 1 < len(self.shape.widths) else self.shape.code]
        return x

    def attend(self, layer: int, position: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """qkv (batch, 3 * H * D16) -> (batch, H * D16); the position's key and value enter the cache first."""
        s, batch = self.shape, len(self.rows)
        q, k, v = qkv.view(batch, 3, s.n_head, s.head_rows).unbind(1)
        q, k = q[..., : s.headdim], k[..., : s.headdim]
        if s.positions == "rotary":
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        g = 4 // s.cache_dtype.itemsize
        k_shape = (s.n_head, s.capacity // KEY_BLOCK, s.headdim // g, KEY_BLOCK, g)
        keys = self.ring[f"k.{layer}"].view(s.cache_dtype).unflatten(1, k_shape)
        values = self.ring[f"v.{layer}"].view(s.cache_dtype).unflatten(1, (s.n_head, s.capacity // g, s.head_rows, g))
        slot = position % s.capacity
        keys[self.rows, :, slot // KEY_BLOCK, :, slot % KEY_BLOCK] = k.unflatten(2, (-1, g)).to(s.cache_dtype)
        values[self.rows, :, slot // g, :, slot % g] = v.to(s.cache_dtype)
        keys = keys.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3).float()  # (batch, H, capacity, D)
        values = values.transpose(3, 4).flatten(2, 3).float()  # (batch, H, capacity, D16)
        age = (position[:, None] - torch.arange(s.capacity, device=slot.device)) % s.capacity
        seen = (age < s.window) & (age <= position[:, None])
        scores = torch.einsum("bhd,bhsd->bhs", q, keys).masked_fill(~seen[:, None], -torch.inf)
        return torch.einsum("bhs,bhsd->bhd", scores.softmax(2), values).flatten(1)

    def pool(self, layer: int, position: Tensor, x: Tensor) -> Tensor:
        """Causal Haar pooling: the mean of the last 2^level rows of every channel."""
        pooled, channel, at = [], 0, 0
        for level, count in zip(self.shape.haar[::2], self.shape.haar[1::2], strict=True):
            part, size = x[:, channel : channel + count], count << level
            if level:
                ring = self.ring[f"haar.{layer}"][:, at : at + size].unflatten(1, (1 << level, count))
                ring[self.rows, position % (1 << level)] = part
                part, at = ring.mean(1), at + size
            pooled.append(part)
            channel += count
        return torch.cat(pooled, 1)


def angles(position: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """cos and sin (..., ceil(channels / 2)) float32 of position * base^(-2i / channels), the angle in float64."""
    i = torch.arange(0, channels, 2, device=position.device, dtype=torch.float64)
    angle = position[..., None] * ROTARY_BASE ** (-i / channels)
    return angle.cos().float(), angle.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)


# ---- registrations


def _fake(data, shape_ints, state, uniforms, codes, condition, temperature, return_logits, *_):
    shape = TransformerShape.from_ints(shape_ints)
    torch._check(state.device == data.device and uniforms.device == data.device, lambda: "tensors on several devices")
    batch, n = uniforms.shape
    out = uniforms.new_empty((batch, n), dtype=shape.code_dtype)
    return out, uniforms.new_empty((batch, n, shape.n_class) if return_logits else (0,))


def _launch(data, shape_ints, state, uniforms, codes, condition, temperature, return_logits, *tops):
    """The op on a CUDA device: the kernel that the plan names. Waits for nothing, so that a graph can capture it."""
    shape = TransformerShape.from_ints(shape_ints)
    top_k, top_p = (*tops, None, None)[:2]  # the dispatcher leaves out what has its default
    Sampling(temperature, top_k, top_p)
    check_arguments(TransformerPack(data, shape), state, uniforms, codes, condition)
    if condition is not None:
        check_frames(shape, condition, *uniforms.shape)
    arguments = (data, shape_ints, state, uniforms, codes, condition, temperature, return_logits, top_k, top_p)
    plan = transformer_generate_plan(shape, uniforms.shape[0], gpu_facts(uniforms.device))
    if plan.kernel == REFERENCE:
        return transformer_generate_ref(*arguments)
    return _cuda_op(*arguments, plan.to_ints())


def _explain(pack: TransformerPack, state: Tensor, uniforms: Tensor, **options) -> Explanation:
    check_arguments(pack, state, uniforms, options.get("codes"), options.get("condition"))
    (batch, n), shape, device = uniforms.shape, pack.shape, pack.data.device.type
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in (shape.dtype, shape.cache_dtype))
    served, reads, once = implementation("transformer_generate", device), 1, 0  # of the pack, a step; bytes, a call
    if served.startswith(REFERENCE):
        kernel, why = REFERENCE, served.removeprefix(f"{REFERENCE}: ")
    elif device == "cpu":
        kernel = f"{served.removesuffix(')')}, {names} cache)"
        why = f"the compiled CPU kernel; {min(batch, torch.get_num_threads())} thread(s), each with a part of the batch"
    else:
        plan = transformer_generate_plan(shape, batch, gpu_facts(uniforms.device))
        kernel, why, reads, once = plan.kernel, plan.why, max(1, batch), read_once(shape, plan.resident)
        if kernel != REFERENCE:
            kernel += f" ({names} cache)"
            why += f"; {batch * plan.blocks} block(s) of {plan.shared_bytes:,} shared bytes"
    n_bytes = (pack.data.numel() * reads + batch * shape.cache_bytes()) * n - once * reads * max(0, n - 1)
    return Explanation(kernel, why, 2 * shape.macs() * batch * n, n_bytes)


def _has_cuda_kernels() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("audiokernels::_transformer_generate_cuda", "CUDA")


lib.impl("transformer_generate", transformer_generate_ref, "CompositeExplicitAutograd")
if _has_cuda_kernels():
    lib.impl("transformer_generate", _launch, "CUDA")
torch.library.register_fake("audiokernels::transformer_generate", _fake, lib=lib)
torch.library.register_fake("audiokernels::_transformer_generate_cuda", _fake, lib=lib)
torch.library.register_fake("audiokernels::_transformer_clusters", lambda device, blocks, shared_bytes: 0, lib=lib)
describe("transformer_generate", _explain)
_op = torch.ops.audiokernels.transformer_generate.default
_cuda_op = torch.ops.audiokernels._transformer_generate_cuda.default

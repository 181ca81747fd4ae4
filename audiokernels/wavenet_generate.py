"""WaveNet generation: one call draws n samples of `batch` streams, one pass over packed weights a sample.

    x_0 = embedding[last code]
    z   = sum_k W_k x_l[t - (width - 1 - k) d_l] + b_l + V_l condition,   h = tanh(z_a) * sigmoid(z_b)
    x_l+1 = x_l + W_res h + b_res,    skip += W_skip h + b_skip
    logits = W_out relu(W_head relu(skip) + b_head) + b_out,    code = inverse CDF of softmax(logits / T) at u

van den Oord et al., "WaveNet: a generative model for raw audio" (arXiv 1609.03499); the ring of past layer inputs is
that of Le Paine et al., "Fast WaveNet generation algorithm" (arXiv 1611.09482): O(layers) a sample instead of
O(2^layers). The cost of a sample is reading the weights once (3.5 MB in float32 at 20 layers of 64 channels).
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
from audiokernels._library import C, C_error, lib
from audiokernels._packing import LANES, round_up
from audiokernels.backends import REFERENCE, Explanation, describe, implementation
from audiokernels.sampling import Sampling
from audiokernels.wavenet_pack import WaveNetPack, WaveNetShape, wavenet_unpack
from audiokernels.wavenet_plan import WaveNetPlan, gpu_facts, wavenet_generate_plan

lib.define(
    "wavenet_generate(Tensor weights, int[] shape, Tensor(a!) state, Tensor uniforms, Tensor? codes, "
    "Tensor? condition, float temperature, bool return_logits, SymInt? top_k=None, float? top_p=None) -> "
    "(Tensor, Tensor)"
)
lib.define(  # the kernels for GPUs; plan: WaveNetPlan.to_ints()
    "_wavenet_generate_cuda(Tensor weights, int[] shape, Tensor(a!) state, Tensor uniforms, Tensor? codes, "
    "Tensor? condition, float temperature, bool return_logits, SymInt? top_k, float? top_p, SymInt[] plan) -> "
    "(Tensor, Tensor)"
)
lib.define(  # the cluster kernel, counting cycles; see wavenet_stages.py
    "_wavenet_stages(Tensor weights, int[] shape, Tensor(a!) state, Tensor uniforms, SymInt[] plan, Tensor(b!) stages)"
    " -> ()"
)
lib.define("_wavenet_clusters(Tensor device, int[] shape, SymInt[] plan) -> SymInt")  # that the device runs at once


def state_floats(shape: WaveNetShape) -> int:
    """float32 numbers of state a stream."""
    return HEADER + (shape.width - 1) * sum(shape.dilations) * round_up(shape.residual, LANES)


def wavenet_state(pack: WaveNetPack, batch: int) -> Tensor:
    """A fresh state for `batch` streams: position 0, last code n_class // 2, all history zero.

    Returns:
        float32 (batch, n) on the pack's device. Row b is stream b, whole: index, clone, cat, save and restore rows
        freely. It does not depend on the pack's dtype, only on its sizes.
    """
    if not isinstance(pack, WaveNetPack):
        raise TypeError(f"pack must be a WaveNetPack, got {type(pack).__name__}")
    return fresh_state(pack, batch, state_floats(pack.shape))


def wavenet_position(state: Tensor) -> Tensor:
    """Samples that each stream of a state has behind it: int64 (batch,)."""
    return position_of(state)


@overload
def wavenet_generate(
    pack: WaveNetPack, state: Tensor, uniforms: Tensor, *,
    codes: Tensor | None = None, condition: Tensor | None = None, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, return_logits: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def wavenet_generate(
    pack: WaveNetPack, state: Tensor, uniforms: Tensor, *,
    codes: Tensor | None = None, condition: Tensor | None = None, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, return_logits: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def wavenet_generate(
    pack: WaveNetPack, state: Tensor, uniforms: Tensor, *,
    codes: Tensor | None = None, condition: Tensor | None = None, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, return_logits: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def wavenet_generate(
    pack: WaveNetPack,
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
        pack: from wavenet_pack.
        state: from wavenet_state (or an earlier call), float32 (batch, ...), on the pack's device; mutated.
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
        On one kernel the codes do not depend on chunking, batch position or threads; on the CPU in all but bfloat16
        not on the instruction set either. On a GPU the call returns before they are drawn, and numbers out of range in
        uniforms, codes or the state, which are errors on the CPU, give codes that mean nothing.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came; the state is unchanged then.
        RuntimeError: an input requires grad while grad mode is on (generation has no gradient).
    """
    if torch.is_grad_enabled():
        refuse_grad("wavenet_generate", state=state, uniforms=uniforms, condition=condition)
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
    check_values("wavenet", pack.shape, state, uniforms, codes, condition)


def check_arguments(pack, state, uniforms, codes, condition) -> None:
    """The part of check_call that looks at no tensor's values, and so does not wait for a GPU."""
    if not isinstance(pack, WaveNetPack):
        raise TypeError(f"pack must be a WaveNetPack, got {type(pack).__name__}")
    check_generation("wavenet", pack, state_floats(pack.shape), state, uniforms, codes, condition)


def wavenet_generate_ref(
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
    shape = WaveNetShape.from_ints(shape_ints)
    sampling = Sampling(temperature, top_k, top_p)
    check_call(WaveNetPack(data, shape), state, uniforms, codes, condition)
    batch, n = uniforms.shape
    out = torch.empty(batch, n, dtype=shape.code_dtype, device=data.device)
    logits_out = uniforms.new_empty((batch, n, shape.n_class) if return_logits else (0,))
    if batch == 0 or n == 0:
        return out, logits_out
    w = wavenet_unpack(data, shape)
    forced = 0 if codes is None else codes.shape[1]
    rows, row_floats = torch.arange(batch, device=data.device), round_up(shape.residual, LANES)
    position, code = position_of(state), state[:, 2].to(torch.int64)
    start, taps = position.clone(), range(shape.width - 1)
    lengths = [(shape.width - 1) * d for d in shape.dilations]
    rings = [
        ring.unflatten(1, (-1, row_floats))[:, :, : shape.residual] if ring.shape[1] else None
        for ring in state[:, HEADER:].split([row_floats * length for length in lengths], 1)
    ]
    for t in range(n):
        x, skip = w["embedding"][code], 0.0
        for layer, (d, ring, length) in enumerate(zip(shape.dilations, rings, lengths, strict=True)):
            # A ring of (width - 1) d slots: the sample j d steps back lies j d slots behind the one to be written.
            window = [ring[rows, (position - (shape.width - 1 - k) * d) % length] for k in taps] + [x]
            z = F.linear(torch.stack(window, 2).flatten(1), w["conv_weight"][layer].flatten(1), w["conv_bias"][layer])
            if condition is not None:
                frame = torch.div(position, shape.hop, rounding_mode="floor") - torch.div(
                    start, shape.hop, rounding_mode="floor"
                )
                z = z + F.linear(condition[rows, frame], w["condition_weight"][layer])
            if ring is not None:
                ring[rows, position % length] = x
            a, b = z.chunk(2, 1)
            h = torch.tanh(a) * torch.sigmoid(b)
            skip = skip + F.linear(h, w["skip_weight"][layer], w["skip_bias"][layer])
            if layer + 1 < len(rings):
                x = x + F.linear(h, w["res_weight"][layer], w["res_bias"][layer])
        head = F.relu(F.linear(F.relu(skip), w["head_weight"], w["head_bias"]))
        logits = F.linear(head, w["out_weight"], w["out_bias"])
        code = codes[:, t].to(torch.int64) if t < forced else sampling.draw(logits, uniforms[:, t])
        out[:, t] = code.to(out.dtype)
        if return_logits:
            logits_out[:, t] = logits
        position = position + 1
    write_header(state, position, code)
    return out, logits_out


def _fake(data, shape_ints, state, uniforms, codes, condition, temperature, return_logits, *_):
    shape = WaveNetShape.from_ints(shape_ints)
    torch._check(state.device == data.device and uniforms.device == data.device, lambda: "tensors on several devices")
    batch, n = uniforms.shape
    out = uniforms.new_empty((batch, n), dtype=shape.code_dtype)
    return out, uniforms.new_empty((batch, n, shape.n_class) if return_logits else (0,))


def _launch(data, shape_ints, state, uniforms, codes, condition, temperature, return_logits, *tops):
    """The op on a CUDA device: the kernel that the plan names. Waits for nothing, so that a graph can capture it."""
    shape = WaveNetShape.from_ints(shape_ints)
    top_k, top_p = (*tops, None, None)[:2]  # the dispatcher leaves out what has its default
    Sampling(temperature, top_k, top_p)
    check_arguments(WaveNetPack(data, shape), state, uniforms, codes, condition)
    if condition is not None:
        check_frames(shape, condition, *uniforms.shape)
    plan = _plan(shape, uniforms)
    arguments = (data, shape_ints, state, uniforms, codes, condition, temperature, return_logits, top_k, top_p)
    if plan.kernel == REFERENCE:
        return wavenet_generate_ref(*arguments)
    return _cuda_op(*arguments, plan.to_ints())


def _plan(shape: WaveNetShape, uniforms: Tensor) -> WaveNetPlan:
    return wavenet_generate_plan(shape, uniforms.shape[0], gpu_facts(uniforms.device))


def _explain(pack: WaveNetPack, state: Tensor, uniforms: Tensor, **options) -> Explanation:
    check_arguments(pack, state, uniforms, options.get("codes"), options.get("condition"))
    batch, n = uniforms.shape
    name = str(pack.shape.dtype).removeprefix("torch.")
    reads = n  # of the pack
    if pack.data.device.type == "cpu" and C is not None:
        threads = min(batch, torch.get_num_threads())
        kernel = f"C++ ({C.isa()}, {name})"
        why = f"the compiled CPU kernel; {threads} thread(s), each with a part of the batch"
    elif pack.data.device.type == "cuda" and _has_cuda_kernels():
        plan = _plan(pack.shape, uniforms)
        kernel = REFERENCE if plan.kernel == REFERENCE else f"{plan.kernel} ({name})"
        why, reads = (
            f"{plan.why}; {plan.blocks} block(s) of {plan.shared_bytes:,} shared bytes",
            n * max(1, plan.blocks),
        )
    else:
        kernel, why = REFERENCE, C_error or implementation("wavenet_generate", pack.data.device.type)
    return Explanation(kernel, why, 2 * pack.shape.macs() * batch * n, pack.data.numel() * reads)


def _has_cuda_kernels() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("audiokernels::_wavenet_generate_cuda", "CUDA")


lib.impl("wavenet_generate", wavenet_generate_ref, "CompositeExplicitAutograd")
if _has_cuda_kernels():
    lib.impl("wavenet_generate", _launch, "CUDA")
torch.library.register_fake("audiokernels::wavenet_generate", _fake, lib=lib)
torch.library.register_fake("audiokernels::_wavenet_clusters", lambda device, shape, plan: 0, lib=lib)
torch.library.register_fake("audiokernels::_wavenet_stages", lambda *call: None, lib=lib)
torch.library.register_fake("audiokernels::_wavenet_generate_cuda", _fake, lib=lib)
describe("wavenet_generate", _explain)
_op = torch.ops.audiokernels.wavenet_generate.default
_cuda_op = torch.ops.audiokernels._wavenet_generate_cuda.default

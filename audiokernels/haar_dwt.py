"""The orthonormal Haar wavelet transform along time, and its inverse.

    a_0 = x,    a_{l+1}[k] = (a_l[2k] + a_l[2k+1]) / sqrt(2),    d_{l+1}[k] = (a_l[2k] - a_l[2k+1]) / sqrt(2)

for l = 0 .. J - 1, packed along time as [a_J | d_J | d_{J-1} | ... | d_1]. Haar 1910; Mallat 1989. The values are those
of pywt.wavedec(x, "haar", level=J) where 2^J divides the length; else the end is padded once to a multiple of 2^J. The
transform is orthonormal: each is the other's inverse and backward. It costs the reading of x and the writing of the
coefficients, 2 (1 - 2^-J) additions an element. The mean over blocks of 2^l steps is 2^(-l/2) a_l: haar_pool's.

`edge` is pad "edge" (the last step repeated), else zeros; the results are contiguous.
"""

import torch
from torch import Tensor

from audiokernels._checks import is_size
from audiokernels._library import lib, register_autograd, triton_launcher
from audiokernels.backends import Explanation, describe
from audiokernels.haar_pool import check_input, kernel_of

lib.define("haar_dwt(Tensor x, SymInt n_levels, *, bool edge=False) -> Tensor")
lib.define("haar_idwt(Tensor coeffs, SymInt n_levels, *, SymInt? seqlen=None) -> Tensor")

MAX_LEVELS = 30


def haar_dwt(x: Tensor, n_levels: int, *, pad: str = "zero") -> Tensor:
    """Haar coefficients of every channel along time.

    Sums are float32 (float64 for float64), rounded once. Differentiable any number of times.

    Args:
        x: (batch, seqlen, dim), float32, bfloat16, float16 or float64, any strides.
        n_levels: J, 0..30.
        pad: how the end is padded to a multiple of 2^J steps: "zero" or "edge" (the last step repeated).

    Returns:
        (batch, padded seqlen, dim), dtype of x, contiguous: [a_J | d_J | ... | d_1] along time; a_J and d_J have
        padded / 2^J steps, d_l has padded / 2^l.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """
    if pad not in ("zero", "edge"):
        raise ValueError(f'pad must be "zero" or "edge", got {pad!r}')
    _check(x, n_levels)
    return _op(x, n_levels, edge=pad == "edge")


def haar_dwt_ref(x: Tensor, n_levels: int, *, edge: bool = False) -> Tensor:
    """haar_dwt in plain torch, for any device."""
    _check(x, n_levels)
    more = _padded(x.shape[1], n_levels) - x.shape[1]
    a = x.to(torch.promote_types(x.dtype, torch.float32))
    if more:
        a = torch.cat([a, a[:, -1:].expand(-1, more, -1) if edge else a.new_zeros(a.shape[0], more, a.shape[2])], 1)
    parts = []
    for _ in range(n_levels):
        even, odd = a[:, 0::2], a[:, 1::2]
        a, d = (even + odd) * 0.5**0.5, (even - odd) * 0.5**0.5
        parts.append(d)
    return torch.cat([a, *reversed(parts)], 1).to(x.dtype, copy=True, memory_format=torch.contiguous_format)


def haar_idwt(coeffs: Tensor, n_levels: int, *, seqlen: int | None = None) -> Tensor:
    """The sequence whose haar_dwt is `coeffs`.

    Args:
        coeffs: (batch, padded seqlen, dim) as haar_dwt returns them.
        n_levels: J, 0..30; 2^J divides the padded length.
        seqlen: steps of the result, all by default; the padding to a multiple of 2^J must give the padded length.

    Returns:
        (batch, seqlen, dim), dtype of coeffs, contiguous.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """
    _check_inverse(coeffs, n_levels, seqlen=seqlen)
    return _inverse_op(coeffs, n_levels, seqlen=seqlen)


def haar_idwt_ref(coeffs: Tensor, n_levels: int, *, seqlen: int | None = None) -> Tensor:
    """haar_idwt in plain torch, for any device."""
    _check_inverse(coeffs, n_levels, seqlen=seqlen)
    wide = coeffs.to(torch.promote_types(coeffs.dtype, torch.float32))
    n = coeffs.shape[1] >> n_levels
    a = wide[:, :n]
    for _ in range(n_levels):
        d = wide[:, n : 2 * n]
        a = torch.stack([a + d, a - d], 2).flatten(1, 2) * 0.5**0.5
        n *= 2
    return a[:, :seqlen].to(coeffs.dtype, copy=True, memory_format=torch.contiguous_format)


# ---- checks


def _padded(seqlen: int, n_levels: int) -> int:
    block = 1 << int(n_levels)
    return (seqlen + block - 1) // block * block


def _check(x, n_levels, *, edge=False) -> None:
    _check_levels(x, "x", n_levels)


def _check_levels(x: Tensor, name: str, n_levels: int) -> None:
    check_input(x, 3, name)
    if not is_size(n_levels):
        raise TypeError(f"n_levels must be an integer, got {type(n_levels).__name__}")
    if not 0 <= n_levels <= MAX_LEVELS:
        raise ValueError(f"n_levels must be 0..{MAX_LEVELS}, got {n_levels}")


def _check_inverse(coeffs, n_levels, *, seqlen=None) -> None:
    _check_levels(coeffs, "coeffs", n_levels)
    length = coeffs.shape[1]
    if length % (1 << int(n_levels)):
        raise ValueError(f"coeffs must have a multiple of 2^n_levels = {1 << int(n_levels)} steps, got {length}")
    if seqlen is not None:
        if not is_size(seqlen):
            raise TypeError(f"seqlen must be an integer or None, got {type(seqlen).__name__}")
        if seqlen < 0 or _padded(seqlen, n_levels) != length:
            raise ValueError(f"seqlen must give {length} steps when padded to a multiple of 2^n_levels, got {seqlen}")


def _fake(x, n_levels, *, edge=False):
    _check(x, n_levels)
    return x.new_empty(x.shape[0], _padded(x.shape[1], n_levels), x.shape[2])


def _fake_inverse(coeffs, n_levels, *, seqlen=None):
    _check_inverse(coeffs, n_levels, seqlen=seqlen)
    return coeffs.new_empty(coeffs.shape[0], coeffs.shape[1] if seqlen is None else seqlen, coeffs.shape[2])


# ---- gradients, vmap, explain


def _setup(ctx, inputs, options, output):
    x, ctx.n_levels = inputs
    ctx.seqlen, ctx.edge = x.shape[1], options["edge"]


def _backward(ctx, grad):
    if not ctx.edge:
        return _inverse_op(grad, ctx.n_levels, seqlen=ctx.seqlen), None
    full = _inverse_op(grad, ctx.n_levels)
    if ctx.seqlen == full.shape[1]:
        return full, None
    last = ctx.seqlen - 1  # it was copied into the padding: the gradients of the copies add up there
    return torch.cat([full[:, :last], full[:, last:].sum(1, keepdim=True)], 1), None


def _jvp(ctx, tangent, _n_levels):
    return _op(tangent, ctx.n_levels, edge=ctx.edge)


def _setup_inverse(ctx, inputs, options, output):
    ctx.n_levels, ctx.seqlen = inputs[1], options["seqlen"]


def _backward_inverse(ctx, grad):
    return _op(grad, ctx.n_levels), None


def _jvp_inverse(ctx, tangent, _n_levels):
    return _inverse_op(tangent, ctx.n_levels, seqlen=ctx.seqlen)


def _vmap(op):
    def mapped(info, in_dims, x, n_levels, **kwargs):
        x = x.movedim(in_dims[0], 0)
        return op(x.flatten(0, 1), n_levels, **kwargs).unflatten(0, x.shape[:2]), 0

    return mapped


def _describe(x, n_levels, *, pad="zero") -> Explanation:
    _check(x, n_levels)
    padded = _padded(x.shape[1], n_levels)
    written = x.shape[0] * padded * x.shape[2]
    return Explanation(*kernel_of("haar_dwt", x), _flops(written, n_levels), (x.numel() + written) * x.element_size())


def _describe_inverse(coeffs, n_levels, *, seqlen=None) -> Explanation:
    _check_inverse(coeffs, n_levels, seqlen=seqlen)
    n = coeffs.numel()
    written = n if seqlen is None else coeffs.shape[0] * seqlen * coeffs.shape[2]
    return Explanation(*kernel_of("haar_idwt", coeffs), _flops(n, n_levels), (n + written) * coeffs.element_size())


def _flops(elements: int, n_levels: int) -> int:
    """An addition and a product for each coefficient of each level."""
    return 4 * (elements - (elements >> n_levels))


lib.impl("haar_dwt", haar_dwt_ref, "CompositeExplicitAutograd")
lib.impl("haar_idwt", haar_idwt_ref, "CompositeExplicitAutograd")
triton_launcher("haar_dwt", "haar_dwt_triton", _check)
triton_launcher("haar_idwt", "haar_dwt_triton", _check_inverse)
torch.library.register_fake("audiokernels::haar_dwt", _fake, lib=lib)
torch.library.register_fake("audiokernels::haar_idwt", _fake_inverse, lib=lib)
register_autograd("haar_dwt", _backward, _setup, _jvp)
register_autograd("haar_idwt", _backward_inverse, _setup_inverse, _jvp_inverse)
_op = torch.ops.audiokernels.haar_dwt.default
_inverse_op = torch.ops.audiokernels.haar_idwt.default
torch.library.register_vmap("audiokernels::haar_dwt", _vmap(_op), lib=lib)
torch.library.register_vmap("audiokernels::haar_idwt", _vmap(_inverse_op), lib=lib)
describe("haar_dwt", _describe)
describe("haar_idwt", _describe_inverse)

"""Causal attention by dense float64 formulas and by torch's own, inputs, and the kernels that a machine has."""

from unittest import mock

import pytest
import torch
from instruction_sets import UNCOMPILED, in_use, instruction_sets
from torch.nn import functional as F

from audiokernels import causal_attention
from audiokernels import causal_attention_plan as plans
from audiokernels._library import C
from audiokernels.causal_attention import causal_attention_backward_ref, causal_attention_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SM90_COMPILED = torch.cuda.is_available() and plans.device_facts(torch.device("cuda", 0)).compiled


def kernels(op):
    """What can serve `op` here: the reference, the compiled kernel in each instruction set, the GPU's kernel, and
    "cuda_sm90", the GPU's with CUDA C++ asked for."""
    compiled = [name for name in instruction_sets(op) if name not in UNCOMPILED]
    asked = ["cuda_sm90"] if SM90_COMPILED and op == "causal_attention" and not plans.ASKED else []
    return ["reference", *compiled, *(["cuda", *asked] if torch.cuda.is_available() else [])]


def main_kernels(op):
    """The same as parameters of a fixture: `make test` takes one instruction set, the best."""
    names = kernels(op)
    best = C.supported_isas()[-1] if C else ""
    main = ("reference", best, "cuda", "cuda_sm90")
    return [name if name in main else pytest.param(name, marks=pytest.mark.slow) for name in names]


class Reference(torch.autograd.Function):
    """The reference and its backward, whatever the dispatcher would take."""

    @staticmethod
    def forward(ctx, q, k, v, scale, window):
        out, lse = causal_attention_ref(q, k, v, scale=scale, window=window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = {"scale": scale, "window": window}
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        return *causal_attention_backward_ref(grad_out, grad_lse, *ctx.saved_tensors, **ctx.options), None, None


class Kernel:
    """One of kernels(): called as causal_attention(..., return_lse=True)."""

    def __init__(self, name):
        self.name, self.device = name, "cuda" if name.startswith("cuda") else "cpu"

    def __call__(self, q, k, v, scale=None, window=None):
        if self.name == "reference":
            return Reference.apply(q, k, v, scale, window)
        return causal_attention(q, k, v, scale=scale, window=window, return_lse=True)


def in_turn(name, kernel=Kernel):
    """For a fixture: kernel(name), with the instruction set of that name in use, or CUDA C++ asked for."""
    with in_use(name), mock.patch.object(plans, "ASKED", plans.ASKED or name == "cuda_sm90"):
        yield kernel(name)


def make(size, dtype=torch.float32, device="cpu", *, scale=1.0, seed=0, grad=False):
    """q, k, v of a size (batch, nheads, nheads_kv, seqlen_q, seqlen_k, headdim)."""
    batch, nheads, nheads_kv, seqlen_q, seqlen_k, headdim = size
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, nheads, seqlen_q, headdim)] + 2 * [(batch, nheads_kv, seqlen_k, headdim)]
    tensors = [scale * torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).requires_grad_(grad) for x in tensors]


def mask(seqlen_q, seqlen_k, window=None, device="cpu"):
    """(seqlen_q, seqlen_k) of what sees what."""
    own = torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k, device=device)
    return (key <= own) & (key > own - (seqlen_k + 1 if window is None else window))


def expanded(q, k, v):
    """One key head for every query head."""
    group = q.shape[1] // max(1, k.shape[1])
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def dense(q, k, v, scale=None, window=None):
    """(out, lse) over the N x N matrix, in the inputs' dtype."""
    q, k, v = expanded(q, k, v)
    logits = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~mask(q.shape[2], k.shape[2], window, q.device), -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def plain(q, k, v, scale=None, window=None):
    """Torch's own, in the inputs' dtype, with a mask."""
    q, k, v = expanded(q, k, v)
    seen = mask(q.shape[2], k.shape[2], window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def gradients(results, inputs, grads):
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    return torch.autograd.grad([result for result, _ in pairs], inputs, [grad for _, grad in pairs])


class Errors:
    """Of results and of a peer's, over several cases, each relative to the largest value that is right."""

    def __init__(self, dtype, slack=0.0):
        self.ours = self.peers = 0.0
        self.ulp = torch.finfo(dtype).eps + slack * torch.finfo(torch.float64).eps  # what is right is rounded as well

    def add(self, result, peer, right, at_least=1e-3):
        if right.numel():
            scale = max(at_least, float(right.abs().max()))
            self.ours = max(self.ours, float((result.double() - right).abs().max()) / scale)
            self.peers = max(self.peers, float((peer.double() - right).abs().max()) / scale)
            assert not result.isnan().any()

    def check(self):
        assert self.ours <= 2 * self.peers + self.ulp, f"{self.ours:.3g}, the peer {self.peers:.3g}"

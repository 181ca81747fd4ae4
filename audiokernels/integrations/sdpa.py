"""causal_attention in place of torch's scaled_dot_product_attention, for the calls that it can take.

with audiokernels.integrations.sdpa.patch():
    model(x)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from audiokernels import causal_attention


@contextmanager
def patch() -> Iterator[None]:
    """Within the block torch.nn.functional.scaled_dot_product_attention gives its causal calls to causal_attention.

    Those are: is_causal, no mask, no dropout, scale a number or None, queries as many as keys (torch aligns at the
    start, causal_attention at the end), 4 dimensions, headdim 8..256. All others go to torch as before. Code that holds
    the function itself, by `from torch.nn.functional import scaled_dot_product_attention`, is not reached. The patch is
    the process's, not the thread's.
    """
    original = F.scaled_dot_product_attention

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        plain = is_causal and attn_mask is None and dropout_p == 0.0 and not isinstance(scale, Tensor)
        if plain and takes(query, key, value) and query.shape[2] == key.shape[2]:
            grouped = query.shape[1] != key.shape[1]
            if enable_gqa or not grouped:
                return causal_attention(query, key, value, scale=scale)
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    F.scaled_dot_product_attention = scaled_dot_product_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether causal_attention has kernels for such tensors; seqlen and what they mean is the caller's business."""
    tensors = (query, key, value)
    if any(x.ndim != 4 or x.layout != torch.strided or x.is_nested for x in tensors):
        return False
    if any(x.dtype != query.dtype or x.device != query.device for x in tensors):
        return False
    (batch, nheads, seqlen_q, headdim), (batch_k, nheads_kv, seqlen_k, headdim_k) = query.shape, key.shape
    fits = batch == batch_k and headdim == headdim_k and key.shape == value.shape and seqlen_q <= seqlen_k
    known = query.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64) and 8 <= headdim <= 256
    return known and fits and nheads_kv > 0 and nheads % nheads_kv == 0

"""causal_attention inside Hugging Face models: attn_implementation="audiokernels".

    audiokernels.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="audiokernels")

Causal calls without padding take causal_attention, sliding windows without an N x N mask, grouped heads without copies.
What it does not compute is handed to transformers' SDPA: masks (padding, packed sequences, static caches), cross
attention, dropout, keywords it does not know. What SDPA would ignore though it changes the result is refused.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from audiokernels import causal_attention
from audiokernels.integrations.sdpa import takes

BOOKKEEPING = {
    "cache_position", "input_ids", "labels", "layer_idx", "logits_to_keep", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_ids", "return_dict", "token_type_ids",
    "use_cache",
}  # fmt: skip
REFUSED = {
    "softcap": 'use attn_implementation="eager"',
    "s_aux": 'use attn_implementation="eager"',
    "sinks": 'use attn_implementation="eager"',
    "head_mask": 'use attn_implementation="eager"',
    "cu_seq_lens_q": 'use attn_implementation="flash_attention_2", or pass position_ids alone',
    "cu_seq_lens_k": 'use attn_implementation="flash_attention_2", or pass position_ids alone',
}


def register(name: str = "audiokernels") -> None:
    """Make attn_implementation=`name` work in transformers: the attention and its mask function."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: (batch, nheads, seqlen, headdim) in, (batch, seqlen, nheads, ...) out.

    Without a mask a causal layer's queries are aligned with the last keys: `mask` leaves it out only then.

    Raises:
        ValueError: a keyword changes the result in a way that neither causal_attention nor SDPA computes.
    """
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    for name in sorted(given & set(REFUSED)):
        raise ValueError(f"the attention of audiokernels does not compute {name}: {REFUSED[name]}")
    is_causal, window = kwargs.get("is_causal"), kwargs.get("sliding_window")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unknown = given - BOOKKEEPING - {"is_causal", "sliding_window"}
    if attention_mask is not None or not causal or dropout or unknown or not takes(query, key, value):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    out = causal_attention(query, key, value, scale=scaling, window=window)
    return out.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int | Tensor | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: object,
) -> Tensor | None:
    """None where no mask is needed (causal, perhaps with a window, aligned at the end, no padding), else SDPA's."""
    query = {"q_length": q_length, "q_offset": q_offset}
    if "cache_position" in kwargs:  # transformers 4 tells the queries' positions instead
        position = kwargs.pop("cache_position")
        query = {"cache_position": position}
        q_length, q_offset = position.shape[0], position[0] if torch.compiler.is_compiling() else int(position[0])
    if kwargs.get("allow_is_causal_skip", True) and not kwargs.get("allow_is_bidirectional_skip", False):
        aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
        if aligned and _no_padding(attention_mask) and _is_causal(mask_function, kwargs.get("local_size")):
            return None
        kwargs["allow_is_causal_skip"] = False  # SDPA aligns at the start where no mask is given
    keys = {"kv_length": kv_length, "kv_offset": kv_offset}
    return sdpa_mask(
        batch_size=batch_size, **query, **keys, mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )


def _no_padding(attention_mask: Tensor | None) -> bool:
    return attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all()))


def _is_causal(mask_function: Callable, window: int | None) -> bool:
    """Whether it is the causal mask, with `window` that of a sliding window: chunks have a local size too."""
    if mask_function is causal_mask_function:
        return window is None
    if window is None:
        return False
    key = torch.arange(2 * window + 3)
    query = torch.tensor([0, window - 1, window, window + 1, 2 * window + 1])[:, None]
    zero = torch.zeros((), dtype=torch.int64)
    found = torch.as_tensor(mask_function(zero, zero, query, key))
    return torch.equal(found, (key <= query) & (key > query - window))

"""audiokernels' ops in torch.utils.flop_counter.FlopCounterMode, which of itself knows torch's ops alone.

audiokernels.integrations.flop_counter.register()
with FlopCounterMode() as counter:
    model(x).sum().backward()
"""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from audiokernels import explain

OPS = ("causal_attention", "causal_attention_backward", "causal_attention_decode", "dilated_conv_update")


def register() -> None:
    """Count causal_attention, its gradient, causal_attention_decode and dilated_conv_update, as explain does.

    Attention counts the pairs of a query and a key that it sees, forward 4 FLOPs for every channel of a pair, backward
    10. (For scaled_dot_product_attention torch counts every pair, causal or not.) A step of decoding counts its whole
    window. The ops that generate whole streams are not counted. May be called again.
    """
    for name in OPS:
        op = getattr(torch.ops.audiokernels, name)
        if op not in flop_registry:
            register_flop_formula(op, get_raw=True)(_formula(name))


def _formula(name: str) -> Callable[..., int]:
    def flops(*args, out_val=None, **options) -> int:
        return explain(name, *args, **options).flops

    return flops

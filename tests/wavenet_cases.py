"""Models, an independent float64 network and the drawing rule, shared by the WaveNet tests."""

import torch
from torch.nn import functional as F

from audiokernels import wavenet_pack

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float16)


SIZES = {"residual": 16, "hidden": 16, "skip": 32, "head": 32, "n_class": 64, "width": 2, "condition": 0}


def weights_of(n_layer, *, seed=0, gain=3.0, **sizes):
    """Random weights at which signals keep their size through the layers; logits have a spread of about `gain`."""
    residual, hidden, skip, head, n_class, width, condition = {**SIZES, **sizes}.values()
    g = torch.Generator().manual_seed(seed)

    def rn(*shape, k=1.0):
        return torch.randn(*shape, generator=g) * k

    weights = {
        "embedding": rn(n_class, residual),
        "conv_weight": rn(n_layer, 2 * hidden, residual, width, k=(width * residual) ** -0.5),
        "conv_bias": rn(n_layer, 2 * hidden, k=0.1),
        "res_weight": rn(n_layer - 1, residual, hidden, k=hidden**-0.5),
        "res_bias": rn(n_layer - 1, residual, k=0.1),
        "skip_weight": rn(n_layer, skip, hidden, k=hidden**-0.5),
        "skip_bias": rn(n_layer, skip, k=0.1),
        "head_weight": rn(head, skip, k=skip**-0.5),
        "head_bias": rn(head, k=0.1),
        "out_weight": rn(n_class, head, k=gain * head**-0.5),
        "out_bias": rn(n_class, k=0.1),
    }
    if condition:
        weights["condition_weight"] = rn(n_layer, 2 * hidden, condition, k=condition**-0.5)
    return weights


def pack_of(dilations, *, dtype=torch.float32, hop=1, **sizes):
    return wavenet_pack(weights_of(len(dilations), **sizes), dilations, dtype=dtype, hop=hop)


def full_logits(weights, dilations, codes, *, condition=None, hop=1, dtype=torch.float64):
    """Logits of every sample at once, by dilated convolutions: codes (batch, n) -> (batch, n, n_class).

    logits[:, t] predicts codes[:, t] from the codes before it; the stream starts from code n_class // 2.
    """
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    start = torch.full_like(codes[:, :1], w["embedding"].shape[0] // 2)
    x = w["embedding"][torch.cat([start, codes[:, :-1]], 1).long()].transpose(1, 2)
    width = w["conv_weight"].shape[-1]
    skip = 0
    for layer, d in enumerate(dilations):
        padded = F.pad(x, ((width - 1) * d, 0))
        z = F.conv1d(padded, w["conv_weight"][layer], w["conv_bias"][layer], dilation=d)
        if condition is not None:
            frames = condition.to(dtype).repeat_interleave(hop, 1)[:, : codes.shape[1]]
            z = z + F.linear(frames, w["condition_weight"][layer]).transpose(1, 2)
        a, b = z.chunk(2, 1)
        h = torch.tanh(a) * torch.sigmoid(b)
        skip = skip + F.conv1d(h, w["skip_weight"][layer][:, :, None], w["skip_bias"][layer])
        if layer + 1 < len(dilations):
            x = x + F.conv1d(h, w["res_weight"][layer][:, :, None], w["res_bias"][layer])
    head = F.relu(F.conv1d(F.relu(skip), w["head_weight"][:, :, None], w["head_bias"]))
    return F.conv1d(head, w["out_weight"][:, :, None], w["out_bias"]).transpose(1, 2)


def differing_draws(logits, reference, uniforms, codes):
    """How many codes the reference's logits would have drawn otherwise, and how many of those are off a CDF edge.

    DESIGN 3: a draw may differ only where |u - CDF_ref(edge)| <= half the step's largest logit difference + 2^-16.
    """
    cdf = torch.softmax(reference.double(), 2).cumsum(2)
    u = uniforms.double()[:, :, None]
    drawn = (cdf <= u).sum(2).clamp(max=logits.shape[2] - 1)
    differ = drawn != codes.long()
    low, high = torch.minimum(drawn, codes.long()), torch.maximum(drawn, codes.long())
    allowed = (logits.double() - reference.double()).abs().amax(2) / 2 + 2.0**-16
    index = torch.arange(logits.shape[2])
    crossed = (index >= low[:, :, None]) & (index < high[:, :, None])  # every edge between the two draws
    distance = torch.where(crossed, (u - cdf).abs(), 0.0).amax(2)
    return int(differ.sum()), int((differ & (distance > allowed)).sum())

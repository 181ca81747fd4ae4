"""Weights of small transformers, and the network over a whole sequence in float64, shared by the transformer tests."""

import math

import torch
from torch.nn import functional as F

from audiokernels import transformer_pack

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
SIZES = {"n_layer": 2, "n_embd": 16, "n_inner": 32, "n_class": 64, "fusion": "none", "condition": 0}
CONTEXT = {"channels": 6, "code": 10, "widths": (3, 2, 2)}
SHAPES = {
    "plain": {"n_head": 2, "window": 20},
    "one head, narrow window": {"n_head": 1, "window": 1, "n_layer": 3},
    "sinusoidal": {"n_head": 2, "window": 17, "positions": "sinusoidal"},
    "odd sizes": {"n_head": 2, "n_embd": 36, "n_inner": 50, "n_class": 50, "window": 33},
    "window over a block": {"n_head": 2, "window": 70, "n_embd": 32},
    "logits": {"n_head": 2, "window": 20, "fusion": "logits"},
    "add": {"n_head": 2, "window": 20, "fusion": "add", "n_embd": 24},
    "film, sinusoidal": {"n_head": 2, "window": 20, "fusion": "film", "positions": "sinusoidal", "n_embd": 24},
    "haar": {"n_head": 2, "window": 20, "haar": [0] * 8 + [1] * 4 + [2] * 2 + [3, 4]},
    "int16 codes": {"n_head": 2, "window": 20, "n_class": 300},
}


def weights_of(*, seed=0, gain=3.0, **sizes):
    """Random weights at which signals keep their size through the layers; logits have a spread of about `gain`."""
    n_layer, e, f, n_class, fusion, condition = {**SIZES, **sizes}.values()
    g = torch.Generator().manual_seed(seed)

    def rn(*shape, k=1.0):
        return torch.randn(*shape, generator=g) * k

    def linear(name, rows, columns, *layers, k=1.0):
        return {
            f"{name}_weight": rn(*layers, rows, columns, k=k * columns**-0.5),
            f"{name}_bias": rn(*layers, rows, k=0.1),
        }

    def norm(name, *shape):
        return {f"{name}_weight": 1 + rn(*shape, k=0.1), f"{name}_bias": rn(*shape, k=0.1)}

    weights = {"embedding": rn(n_class, e), **norm("norm1", n_layer, e), **norm("norm2", n_layer, e), **norm("norm", e)}
    weights |= linear("qkv", 3 * e, e, n_layer, k=1.5) | linear("proj", e, e, n_layer)
    weights |= linear("up", f, e, n_layer) | linear("down", e, f, n_layer) | linear("out", n_class, e, k=gain)
    if condition:
        weights["condition_weight"] = rn(e, condition, k=condition**-0.5)
    if fusion != "none":
        x, y, widths = CONTEXT.values()
        weights["context_embedding"] = rn(n_class, x)
        for i, width in enumerate(widths):
            rows = y if i + 1 == len(widths) else x
            weights[f"context_weight_{i}"] = rn(rows, x, width, k=(2 / (width * x)) ** 0.5)
            weights[f"context_bias_{i}"] = rn(rows, k=0.1)
        weights |= linear("fuse", {"logits": n_class, "add": e, "film": 2 * e}[fusion], y)
    return weights


def options_of(sizes):
    """Of SHAPES' entries, what transformer_pack takes and what weights_of takes."""
    pack = {name: sizes[name] for name in ("n_head", "window", "positions", "fusion", "haar") if name in sizes}
    return pack, {name: value for name, value in sizes.items() if name in SIZES}


def pack_of(*, dtype=torch.float32, hop=1, seed=0, **sizes):
    sizes = {"n_head": 2, "window": 20, **sizes}
    pack, shape = options_of(sizes)
    return transformer_pack(weights_of(seed=seed, **shape), **pack, dtype=dtype, hop=hop)


def full_logits(weights, codes, options, *, dtype=torch.float64, frames=None, hop=1):
    """Logits of every sample at once: codes (batch, n) -> (batch, n, n_class), each of the codes before it.

    logits[:, t] predicts codes[:, t]; the stream starts from code n_class // 2. options: as transformer_pack
    takes them. frames: condition (batch, frames, C).
    """
    n_head, window = options["n_head"], options["window"]
    positions, fusion = options.get("positions", "rotary"), options.get("fusion", "none")
    haar = options.get("haar", ())
    w, (batch, n) = {name: tensor.to(dtype) for name, tensor in weights.items()}, codes.shape
    read = torch.cat([torch.full_like(codes[:, :1], w["embedding"].shape[0] // 2), codes[:, :-1]], 1).long()
    x, e, late = w["embedding"][read], w["embedding"].shape[1], 0
    if fusion != "none":
        c, d, i = w["context_embedding"][read].transpose(1, 2), 1, 0
        while f"context_weight_{i}" in w:
            width = w[f"context_weight_{i}"].shape[2]
            c = F.relu(F.conv1d(F.pad(c, ((width - 1) * d, 0)), *(w[f"context_{k}_{i}"] for k in ("weight", "bias")),
                                dilation=d))  # fmt: skip
            d, i = d * width, i + 1
        fused = F.linear(c.transpose(1, 2), w["fuse_weight"], w["fuse_bias"])
        late, x = {
            "logits": lambda: (fused, x),
            "add": lambda: (0, x + fused),
            "film": lambda: (0, x * (1 + fused[..., :e]) + fused[..., e:]),
        }[fusion]()
    if frames is not None:
        x = x + F.linear(frames.to(dtype), w["condition_weight"]).repeat_interleave(hop, 1)[:, :n]
    device = codes.device
    time, head = torch.arange(n, dtype=torch.float64, device=device)[:, None], e // n_head

    def rates(channels):
        return 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)

    if positions == "sinusoidal":
        angle = time * rates(e)
        x = x + torch.cat([angle.sin(), angle.cos()], 1)[:, :e].to(dtype)
    seen = (time >= time.T) & (time - time.T < window)
    turn = torch.exp(1j * time * rates(head))

    def norm(x, name, layer=...):
        return F.layer_norm(x, (e,), w[f"{name}_weight"][layer], w[f"{name}_bias"][layer])

    def linear(x, name, layer):
        return F.linear(x, w[f"{name}_weight"][layer], w[f"{name}_bias"][layer])

    def rotated(x):
        if positions != "rotary":
            return x
        z = torch.complex(x[..., : head // 2].double(), x[..., head // 2 :].double()) * turn
        return torch.cat([z.real, z.imag], -1).to(dtype)

    for layer in range(w["qkv_weight"].shape[0]):
        q, k, v = linear(norm(x, "norm1", layer), "qkv", layer).view(batch, n, 3, n_head, head).permute(2, 0, 3, 1, 4)
        scores = (rotated(q) @ rotated(k).transpose(2, 3) / math.sqrt(head)).masked_fill(~seen, -torch.inf)
        x = x + linear((scores.softmax(3) @ v).transpose(1, 2).flatten(2), "proj", layer)
        x = x + linear(F.relu(linear(norm(x, "norm2", layer), "up", layer)), "down", layer)
        if haar:
            sums = F.pad(x, (0, 0, 1, 0)).cumsum(1)
            width = torch.tensor([1 << level for level in haar], device=device)
            before = (torch.arange(1, n + 1, device=device)[:, None] - width).clamp(min=0).expand(batch, -1, -1)
            x = (sums[:, 1:] - sums.gather(1, before)) / width
    return linear(norm(x, "norm"), "out", ...) + late

"""Weights of a sample-level transformer in the order in which a generation step streams them.

A pack is one uint8 tensor, E = n_embd, F = n_inner, H heads of D numbers each, D16 = D rounded up to a multiple of 16:

    embedding   float32 (n_class, E16)
    condition   float32 (C, E16)                    with condition_channels C > 0 only
    with a context network of channels X and code Y only:
    context     float32 (n_class, X16), its embedding
                per layer: `width` taps of X inputs -> X outputs, the last layer -> Y
    fuse        Y -> n_class ("logits"), E16 ("add"), or scale E16 | shift E16 ("film")
    per layer   qkv:  E -> q | k | v, each H * D16        proj: H * D16 -> E
                up:   E -> F                              down: F -> E
    out         E -> n_class

The affine part of each norm is folded into the matrix that follows it, the scale of the logits of attention into q: a
step only centres and scales. A matrix is laid out as in audiokernels/_packing.py; padding is zero.
csrc/transformer_generate.h reads the same layout.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from audiokernels._checks import check_whole, is_whole
from audiokernels._packing import (
    DTYPES,
    LANES,
    MAX_INPUTS,
    check_weights,
    matrix_bytes,
    pack_matrix,
    pad,
    round_up,
    to_bytes,
    unpack_matrix,
)

POSITIONS = ("rotary", "sinusoidal")
FUSIONS = ("none", "logits", "add", "film")
CACHE_DTYPES = (torch.float32, torch.bfloat16)
KEY_BLOCK = 64  # keys that lie side by side in the cache, whose capacity is a multiple of it
MAX_SLOTS = 1 << 24  # of any ring
MAX_LEVEL = 20
SIZES = 14  # numbers of to_ints before the widths


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of a packed transformer; widths: taps of the context network; haar: [level, count, ...] of the pooling."""

    dtype: torch.dtype
    cache_dtype: torch.dtype
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    n_class: int
    window: int
    positions: str
    fusion: str
    context: int
    code: int
    condition: int
    hop: int
    widths: tuple[int, ...]
    haar: tuple[int, ...]

    def to_ints(self) -> list[int]:
        """The form in which the op's schema carries the shape."""
        kinds = [DTYPES.index(self.dtype), DTYPES.index(self.cache_dtype)]
        sizes = [self.n_layer, self.n_head, self.n_embd, self.n_inner, self.n_class, self.window]
        names = [POSITIONS.index(self.positions), FUSIONS.index(self.fusion)]
        rest = [self.context, self.code, self.condition, self.hop, len(self.widths)]
        return [*kinds, *sizes, *names, *rest, *self.widths, *self.haar]

    @staticmethod
    def from_ints(ints: Sequence[int]) -> "TransformerShape":
        kinds, end = (DTYPES[ints[0]], DTYPES[ints[1]]), SIZES + 1 + ints[SIZES]
        names = (POSITIONS[ints[8]], FUSIONS[ints[9]])
        return TransformerShape(
            *kinds, *ints[2:8], *names, *ints[10:SIZES], tuple(ints[SIZES + 1 : end]), tuple(ints[end:])
        )

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.n_class <= 256 else torch.int16

    @property
    def headdim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def head_rows(self) -> int:
        """Numbers that a head takes in q, k and v."""
        return round_up(self.headdim, LANES)

    @property
    def capacity(self) -> int:
        """Slots of the ring of keys and values."""
        return round_up(self.window, KEY_BLOCK)

    @property
    def dilations(self) -> list[int]:
        """Of the context network: the strides of the layers before."""
        return [math.prod(self.widths[:layer]) for layer in range(len(self.widths))]

    @property
    def fuse_rows(self) -> int:
        embd = round_up(self.n_embd, LANES)
        return {"none": 0, "logits": round_up(self.n_class, LANES), "add": embd, "film": 2 * embd}[self.fusion]

    def matrices(self) -> Iterator[tuple[str, int, int, int]]:
        """(name, outputs padded, taps, inputs) of every matrix, in memory order."""
        embd, inner, heads = round_up(self.n_embd, LANES), round_up(self.n_inner, LANES), self.n_head * self.head_rows
        for layer, width in enumerate(self.widths):
            last = layer + 1 == len(self.widths)
            yield f"context.{layer}", round_up(self.code if last else self.context, LANES), width, self.context
        if self.widths:
            yield "fuse", self.fuse_rows, 1, self.code
        for layer in range(self.n_layer):
            yield f"qkv.{layer}", 3 * heads, 1, self.n_embd
            yield f"proj.{layer}", embd, 1, heads
            yield f"up.{layer}", inner, 1, self.n_embd
            yield f"down.{layer}", embd, 1, self.n_inner
        yield "out", round_up(self.n_class, LANES), 1, self.n_embd

    def table_floats(self) -> tuple[int, int, int]:
        """float32 numbers in the embedding, the condition table and the context network's embedding."""
        embd, context = round_up(self.n_embd, LANES), round_up(self.context, LANES)
        return self.n_class * embd, self.condition * embd, self.n_class * context

    def pack_bytes(self) -> int:
        return 4 * sum(self.table_floats()) + sum(matrix_bytes(self.dtype, *m[1:]) for m in self.matrices())

    def macs(self) -> int:
        """Multiply-accumulates of one sample of one stream with its window full, padding and condition left out."""
        layer = 4 * self.n_embd**2 + 2 * self.n_embd * self.n_inner + 2 * self.window * self.n_embd
        context = sum(self.widths) * self.context**2 + self.context * (self.code - self.context) * sum(self.widths[-1:])
        fused = {"none": 0, "logits": self.n_class, "add": self.n_embd, "film": 2 * self.n_embd}[self.fusion]
        return self.n_layer * layer + self.n_embd * self.n_class + context + fused * self.code

    def cache_bytes(self) -> int:
        """Bytes of keys and values that one sample of one stream reads, its window full."""
        return self.n_layer * self.n_head * self.capacity * (self.headdim + self.head_rows) * self.cache_dtype.itemsize


@dataclass(frozen=True, eq=False)
class TransformerPack:
    """Packed weights of a transformer: `data` uint8 (n,), and the shape that explains them."""

    data: Tensor
    shape: TransformerShape

    def to(self, device: torch.device | str) -> "TransformerPack":
        """The pack on another device. Its dtype was chosen when it was made."""
        return TransformerPack(self.data.to(device=torch.device(device)), self.shape)

    def with_cache(self, dtype: torch.dtype) -> "TransformerPack":
        """The same weights over keys and values kept in `dtype`, torch.float32 or torch.bfloat16.

        transformer_pack chooses float32 for float32 weights, else bfloat16. Float32 weights over a bfloat16 cache read
        two thirds of the bytes of a step; its logits differ from those over float32 by about 0.3 %.

        Raises:
            ValueError: another dtype.
        """
        if dtype not in CACHE_DTYPES:
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype!r}")
        return TransformerPack(self.data, replace(self.shape, cache_dtype=dtype))


# torch.load reads them: unpickling runs nothing of theirs, and every op checks the shape and how many bytes there are
torch.serialization.add_safe_globals([TransformerPack, TransformerShape])


def transformer_pack(
    weights: Mapping[str, Tensor],
    *,
    n_head: int,
    window: int,
    positions: str = "rotary",
    fusion: str = "none",
    haar: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    hop: int = 1,
) -> TransformerPack:
    """Arrange a transformer's weights for transformer_generate.

    Args:
        weights: finite float tensors on one device; E = n_embd, F = inner width, X and Y = channels and code of the
            context network, C = condition channels:
            embedding (n_class, E), condition_weight (E, C) (optional),
            norm1_weight, norm1_bias, norm2_weight, norm2_bias (n_layer, E): before attention, before the MLP,
            qkv_weight (n_layer, 3E, E), qkv_bias (n_layer, 3E): q, k and v, each head after head,
            proj_weight (n_layer, E, E), proj_bias (n_layer, E),
            up_weight (n_layer, F, E), up_bias (n_layer, F), down_weight (n_layer, E, F), down_bias (n_layer, E),
            norm_weight, norm_bias (E,): the last one, out_weight (n_class, E), out_bias (n_class,), -infinity for a
            class that is never drawn.
            With a context network also context_embedding (n_class, X), and for its layers i = 0, 1, ...
            context_weight_i (X, X, width) as in nn.Conv1d and context_bias_i (X,), the last layer (Y, X, width) and
            (Y,); fuse_weight (rows, Y), fuse_bias (rows,), rows = n_class ("logits"), E ("add"), 2E ("film").
        n_head: heads of attention; E is a multiple of it, the heads have an even number of channels, 8 .. 256.
        window: keys that a query sees, itself among them.
        positions: "rotary": q and k are turned, channel i with i + headdim / 2; "sinusoidal": added to the embedding.
        fusion: where the context network's code goes: "logits", "add", "film"; "none" without such a network.
        haar: levels of causal pooling after every layer (audiokernels.haar_pool, mode "causal", norm "window"): one
            integer 0 .. 20 a channel; () for none.
        dtype: torch.float32, torch.bfloat16 or torch.int8 (one scale a row and tap; activations are quantised per
            vector at run time). Embeddings, biases and condition weights stay float32. With float32 the cache of keys
            and values is float32, with the others bfloat16; TransformerPack.with_cache changes that.
        hop: samples that one frame of the condition lasts.

    Returns:
        TransformerPack, on the device of the weights.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """
    shape = _shape_of(weights, n_head, window, positions, fusion, haar, dtype, hop)
    w = {name: tensor.detach().to(torch.float32) for name, tensor in weights.items()}

    def head_rows(x: Tensor, dim: int = 0) -> Tensor:  # pads every head apart
        return pad(x.unflatten(dim, (-1, shape.headdim)), dim + 1, LANES).flatten(dim, dim + 1)

    def folded(name: str, norm: str, layer: int | None = None) -> tuple[Tensor, Tensor]:
        pick = (lambda x: x) if layer is None else (lambda x: x[layer])
        weight, scale, shift = pick(w[f"{name}_weight"]), pick(w[f"{norm}_weight"]), pick(w[f"{norm}_bias"])
        return weight * scale, pick(w[f"{name}_bias"]) + weight @ shift

    parts = [_table(w["embedding"])]
    if shape.condition:
        parts.append(_table(w["condition_weight"].T))
    if shape.widths:
        parts.append(_table(w["context_embedding"]))
        for layer in range(len(shape.widths)):
            weight, bias = pad(w[f"context_weight_{layer}"], 0, LANES), pad(w[f"context_bias_{layer}"], 0, LANES)
            parts += pack_matrix(weight.transpose(1, 2), bias, dtype)
        halves = 2 if fusion == "film" else 1
        weight, bias = (
            pad(w[f"fuse_{kind}"].unflatten(0, (halves, -1)), 1, LANES).flatten(0, 1) for kind in ("weight", "bias")
        )
        parts += pack_matrix(weight[:, None], bias, dtype)
    scale = w["embedding"].new_ones(3 * shape.n_embd)
    scale[: shape.n_embd] = shape.headdim**-0.5
    for layer in range(shape.n_layer):
        weight, bias = folded("qkv", "norm1", layer)
        parts += pack_matrix(head_rows(weight * scale[:, None])[:, None], head_rows(bias * scale), dtype)
        weight, bias = head_rows(w["proj_weight"][layer], 1), w["proj_bias"][layer]
        parts += pack_matrix(pad(weight, 0, LANES)[:, None], pad(bias, 0, LANES), dtype)
        for weight, bias in (folded("up", "norm2", layer), (w["down_weight"][layer], w["down_bias"][layer])):
            parts += pack_matrix(pad(weight, 0, LANES)[:, None], pad(bias, 0, LANES), dtype)
    weight, bias = folded("out", "norm")
    parts += pack_matrix(pad(weight, 0, LANES)[:, None], pad(bias, 0, LANES), dtype)
    return TransformerPack(torch.cat(parts), shape)


def _table(x: Tensor) -> Tensor:
    return to_bytes(pad(x, 1, LANES))


def transformer_unpack(data: Tensor, shape: TransformerShape) -> dict[str, tuple[Tensor, Tensor]]:
    """What a step multiplies with, in float32: {name: (weight, bias)} under the names of TransformerShape.matrices.

    weight (rows padded, inputs) or, of the context network, (rows padded, taps, inputs); norms and scale are folded in.
    The tables are there as (table (rows, columns), empty) under "embedding", "condition" and "context".
    """
    tables = {"embedding": shape.n_embd, "condition": shape.n_embd, "context": shape.context}
    matrices = {name: (rows, taps, inputs) for name, rows, taps, inputs in shape.matrices()}
    sizes = [4 * n for n in shape.table_floats()] + [matrix_bytes(shape.dtype, *m) for m in matrices.values()]
    sections, unpacked = data.split(sizes), {}
    for (name, columns), section in zip(tables.items(), sections[:3], strict=True):
        if section.numel():
            table = section.view(torch.float32).unflatten(0, (-1, round_up(columns, LANES)))
            unpacked[name] = table[:, :columns], table.new_empty(0)
    for (name, m), section in zip(matrices.items(), sections[3:], strict=True):
        weight, bias = unpack_matrix(section, *m, shape.dtype)
        unpacked[name] = (weight if name.startswith("context") else weight[:, 0]), bias
    return unpacked


def _shape_of(weights, n_head, window, positions, fusion, haar, dtype, hop) -> TransformerShape:
    """Check transformer_pack's arguments and read the sizes off them."""
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.int8, got {dtype!r}")
    for name, value, allowed in (("positions", positions, POSITIONS), ("fusion", fusion, FUSIONS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    hop, n_head = check_whole("hop", hop, 1, 1 << 62), check_whole("n_head", n_head, 1, MAX_INPUTS)
    window = check_whole("window", window, 1, MAX_SLOTS)
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping of names to tensors, got {type(weights).__name__}")
    for name, ndim in (("embedding", 2), ("qkv_weight", 3), ("up_weight", 3)):
        if name not in weights:
            raise ValueError(f"weights must hold {name!r}, got {sorted(weights)}")
        if not isinstance(weights[name], Tensor) or weights[name].ndim != ndim:
            came = tuple(weights[name].shape) if isinstance(weights[name], Tensor) else type(weights[name]).__name__
            raise ValueError(f"weights[{name!r}] must be a tensor of {ndim} dimensions, got {came}")
    n_class, n_embd = weights["embedding"].shape
    n_layer, n_inner = weights["qkv_weight"].shape[0], weights["up_weight"].shape[1]
    expected = {
        "embedding": (n_class, n_embd),
        "qkv_weight": (n_layer, 3 * n_embd, n_embd),
        "qkv_bias": (n_layer, 3 * n_embd),
        "proj_weight": (n_layer, n_embd, n_embd),
        "proj_bias": (n_layer, n_embd),
        "up_weight": (n_layer, n_inner, n_embd),
        "up_bias": (n_layer, n_inner),
        "down_weight": (n_layer, n_embd, n_inner),
        "down_bias": (n_layer, n_embd),
        "norm_weight": (n_embd,),
        "norm_bias": (n_embd,),
        "out_weight": (n_class, n_embd),
        "out_bias": (n_class,),
    }
    expected |= {f"norm{i}_{kind}": (n_layer, n_embd) for i in (1, 2) for kind in ("weight", "bias")}
    condition = context = code = 0
    if "condition_weight" in weights:
        condition = _size_of(weights, "condition_weight", 2, 1)
        expected["condition_weight"] = (n_embd, condition)
    widths = []
    if fusion != "none":
        context = _size_of(weights, "context_embedding", 2, 1)
        while f"context_weight_{len(widths)}" in weights:
            widths.append(_size_of(weights, f"context_weight_{len(widths)}", 3, 2))
        if not widths:
            raise ValueError(f"weights must hold 'context_weight_0' for fusion {fusion}, got {sorted(weights)}")
        code = weights[f"context_weight_{len(widths) - 1}"].shape[0]
        fused = {"logits": n_class, "add": n_embd, "film": 2 * n_embd}[fusion]
        expected |= {"context_embedding": (n_class, context), "fuse_weight": (fused, code), "fuse_bias": (fused,)}
        for layer, width in enumerate(widths):
            rows = code if layer + 1 == len(widths) else context
            expected |= {f"context_weight_{layer}": (rows, context, width), f"context_bias_{layer}": (rows,)}
    check_weights(weights, expected)
    _check_sizes(n_class, n_layer, n_embd, n_head, {"inner": n_inner, "context": context, "code": code}, widths)
    if condition > MAX_INPUTS:
        raise ValueError(f"weights: condition channels must be at most {MAX_INPUTS}, got {condition}")
    cache_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    return TransformerShape(
        dtype, cache_dtype, n_layer, n_head, n_embd, n_inner, n_class, window, positions, fusion, context, code,
        condition, hop, tuple(widths), _haar_runs(haar, n_embd),
    )  # fmt: skip


def _size_of(weights: Mapping[str, Tensor], name: str, ndim: int, dim: int) -> int:
    if name not in weights or not isinstance(weights[name], Tensor) or weights[name].ndim != ndim:
        given = weights.get(name)
        came = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"weights[{name!r}] must be a tensor of {ndim} dimensions, got {came}")
    return weights[name].shape[dim]


def _check_sizes(n_class, n_layer, n_embd, n_head, channels, widths) -> None:
    if not 2 <= n_class <= 32768:
        raise ValueError(f"weights['embedding'] must have 2 .. 32768 rows (classes), got {n_class}")
    if not 1 <= n_layer <= 1000:
        raise ValueError(f"weights['qkv_weight'] must have 1 .. 1000 layers, got {n_layer}")
    if n_embd % n_head or not 8 <= n_embd // n_head <= 256 or n_embd // n_head % 2:
        raise ValueError(
            f"n_head must divide n_embd into heads of an even number of channels, 8 .. 256, got {n_embd} / {n_head}"
        )
    least = 1 if widths else 0
    for name, size in {"embd": n_embd, **channels}.items():
        if not (least if name in ("context", "code") else 1) <= size <= MAX_INPUTS:
            raise ValueError(f"weights: {name} channels must be 1 .. {MAX_INPUTS}, got {size}")
    if any(width < 1 for width in widths) or math.prod(widths) > MAX_SLOTS:
        raise ValueError(f"weights: the context network must see 1 .. {MAX_SLOTS} samples, got widths {list(widths)}")


def _haar_runs(levels: Sequence[int], n_embd: int) -> tuple[int, ...]:
    """[level, count, ...] of neighbouring channels; () where nothing is pooled."""
    if not isinstance(levels, Iterable):
        raise TypeError(f"haar must be a sequence of integers, got {type(levels).__name__}")
    levels = tuple(levels)
    if levels and (len(levels) != n_embd or not all(is_whole(level) and 0 <= level <= MAX_LEVEL for level in levels)):
        raise ValueError(f"haar must be () or {n_embd} integers 0 .. {MAX_LEVEL}, one a channel, got {list(levels)}")
    runs: list[int] = []
    for level in map(int, levels):
        if not runs or runs[-2] != level:
            runs += [level, 0]
        runs[-1] += 1
    return tuple(runs) if any(levels) else ()

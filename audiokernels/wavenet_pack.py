"""WaveNet weights in the order in which a generation step streams them.

A pack is one uint8 tensor:

    embedding   float32 (n_class, R16)
    condition   float32 (n_layer, C, Z)                  with condition_channels C > 0 only
    per layer   conv: `width` taps of R inputs -> Z outputs, Z = 2 * H16 (tanh half | sigmoid half)
                mix:  H inputs -> M outputs, M = R16 + S16 (residual | skip); the last layer has the skip part alone
    head, out   S -> D, D -> n_class

A matrix is laid out as in audiokernels/_packing.py. X16 is X rounded up to a multiple of 16; padding is zero.
csrc/wavenet_generate.h reads the same layout.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from audiokernels._checks import check_whole, is_whole
from audiokernels._packing import (
    DTYPES,
    LANES,
    MAX_INPUTS,
    check_bytes,
    check_weights,
    matrix_bytes,
    pack_matrix,
    pad,
    round_up,
    to_bytes,
    unpack_matrix,
)


@dataclass(frozen=True)
class WaveNetShape:
    """Sizes of a packed WaveNet: residual R, hidden H (gate), skip S, head D, n_class, taps, condition C, hop."""

    dtype: torch.dtype
    residual: int
    hidden: int
    skip: int
    head: int
    n_class: int
    width: int
    condition: int
    hop: int
    dilations: tuple[int, ...]

    def to_ints(self) -> list[int]:
        """The form in which the op's schema carries the shape."""
        sizes = [self.residual, self.hidden, self.skip, self.head, self.n_class, self.width, self.condition, self.hop]
        return [DTYPES.index(self.dtype), *sizes, *self.dilations]

    @staticmethod
    def from_ints(ints: Sequence[int]) -> "WaveNetShape":
        return WaveNetShape(DTYPES[ints[0]], *ints[1:9], dilations=tuple(ints[9:]))

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.n_class <= 256 else torch.int16

    @property
    def receptive_field(self) -> int:
        return (self.width - 1) * sum(self.dilations) + 1

    def matrices(self) -> Iterator[tuple[str, int, int, int]]:
        """(name, outputs padded, taps, inputs) of every matrix, in memory order."""
        rows, skip = round_up(self.residual, LANES), round_up(self.skip, LANES)
        for layer in range(len(self.dilations)):
            yield f"conv.{layer}", 2 * round_up(self.hidden, LANES), self.width, self.residual
            last = layer + 1 == len(self.dilations)
            yield f"mix.{layer}", skip if last else rows + skip, 1, self.hidden
        yield "head", round_up(self.head, LANES), 1, self.skip
        yield "out", round_up(self.n_class, LANES), 1, self.head

    def table_floats(self) -> tuple[int, int]:
        """float32 numbers in the embedding and in the condition table."""
        condition = len(self.dilations) * self.condition * 2 * round_up(self.hidden, LANES)
        return self.n_class * round_up(self.residual, LANES), condition

    def pack_bytes(self) -> int:
        return 4 * sum(self.table_floats()) + sum(matrix_bytes(self.dtype, *m[1:]) for m in self.matrices())

    def macs(self) -> int:
        """Multiply-accumulates of one sample of one stream, padding and condition left out."""
        layer = 2 * self.hidden * self.residual * self.width + self.hidden * (self.residual + self.skip)
        top = self.skip * self.head + self.head * self.n_class
        return len(self.dilations) * layer - self.hidden * self.residual + top


@dataclass(frozen=True, eq=False)
class WaveNetPack:
    """Packed weights of a WaveNet: `data` uint8 (n,), and the shape that explains them."""

    data: Tensor
    shape: WaveNetShape

    def to(self, device: torch.device | str) -> "WaveNetPack":
        """The pack on another device. Its dtype was chosen when it was made."""
        return WaveNetPack(self.data.to(device=torch.device(device)), self.shape)


# torch.load reads them: unpickling runs nothing of theirs, and every op checks the shape and how many bytes there are
torch.serialization.add_safe_globals([WaveNetPack, WaveNetShape])


def wavenet_pack(
    weights: Mapping[str, Tensor], dilations: Sequence[int], *, dtype: torch.dtype = torch.float32, hop: int = 1
) -> WaveNetPack:
    """Arrange a WaveNet's weights for wavenet_generate.

    Args:
        weights: finite float tensors on one device; H = hidden (gate) channels, C = condition channels:
            embedding (n_class, R), conv_weight (n_layer, 2H, R, width) as in nn.Conv1d (last tap = current sample,
            first H rows tanh, last H rows sigmoid), conv_bias (n_layer, 2H),
            condition_weight (n_layer, 2H, C) (optional),
            res_weight (n_layer - 1, R, H), res_bias (n_layer - 1, R): nothing reads the last layer's residual,
            skip_weight (n_layer, S, H), skip_bias (n_layer, S),
            head_weight (D, S), head_bias (D,), out_weight (n_class, D), out_bias (n_class,), -infinity for a
            class that is never drawn.
        dilations: one integer >= 1 a layer, in order.
        dtype: torch.float32, float16, bfloat16, or int8 (one scale a row and tap; activations are quantised per
            vector at run time, sums are exact in int32; on a GPU's clusters activations are float16). Embedding,
            biases and condition weights stay float32.
        hop: samples that one frame of the condition lasts.

    Returns:
        WaveNetPack, on the device of the weights.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """
    shape = _shape_of(weights, dilations, dtype, hop)
    w = {name: tensor.detach().to(torch.float32) for name, tensor in weights.items()}
    n_layer, hidden = len(shape.dilations), shape.hidden

    def gate_rows(x: Tensor) -> Tensor:  # pads the tanh and the sigmoid half apart
        return pad(x.unflatten(0, (2, hidden)), 1, LANES).flatten(0, 1)

    parts = [to_bytes(pad(w["embedding"], 1, LANES))]
    if shape.condition:
        parts.append(to_bytes(torch.stack([gate_rows(layer).T for layer in w["condition_weight"]])))
    for layer in range(n_layer):
        conv = gate_rows(w["conv_weight"][layer]).transpose(1, 2)
        parts += pack_matrix(conv, gate_rows(w["conv_bias"][layer]), dtype)
        mix = [pad(w["skip_weight"][layer], 0, LANES)]
        bias = [pad(w["skip_bias"][layer], 0, LANES)]
        if layer + 1 < n_layer:
            mix.insert(0, pad(w["res_weight"][layer], 0, LANES))
            bias.insert(0, pad(w["res_bias"][layer], 0, LANES))
        parts += pack_matrix(torch.cat(mix)[:, None], torch.cat(bias), dtype)
    for name in ("head", "out"):
        weight, bias_ = pad(w[f"{name}_weight"], 0, LANES), pad(w[f"{name}_bias"], 0, LANES)
        parts += pack_matrix(weight[:, None], bias_, dtype)
    return WaveNetPack(torch.cat(parts), shape)


def wavenet_unpack(data: Tensor, shape: WaveNetShape) -> dict[str, Tensor]:
    """The float32 weights that a pack holds (rounded to its dtype), under the names of wavenet_pack.

    Args:
        data, shape: of the pack.

    Raises:
        TypeError, ValueError: data is not what wavenet_pack makes for such a shape.
    """
    check_bytes("data", data, shape.pack_bytes(), "wavenet")
    matrices = {name: (rows, taps, inputs) for name, rows, taps, inputs in shape.matrices()}
    n_embedding, n_condition = shape.table_floats()
    sizes = [4 * n_embedding, 4 * n_condition, *(matrix_bytes(shape.dtype, *m) for m in matrices.values())]
    embedding, condition, *sections = data.split(sizes)
    unpacked = {
        name: unpack_matrix(section, *m, shape.dtype)
        for (name, m), section in zip(matrices.items(), sections, strict=True)
    }
    layers, hidden = range(len(shape.dilations)), shape.hidden

    def gate_rows(x: Tensor) -> Tensor:
        return x.unflatten(0, (2, -1))[:, :hidden].flatten(0, 1)

    conv = [unpacked[f"conv.{layer}"] for layer in layers]
    mix = [unpacked[f"mix.{layer}"] for layer in layers]
    skip_rows = round_up(shape.skip, LANES)
    no_res = conv[0][0].new_empty(0, shape.residual, shape.hidden)  # a single layer has no residual path
    weights = {
        "embedding": embedding.view(torch.float32).view(shape.n_class, -1)[:, : shape.residual],
        "conv_weight": torch.stack([gate_rows(w).transpose(1, 2) for w, _ in conv]),
        "conv_bias": torch.stack([gate_rows(b) for _, b in conv]),
        "res_weight": torch.cat([no_res, *(w[None, : shape.residual, 0] for w, _ in mix[:-1])]),
        "res_bias": torch.cat([no_res[:, :, 0], *(b[None, : shape.residual] for _, b in mix[:-1])]),
        "skip_weight": torch.stack([w[-skip_rows:, 0][: shape.skip] for w, _ in mix]),
        "skip_bias": torch.stack([b[-skip_rows:][: shape.skip] for _, b in mix]),
    }
    for name, rows in (("head", shape.head), ("out", shape.n_class)):
        weights[f"{name}_weight"], weights[f"{name}_bias"] = unpacked[name][0][:rows, 0], unpacked[name][1][:rows]
    if shape.condition:
        table = condition.view(torch.float32).view(len(layers), shape.condition, -1)
        weights["condition_weight"] = torch.stack([gate_rows(layer.T) for layer in table])
    return weights


def _shape_of(weights: Mapping[str, Tensor], dilations: Sequence[int], dtype: torch.dtype, hop: int) -> WaveNetShape:
    """Check wavenet_pack's arguments and read the sizes off them."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32, float16, bfloat16 or int8, got {dtype!r}")
    hop = check_whole("hop", hop, 1)
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping of names to tensors, got {type(weights).__name__}")
    if not isinstance(dilations, Iterable):
        raise TypeError(f"dilations must be a sequence of integers, got {type(dilations).__name__}")
    dilations = list(dilations)
    if not dilations or not all(is_whole(d) and d >= 1 for d in dilations):
        raise ValueError(f"dilations must be integers >= 1, one a layer, got {dilations}")
    if len(dilations) > 1000:
        raise ValueError(f"dilations must be of 1 .. 1000 layers, got {len(dilations)}")
    dilations = tuple(map(int, dilations))
    optional = {"condition_weight"} & set(weights)
    for name in ("embedding", "conv_weight", "skip_weight", "head_weight", *optional):
        if name not in weights:
            raise ValueError(f"weights must hold {name!r}, got {sorted(weights)}")
        ndim = {"conv_weight": 4, "skip_weight": 3, "condition_weight": 3}.get(name, 2)
        if not isinstance(weights[name], Tensor) or weights[name].ndim != ndim:
            came = tuple(weights[name].shape) if isinstance(weights[name], Tensor) else type(weights[name]).__name__
            raise ValueError(f"weights[{name!r}] must be a tensor of {ndim} dimensions, got {came}")
    n_layer = len(dilations)
    n_class, residual = weights["embedding"].shape
    gate, width = weights["conv_weight"].shape[1], weights["conv_weight"].shape[3]
    skip, head = weights["skip_weight"].shape[1], weights["head_weight"].shape[0]
    condition = weights["condition_weight"].shape[2] if optional else 0
    if gate % 2:
        raise ValueError(f"weights['conv_weight'] must have an even number of rows (tanh | sigmoid), got {gate}")
    hidden = gate // 2
    expected = {
        "embedding": (n_class, residual),
        "conv_weight": (n_layer, gate, residual, width),
        "conv_bias": (n_layer, gate),
        "res_weight": (n_layer - 1, residual, hidden),
        "res_bias": (n_layer - 1, residual),
        "skip_weight": (n_layer, skip, hidden),
        "skip_bias": (n_layer, skip),
        "head_weight": (head, skip),
        "head_bias": (head,),
        "out_weight": (n_class, head),
        "out_bias": (n_class,),
    }
    if optional:
        expected["condition_weight"] = (n_layer, gate, condition)
    check_weights(weights, expected)
    if not 2 <= n_class <= 32768:
        raise ValueError(f"weights['embedding'] must have 2 .. 32768 rows (classes), got {n_class}")
    for name, size in (("residual", residual), ("hidden", hidden), ("skip", skip), ("head", head), ("width", width)):
        if not 1 <= size <= MAX_INPUTS:
            raise ValueError(f"weights: {name} channels must be 1 .. {MAX_INPUTS}, got {size}")
    if condition > MAX_INPUTS:
        raise ValueError(f"weights: condition channels must be at most {MAX_INPUTS}, got {condition}")
    return WaveNetShape(dtype, residual, hidden, skip, head, n_class, width, condition, hop, dilations)

"""The rows of the comparison of generators, and the protocols that size them.

The rows are those of the table in Verma & Chafe, "A generative model for raw audio using transformer architectures"
(arXiv 2106.16036): WaveNets of 10 and 30 layers, transformers of 3, 3 with conditioning, 6 and 8 layers; then what
tells conditioning from parameters (`wide`), from context (`long`) and from the mere presence of a second network
(`shuffled`); a WaveNet with the parameters of the largest transformer; SampleRNN.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from audiomodels.registry import GENERATORS
from audiomodels.sample_rnn import SampleRNNConfig
from audiomodels.sample_transformer import SampleTransformerConfig
from audiomodels.wavenet import WaveNetConfig

MODELS = {kind.config_class: kind for kind in GENERATORS.values()}


@dataclass(frozen=True)
class Protocol:
    """How large the models are, how long they train, what is scored."""

    name: str
    sample_rate: int  # Hz
    batch: int  # crops a step
    length: int  # targets a crop
    targets: int  # of a row
    wavenet: dict[str, int]  # sizes
    transformer: dict[str, Any]
    layers: tuple[int, int, int]  # of the small, medium and large transformer
    heads: tuple[int, int, int]
    context: dict[str, Any]  # of the conditioned transformer
    long_window: int  # of the control that sees as much as the conditioning
    sample_rnn: dict[str, int]
    precision: str = "fp32"
    compiled: bool = False
    sight: int = 4000  # real samples before each target that is scored
    test_targets: int = 262_144
    dev_targets: int = 65_536
    position_sights: tuple[int, int, int] = (0, 1600, 8000)  # samples seen before the first target of a window
    position_length: int = 1600  # targets of such a window
    position_windows: int = 40
    checkpoints: int = 10  # evaluations on dev, evenly spread; 10 % of the targets choose the learning rate
    claims: bool = True  # whether an order may be printed at all


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="smoke",
            sample_rate=8000,
            batch=2,
            length=128,
            targets=5_120,
            wavenet={"dilation_cycle": 4, "residual_channels": 8, "skip_channels": 8, "head_channels": 8},
            transformer={"n_embd": 16, "window": 32},
            layers=(1, 2, 3),
            heads=(1, 1, 1),
            context={"context_channels": 8, "context_widths": (5, 4, 4), "context_code": 8},
            long_window=80,
            sample_rnn={"frame_size": 4, "big_frame": 4, "n_embd": 16, "n_rnn": 1, "bptt": 64},
            sight=200,
            test_targets=8192,
            dev_targets=8192,
            position_sights=(0, 80, 400),
            position_length=80,
            position_windows=8,
            claims=False,
        ),
        Protocol(
            name="compact",
            sample_rate=8000,
            batch=2,  # wavenet10, piano, mu-law, after 1.8 of 2.6 M targets: 5.91 bits on dev; at batch 8, 6.26
            length=1600,
            targets=20_480_000,
            wavenet={"residual_channels": 32, "skip_channels": 64, "head_channels": 64},
            transformer={"n_embd": 64, "window": 800},
            layers=(2, 3, 4),
            heads=(4, 4, 4),
            context={"context_channels": 32, "context_widths": (5, 5, 5, 4, 2, 2), "context_code": 64},
            long_window=2000,
            sample_rnn={"n_embd": 64, "bptt": 1024},
        ),
        Protocol(
            name="h100",
            sample_rate=16000,
            batch=16,
            length=1600,
            targets=60_000_000,
            wavenet={"residual_channels": 128, "skip_channels": 128, "head_channels": 256},
            transformer={"n_embd": 128, "window": 1600},
            layers=(3, 6, 8),
            heads=(4, 8, 8),
            context={"context_channels": 64, "context_widths": (5, 5, 5, 4, 4, 2), "context_code": 128},
            long_window=4000,
            sample_rnn={"n_embd": 256, "bptt": 1024},
            precision="bf16",
            compiled=True,
        ),
    )
}


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    title: str
    family: str  # rows of a family share the learning rate, chosen on its first row
    config: Any
    shuffled: bool = False  # the conditioning sees another recording
    share: float = 1.0  # of the training data

    def build(self) -> nn.Module:
        """The model, freshly initialised from torch's global generator."""
        model = MODELS[type(self.config)](self.config)
        if self.shuffled:
            model.context.register_forward_hook(neighbours_context)
        return model

    def context(self, protocol: Protocol) -> int:
        """Codes before the first target of a training crop, outside the loss: all that the row can see, for a
        transformer at least two windows (its layers see further, ever less)."""
        if isinstance(self.config, SampleTransformerConfig):
            return max(2 * self.config.window, protocol.long_window)
        return getattr(self.config, "receptive_field", protocol.sight)


def neighbours_context(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A forward hook that gives every row of a batch the context code of the row before it."""
    if len(output) < 2:
        raise ValueError("a shuffled context needs a batch of at least 2 rows")
    return output.roll(1, 0)


def rows(protocol: Protocol, companding: str) -> dict[str, Row]:
    """Every row of a protocol, by name, in the order of the table."""
    kind = {"sample_rate": protocol.sample_rate, "companding": companding}
    small, medium, large = (
        SampleTransformerConfig(n_layer=layers, n_head=heads, **protocol.transformer, **kind)
        for layers, heads in zip(protocol.layers, protocol.heads, strict=True)
    )
    wavenet10, wavenet30 = (WaveNetConfig(n_layer=n, **protocol.wavenet, **kind) for n in (10, 30))
    conditioned = replace(small, **protocol.context)
    seen, n = conditioned.context, small.n_layer
    wide = matched(small, "n_embd", 2 * small.n_head, conditioned)
    narrow = matched(wavenet30, "residual_channels", 1, large)
    return {
        row.name: row
        for row in (
            Row("wavenet10", "WaveNet, 10 layers", "wavenet", wavenet10),
            Row("wavenet30", "WaveNet, 30 layers", "wavenet", wavenet30),
            Row("transformer-small", f"transformer, {n} layers", "transformer", small),
            Row("transformer-context", f"{n} layers + context of {seen:,}", "transformer", conditioned),
            Row("transformer-medium", f"transformer, {medium.n_layer} layers", "transformer", medium),
            Row("transformer-large", f"transformer, {large.n_layer} layers", "transformer", large),
            Row("transformer-wide", f"control: {n} layers of {wide.n_embd}, as many parameters", "transformer", wide),
            Row(
                "transformer-long",
                f"control: {n} layers, window {protocol.long_window:,}",
                "transformer",
                replace(small, window=protocol.long_window),
            ),
            Row("transformer-shuffled", f"control: {n} layers + another's context", "transformer", conditioned, True),
            Row("wavenet30-matched", f"WaveNet, 30 layers of {narrow.residual_channels}", "wavenet", narrow),
            Row("samplernn", "SampleRNN, 3 tiers", "samplernn", SampleRNNConfig(**protocol.sample_rnn, **kind)),
        )
    }


def matched(config: Any, field: str, step: int, like: Any) -> Any:
    """`config` with its `field` moved in steps to where its parameters are nearest to those of `like`."""

    def at(value: int) -> Any:
        return replace(config, **{field: value})

    def distance(value: int) -> int:
        return abs(at(value).n_parameter - like.n_parameter)

    value, step = getattr(config, field), step if config.n_parameter < like.n_parameter else -step
    while value + step > 0 and distance(value + step) < distance(value):
        value += step
    return at(value)


# --- sweeps -------------------------------------------------------------------------------------------------------

SHARES = (1 / 8, 1 / 4, 1 / 2)
WIDTHS = {WaveNetConfig: "residual_channels", SampleTransformerConfig: "n_embd"}


def data_sweep(table: dict[str, Row]) -> dict[str, Row]:
    """The smallest WaveNet and transformer on an eighth, a quarter and half of the training data."""
    changed = [replace(row, share=share, title=f"{row.title}, {share:g} of the data",
                       name=f"{row.name}-data-1of{round(1 / share)}")
               for row in _smallest(table) for share in SHARES]  # fmt: skip
    return {row.name: row for row in changed}


def size_sweep(table: dict[str, Row]) -> dict[str, Row]:
    """The smallest WaveNet and transformer at half and twice their width."""
    changed = []
    for row in _smallest(table):
        field = WIDTHS[type(row.config)]
        for width in (getattr(row.config, field) // 2, getattr(row.config, field) * 2):
            config = replace(row.config, **{field: width})
            title = f"{row.title}, width {width}"
            changed.append(replace(row, config=config, title=title, name=f"{row.name}-width-{width}"))
    return {row.name: row for row in changed}


def _smallest(table: dict[str, Row]) -> list[Row]:
    return [table["wavenet10"], table["transformer-small"]]

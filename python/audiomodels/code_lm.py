"""CodeLM: a causal transformer that predicts the next code of a stream, and what it has learned about the stream.

    x_0     = embedding[code] (+ the condition's)
    x_l+1/2 = x_l + attention(norm(x_l)),   x_l+1 = x_l+1/2 + mlp(norm(x_l+1/2)),   then, if asked, causal Haar pooling
    logits  = head(norm(x_last))

Verma & Smith 2020, "A framework for contrastive and generative learning of audio representations" (arXiv 2010.11459),
with rotary positions (Su et al., 2104.09864). Attention is a window that slides over the whole stream
(audiokernels.causal_attention), so that generation with a ring of keys and values (causal_attention_decode) computes
the same numbers. Pooling is that of WaveletGPT (Verma 2024, 2409.12924): half of the channels become running means over
2, 4, 8, ... codes. An upsampler of vq_vae.py is the same model with a condition: the slower codes above its own.
`representation` is what a linear probe reads.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import audiokernels
from audiomodels._optional import require
from audiomodels.codebook import check_codes
from audiomodels.compare import predictors
from audiomodels.data import Recordings
from audiomodels.pretrained import Pretrained
from audiomodels.quantize import code_dtype, decode
from audiomodels.train import evaluate
from audiomodels.transformer_block import Block, angles

BLOCK = 64  # codes of a prompt that go through the model at once, and that `stream` yields at once


@dataclass(frozen=True)
class CodeLMConfig:
    """Sizes of a CodeLM, and the codes that it speaks."""

    n_class: int = 256  # codes are 0 .. n_class - 1
    n_layer: int = 6  # transformer blocks
    n_head: int = 8  # attention heads of a block
    n_embd: int = 256  # width of the stream that blocks read and add to
    window: int = 512  # codes that an attention layer sees
    dropout: float = 0.0  # share of numbers that training sets to zero
    haar: bool = False  # causal Haar pooling after every layer but the last
    condition_class: int = 0  # codes of the condition, a slower stream; 0: none
    condition_hop: int = 1  # codes that a code of the condition lasts
    codebook: str = ""  # codebook.name_of the codebook that the codes are of; "": not told
    sample_rate: int = 16000  # Hz, of the sound that the codes stand for
    hop: int = 512  # samples that a code stands for

    def __post_init__(self):
        limits = {
            "n_class": (2, 32768),
            "n_layer": (1, 1000),
            "n_head": (1, 1024),
            "n_embd": (8, 65536),
            "window": (1, 1 << 20),
            "condition_class": (0, 32768),
            "condition_hop": (1, 1 << 20),
            "sample_rate": (1000, 768_000),
            "hop": (1, 1 << 20),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            try:
                value = operator.index(value)
            except TypeError:
                raise TypeError(f"{name} must be an integer, got {value!r}") from None
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low} .. {high}, got {value}")
            object.__setattr__(self, name, value)
        head = self.n_embd // self.n_head
        if self.n_embd % self.n_head or head % 2 or not 8 <= head <= 256:
            raise ValueError(
                f"n_embd must be n_head = {self.n_head} times an even head of 8 .. 256 channels, got {self.n_embd}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def haar_levels(self) -> tuple[int, ...]:
        """The level of every channel's pooling: windows of up to half the attention's."""
        levels = audiokernels.haar_levels(self.n_embd, self.window, "linear")
        return tuple(level if level >= 0 else max(levels) for level in levels)


class State:
    """What generation remembers: keys and values (layer, batch, head, capacity, D), the poolings' sums, and how many
    codes have been seen. All are tensors: copy them to fork a stream."""

    def __init__(self, config: CodeLMConfig, batch: int, device: torch.device):
        shape = (config.n_layer, batch, config.n_head, config.window + BLOCK - 1, config.n_embd // config.n_head)
        self.keys, self.values = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.seen = torch.zeros(batch, dtype=torch.int32, device=device)
        levels, self.pools = config.haar_levels, []
        if config.haar:
            self.pools = [
                audiokernels.haar_pool_state(batch, config.n_embd, levels=levels, device=device)
                for _ in range(config.n_layer - 1)
            ]


class CodeLM(nn.Module, Pretrained):
    """model(codes) -> logits; model.generate(n) -> codes; model.representation(codes) for a probe."""

    config_class = CodeLMConfig

    def __init__(self, config: CodeLMConfig = CodeLMConfig()):  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.n_class, config.n_embd)
        self.condition = nn.Embedding(config.condition_class, config.n_embd) if config.condition_class else None
        self.around = nn.Conv1d(config.n_embd, config.n_embd, 3, padding=1) if config.condition_class else None
        sizes = (config.n_embd, config.n_head, config.window, config.n_layer)
        self.blocks = nn.ModuleList(
            Block(*sizes, activation=F.gelu, dropout=config.dropout) for _ in range(config.n_layer)
        )
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.n_class)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def code_rate(self) -> float:
        """Codes a second."""
        return self.config.sample_rate / self.config.hop

    def forward(self, codes: Tensor, condition: Tensor | None = None, *, length: int | None = None) -> Tensor:
        """Logits of the code after each of `codes`.

        Args:
            codes: integers (batch, time), 0 .. n_class - 1; a stream begins after the code n_class // 2.
            condition: integers (batch, frames), 0 .. condition_class - 1, frames = ceil(time / condition_hop): code i
                holds for logits i * condition_hop .. (i + 1) * condition_hop - 1. In a model with condition only.
            length: only the last `length` predictions.

        Returns:
            float (batch, length or time, n_class); logits[:, t] predicts codes[:, t + 1].
        """
        length = codes.shape[-1] if length is None else length
        if not 0 <= length <= codes.shape[-1]:
            raise ValueError(f"length must be 0 .. {codes.shape[-1]}, got {length}")
        x = self.representation(codes, condition)
        return self.head(x[:, x.shape[1] - length :])

    def representation(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the head reads: float (batch, time, n_embd), the last layer's output after its norm."""
        codes = check_codes(codes, self.config.n_class)
        return self._layers(codes, self._condition(condition, *codes.shape), None)

    def _condition(self, condition: Tensor | None, batch: int, time: int) -> Tensor | None:
        """The condition's part of the input, (batch, time, n_embd)."""
        classes, hop = self.config.condition_class, self.config.condition_hop
        if (condition is None) != (classes == 0):
            raise ValueError(f"condition must be given exactly for a model with one (condition_class is {classes})")
        if condition is None:
            return None
        condition = check_codes(condition, classes)
        if tuple(condition.shape) != (batch, -(-time // hop)):
            raise ValueError(
                f"condition must have shape {(batch, -(-time // hop))} for {time} codes, got {tuple(condition.shape)}"
            )
        x = self.condition(condition).transpose(1, 2)
        return (x + F.gelu(self.around(x))).transpose(1, 2).repeat_interleave(hop, dim=1)[:, :time]

    def _layers(self, codes: Tensor, condition: Tensor | None, state: State | None) -> Tensor:
        config = self.config
        x = self.embedding(codes) if condition is None else self.embedding(codes) + condition
        x, first = self.dropout(x), 0 if state is None else int(state.seen[0])
        positions = torch.arange(first, first + codes.shape[1], device=codes.device)
        turn = angles(positions, config.n_embd // config.n_head)
        for layer, block in enumerate(self.blocks):
            cache = None if state is None else [state.keys[layer], state.values[layer], state.seen]
            x = block(x, x.shape[1], turn, cache)
            if config.haar and layer + 1 < config.n_layer:
                x = self._pool(x, None if state is None else (state.pools[layer], state.seen))
        if state is not None:
            state.seen += codes.shape[1]
        return self.norm(x)

    def _pool(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> Tensor:
        options = {"levels": self.config.haar_levels, "norm": "count"}
        if state is None:
            return audiokernels.haar_pool(x, mode="causal", **options)
        rows = [
            audiokernels.haar_pool_update(row, state[0], state[1] + t, **options) for t, row in enumerate(x.unbind(1))
        ]
        return torch.stack(rows, dim=1)

    def generate(self, n: int, prompt: Tensor | None = None, *, progress: bool = False, **options) -> Tensor:
        """Draw n codes: (batch, n), without the prompt; uint8 up to 256 classes, int16 above.

        Args:
            n: codes to draw.
            prompt: codes (batch, m) or (m,) that come before them.
            progress: show a bar.
            options: condition, seed, batch, temperature, top_k, top_p: see `stream`, whose blocks these codes are.
        """
        dtype, device = code_dtype(self.config.n_class), self.head.weight.device
        blocks = [torch.empty(options.get("batch", 1), 0, dtype=dtype, device=device)]
        with require("tqdm").tqdm(total=n, unit="code", disable=not progress) as bar:
            for block in self.stream(n, prompt, **options):
                blocks.append(block)
                bar.update(block.shape[1])
        return torch.cat(blocks, dim=1)

    @torch.no_grad()
    def stream(
        self,
        n: int,
        prompt: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        seed: int = 0,
        batch: int = 1,
        **sampling: float,
    ) -> Iterator[Tensor]:
        """Draw n codes and yield them as they are made, in blocks of up to 64: codes (batch, <= 64).

        Args:
            n: codes to draw.
            prompt: codes (batch, m) or (m,) that come before them; without, a stream begins after n_class // 2.
            condition: codes (batch, frames), code i for codes i * condition_hop .. (i + 1) * condition_hop - 1 of
                prompt and new codes together.
            seed: with the position in the stream and the row it gives each draw (audiokernels.philox_uniform).
            batch: streams; a prompt or a condition has as many rows, or one for all.
            sampling: temperature, top_k, top_p: of audiokernels.Sampling.
        """
        if n < 0 or batch < 1:
            raise ValueError(f"n must be >= 0 and batch >= 1, got n={n}, batch={batch}")
        sampling = audiokernels.Sampling(**sampling)
        device, start = self.head.weight.device, self.config.n_class // 2
        known = torch.zeros(1, 0, dtype=torch.int64) if prompt is None else torch.atleast_2d(prompt)
        known = check_codes(known, self.config.n_class).to(device)
        if len(known) not in (1, batch):
            raise ValueError(f"prompt must have {batch} rows, or one for all, got {len(known)}")
        known = torch.cat([torch.full((batch, 1), start, device=device), known.expand(batch, -1)], dim=1)
        total = known.shape[1] - 1 + n
        if condition is not None:
            condition = torch.atleast_2d(condition).to(device).expand(batch, -1)
        condition = self._condition(condition, batch, total)
        state, first, uniforms = State(self.config, batch, device), known.shape[1] - 1, None
        was_training, made = self.training, []
        self.eval()
        try:
            for at in range(0, first + 1 if n else 0, BLOCK):
                part = slice(at, min(at + BLOCK, first + 1))
                x = self._layers(known[:, part], None if condition is None else condition[:, part], state)
            for position in range(first, total):
                if (position - first) % BLOCK == 0:
                    uniforms = audiokernels.philox_uniform(seed, batch, BLOCK, position=position).to(device)
                code = sampling.draw(self.head(x[:, -1]), uniforms[:, (position - first) % BLOCK])
                made.append(code)
                if len(made) == BLOCK or position + 1 == total:
                    yield torch.stack(made, dim=1).to(code_dtype(self.config.n_class))
                    made = []
                if position + 1 < total:
                    now = None if condition is None else condition[:, position + 1 : position + 2]
                    x = self._layers(code[:, None], now, state)
        finally:
            self.train(was_training)


def code_recordings(recordings: Recordings, coder: nn.Module) -> Recordings:
    """Each of `recordings` (of sound) as its stream of codes, for Crops, fit and evaluate.

    coder: has encode(audio (1, samples)) -> codes (1, time), `sample_rate`, `hop` and `codebook`, as PatchCodes. A
    recording shorter than a code is left out; what stays keeps name, group and label.
    """
    if recordings.sample_rate != coder.sample_rate:
        raise ValueError(f"recordings must be at {coder.sample_rate} Hz as the codes, got {recordings.sample_rate}")
    streams = [
        replace(r, codes=coder.encode(decode(r.codes, recordings.companding, recordings.n_class)[None])[0])
        for r in recordings
        if len(r.codes) >= coder.hop
    ]
    if not streams:
        raise ValueError(f"recordings must hold at least one of {coder.hop} samples, the length of a code")
    return Recordings(
        streams,
        sample_rate=max(1, round(coder.sample_rate / coder.hop)),
        companding="codes",
        n_class=len(coder.codebook),
        label_names=recordings.label_names,
    )


def perplexities(
    model: CodeLM, train: Recordings, test: Recordings, *, max_targets: int | None = None
) -> dict[str, float]:
    """Perplexity per code on `test` of the model, and of unigram and bigram counted on `train`, by name."""
    scores = {
        "code LM": evaluate(model, test, context=2 * model.config.window, max_targets=max_targets),
        "unigram": predictors.unigram(train, test, max_targets=max_targets),
        "bigram": predictors.bigram(train, test, max_targets=max_targets),
    }
    return {name: 2**score.bits for name, score in scores.items()}

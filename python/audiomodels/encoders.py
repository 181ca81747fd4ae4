"""From sound to rows of numbers and from codes to sound, whatever the method: the protocols, and adapters to them.

An `Encoder` is a PatchCodes (patch_codes.py), a level of a VQVAE (vq_vae.py), a SimCLR (simclr.py), or one of the
adapters here: a VGG that was trained to tag (`VGGEncoder`), a code language model (`CodeLMEncoder`), or a wav2vec 2.0,
HuBERT or EnCodec of Hugging Face's transformers from a local folder (`HuggingFaceEncoder`). A `Decoder` is a
PatchCodes, a level of a VQVAE, or one of unit_decoder.py.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from audiomodels._optional import require
from audiomodels.cnn import CNN
from audiomodels.code_lm import CodeLM
from audiomodels.pretrained import ModelError
from audiomodels.simclr import vgg_rows

KINDS = ("wav2vec2", "hubert", "encodec")  # model_type in the config.json of transformers


@runtime_checkable
class Encoder(Protocol):
    """Sound -> rows of numbers."""

    sample_rate: int
    """Of the sound, Hz."""
    hop: int
    """Samples between rows."""
    dim: int
    """Numbers in a row."""

    def embed(self, audio: Tensor) -> Tensor:
        """audio float (batch, samples), full scale [-1, 1] -> float (batch, time, dim), time about samples / hop."""


@runtime_checkable
class Coder(Protocol):
    """Sound -> codes 0 .. n_code - 1, one every `hop` samples: PatchCodes, units.Units, a level of a VQVAE."""

    sample_rate: int
    hop: int
    codebook: Tensor
    """(n_code, dim)."""

    def encode(self, audio: Tensor) -> Tensor:
        """audio float (batch, samples) -> integers (batch, time)."""


@runtime_checkable
class Decoder(Protocol):
    """Codes -> sound."""

    sample_rate: int
    hop: int

    def decode(self, codes: Tensor) -> Tensor:
        """codes integers (batch, time) -> audio float (batch, time * hop)."""


class VGGEncoder:
    """The feature map of a VGG, supervised or random, as rows of 80 ms."""

    def __init__(self, cnn: CNN):
        if cnn.config.kind != "vgg":
            raise ValueError(f"cnn must be of kind vgg, got {cnn.config.kind}")
        self.cnn, self.sample_rate, self.hop = cnn.eval(), cnn.config.sample_rate, 8 * (cnn.config.sample_rate // 100)
        self.dim = cnn.net[-1].in_features

    @torch.no_grad()
    def embed(self, audio: Tensor) -> Tensor:
        """(batch, samples / hop, dim); see simclr.vgg_rows."""
        return vgg_rows(self.cnn, audio)


class CodeLMEncoder:
    """The last layer of a code language model over the codes of the sound."""

    def __init__(self, coder: Coder, model: CodeLM):
        if len(coder.codebook) != model.config.n_class:
            raise ValueError(f"coder must have the model's {model.config.n_class} codes, got {len(coder.codebook)}")
        self.coder, self.model = coder, model.eval()
        self.sample_rate, self.hop, self.dim = coder.sample_rate, coder.hop, model.config.n_embd

    @torch.no_grad()
    def embed(self, audio: Tensor) -> Tensor:
        """(batch, codes, n_embd)."""
        return self.model.representation(self.coder.encode(audio).long())


class HuggingFaceEncoder:
    """A wav2vec 2.0, HuBERT or EnCodec from a folder that transformers' save_pretrained wrote; nothing is downloaded.

    layer: of the transformer's hidden states, 0 the input of the first layer; None: the last. EnCodec has none: its
    rows are what its quantiser would read. Errors: ModelError for a folder without such a model in safetensors.
    """

    def __init__(self, folder: str | os.PathLike, *, layer: int | None = None):
        folder = Path(folder)
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{folder / 'config.json'}: cannot be read: {error}") from error
        if kind not in KINDS:
            raise ModelError(f"{folder}: model_type must be one of {', '.join(KINDS)}, got {kind!r}")
        if not (folder / "model.safetensors").is_file():
            raise ModelError(f"{folder}: model.safetensors must be there (weights are read from safetensors only)")
        load = require("transformers", "dev").AutoModel.from_pretrained
        self.model = load(folder, local_files_only=True, use_safetensors=True, trust_remote_code=False).eval()
        self.kind, self.layer, self.folder, config = kind, layer, folder, self.model.config
        if kind == "encodec":
            self.sample_rate, self.dim = config.sampling_rate, config.hidden_size
            self.hop, self.least = math.prod(config.upsampling_ratios), math.prod(config.upsampling_ratios)
            return
        if layer is not None and not 0 <= layer <= config.num_hidden_layers:
            raise ValueError(f"layer must be 0 .. {config.num_hidden_layers}, got {layer}")
        self.sample_rate, self.dim, self.hop = 16000, config.hidden_size, math.prod(config.conv_stride)
        self.least = 1  # samples that the first row needs: the receptive field of the convolutions
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self.least = (self.least - 1) * stride + kernel

    @torch.no_grad()
    def embed(self, audio: Tensor) -> Tensor:
        """(batch, time, dim). Errors: ValueError for less sound than one row needs."""
        if audio.ndim != 2 or audio.shape[1] < self.least:
            raise ValueError(f"audio must be (batch, at least {self.least} samples), got {tuple(audio.shape)}")
        if self.kind == "encodec":
            return self.model.encoder(audio[:, None]).transpose(1, 2)
        # as these models' feature extractors do by default
        audio = (audio - audio.mean(1, keepdim=True)) / (audio.var(1, keepdim=True, correction=0) + 1e-7).sqrt()
        found = self.model(audio, output_hidden_states=self.layer is not None)
        return found.last_hidden_state if self.layer is None else found.hidden_states[self.layer]

"""The generators that the command line trains and reads, by the names that it knows them by."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch

from audiomodels.generator import Generator
from audiomodels.pretrained import CONFIG, ModelError, Pretrained, read_config
from audiomodels.sample_rnn import SampleRNN
from audiomodels.sample_transformer import SampleTransformer
from audiomodels.wave_rnn import WaveRNN
from audiomodels.wavenet import WaveNet

T = TypeVar("T", bound=Pretrained)

GENERATORS: dict[str, type[Generator]] = {
    "wavenet": WaveNet,
    "sample_transformer": SampleTransformer,
    "sample_rnn": SampleRNN,
    "wave_rnn": WaveRNN,
}


def load(
    folder: str | os.PathLike, kinds: Mapping[str, type[T]] = GENERATORS, *, device: torch.device | str = "cpu"
) -> T:
    """The model that `save_pretrained(folder)` wrote, or a shipped one by name, by its config one of `kinds`.

    Raises:
        ModelError: as Pretrained.from_pretrained; also where the config is that of none of them.
    """
    config = read_config(folder)
    for kind in kinds.values():
        known = {field.name for field in fields(kind.config_class)}
        if isinstance(config, dict) and config and known >= set(config):
            return kind.from_pretrained(folder, device=device)
    raise ModelError(f"{Path(folder) / CONFIG}: not the config of one of {', '.join(kinds)}")

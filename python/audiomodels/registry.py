"""The generators that the command line trains and reads, by the names that it knows them by."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch

from audiomodels import pretrained
from audiomodels.generator import Generator
from audiomodels.pretrained import CONFIG, ModelError, Pretrained, read_config, shipped
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
    if str(folder) in shipped() and not Path(folder).is_dir() and str(folder) not in shipped_of(kinds):
        names = ", ".join(shipped_of(kinds)) or "none"
        raise ModelError(f"{folder}: is not one of {', '.join(kinds)}; of the models shipped these are: {names}")
    kind = _kind_of(read_config(folder), kinds)
    if kind is None:
        raise ModelError(f"{Path(folder) / CONFIG}: not the config of one of {', '.join(kinds)}")
    return kind.from_pretrained(folder, device=device)


def shipped_of(kinds: Mapping[str, type[Pretrained]]) -> list[str]:
    """The names of the models that come with the package and are one of `kinds`."""
    folders = {name: pretrained.SHIPPED / name for name in shipped()}
    configs = {name: read_config(folder) for name, folder in folders.items() if (folder / CONFIG).is_file()}
    return [name for name, config in configs.items() if _kind_of(config, kinds) is not None]


def _kind_of(config: object, kinds: Mapping[str, type[T]]) -> type[T] | None:
    for kind in kinds.values():
        known = {field.name for field in fields(kind.config_class)}
        if isinstance(config, dict) and config and known >= set(config):
            return kind
    return None

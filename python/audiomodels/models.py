"""The generators of this project by their configs: which class a model folder belongs to."""

import contextlib
import json
import os
from dataclasses import fields
from pathlib import Path

import torch

from audiomodels.generator import Generator
from audiomodels.pretrained import CONFIG
from audiomodels.sample_rnn import SampleRNN
from audiomodels.sample_transformer import SampleTransformer
from audiomodels.wave_rnn import WaveRNN
from audiomodels.wavenet import WaveNet

GENERATORS: tuple[type[Generator], ...] = (WaveNet, SampleTransformer, SampleRNN, WaveRNN)


def from_folder(folder: str | os.PathLike, *, device: torch.device | str = "cpu") -> Generator:
    """The generator that `save_pretrained(folder)` wrote, whichever it is; see Pretrained.from_pretrained.

    Its class is the one whose config has the most of the names in config.json, the first where there is none.
    """
    path, names = Path(folder) / CONFIG, set()
    if path.is_file() and path.stat().st_size < 1 << 20:
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # from_pretrained says what is wrong
            names = set(json.loads(path.read_text(encoding="utf-8")))

    def shared(kind: type[Generator]) -> float:
        own = {field.name for field in fields(kind.config_class)}
        return len(own & names) / len(own | names)

    return max(GENERATORS, key=shared).from_pretrained(folder, device=device)

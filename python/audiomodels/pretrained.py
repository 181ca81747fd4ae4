"""save_pretrained and from_pretrained of every model: a folder with config.json and model.safetensors, nothing else.

huggingface_hub's PyTorchModelHubMixin writes the folder (and can push it to a hub). Reading is stricter than the
mixin's: the folder must exist, every tensor's name, shape and dtype is compared with the config before memory is taken,
and no pickle is ever read, whatever the folder holds.
"""

import copy
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from audiomodels._optional import require

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
SHIPPED = Path(__file__).parent / "checkpoints"  # models that come with the package, a folder and a card each
T = TypeVar("T", bound="Pretrained")
MAX_CONFIG_BYTES = 1 << 20
# What a tensor of the model may be in a file: floats of any width; what counts or flags, as it is.
DTYPES = {
    torch.float32: ("float", ("F32", "BF16", "F16")),
    torch.int64: ("int64", ("I64",)),
    torch.bool: ("bool", ("BOOL",)),
}


class ModelError(Exception):
    """A folder that does not hold the model asked for; the message names the file and the rule."""


class Pretrained(require("huggingface_hub").PyTorchModelHubMixin):
    """Base of a model whose __init__ takes one dataclass, `config`, and whose class names it in `config_class`."""

    config_class: type

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, dtype: torch.dtype | None = None, **options: Any
    ) -> str | None:
        """Write config.json and model.safetensors into a folder, which is made if need be (and a README.md card).

        dtype: torch.bfloat16 or float16 halves the file; from_pretrained gives float32 again. Default: as they are.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        model = self if dtype is None else copy.deepcopy(self).to(dtype)
        url = super(Pretrained, model).save_pretrained(save_directory, **options)
        shutil.copymode(Path(save_directory) / CONFIG, Path(save_directory) / WEIGHTS)  # safetensors makes it 0600
        return url

    @classmethod
    def from_pretrained(cls: type[T], folder: str | os.PathLike, *, device: torch.device | str = "cpu") -> T:
        """The model that `save_pretrained(folder)` wrote, or a shipped one by name, in evaluation mode, in float32.

        Raises:
            ModelError: no such folder, no such file, a damaged file, or one that belongs to another model.
        """
        folder = model_folder(folder)
        config = _checked(read_config(folder), folder / CONFIG, cls.config_class)
        with torch.device("meta"):  # shapes only
            model = cls(config)
        weights = _read_weights(folder / WEIGHTS, model.state_dict(), device)
        model.load_state_dict(weights, strict=True, assign=True)
        return model.eval()


def shipped() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) if SHIPPED.is_dir() else []


def title(name: str) -> str:
    """What the model card of a shipped model says first, in one line."""
    with (SHIPPED / name / CARD).open(encoding="utf-8") as card:
        return card.readline().strip("# \n")


def model_folder(name: str | os.PathLike) -> Path:
    """A folder itself; for the name of a shipped model (shipped() lists them), the folder that it came in.

    Raises:
        ModelError: neither a folder nor such a name.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if str(name) in shipped():
        return SHIPPED / str(name)
    raise ModelError(f"{name}: no such folder, and none of the models shipped: {', '.join(shipped()) or 'none'}")


def read_config(folder: str | os.PathLike) -> Any:
    """What the config.json of a model's folder holds, unchecked; ModelError where it cannot be read."""
    path = model_folder(folder) / CONFIG
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes, so it is no config")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error


def _checked(config: Any, path: Path, config_class: type) -> Any:
    """The config_class of what read_config gave."""
    known = {field.name for field in fields(config_class)}
    if not isinstance(config, dict) or not known & set(config):
        raise ModelError(f"{path}: not a {config_class.__name__}")
    if unknown := sorted(set(config) - known):
        raise ModelError(f"{path}: not a {config_class.__name__}: unknown {', '.join(map(repr, unknown[:5]))}")
    try:
        return config_class(**config)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error


def _read_weights(path: Path, expected: dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file (weights are read from safetensors only)")
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                missing, extra = sorted(set(expected) - names)[:3], sorted(names - set(expected))[:3]
                raise ModelError(f"{path}: other tensors than the config asks for; missing {missing}, unknown {extra}")
            for name, tensor in expected.items():
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                kind, allowed = DTYPES[tensor.dtype]
                if shape != tuple(tensor.shape) or dtype not in allowed:
                    raise ModelError(
                        f"{path}: {name} must be {kind} of shape {tuple(tensor.shape)}, got {dtype} {shape}"
                    )
            # A copy: the file's own pages must not change under the model when the file is replaced.
            return {name: file.get_tensor(name).to(device, t.dtype, copy=True) for name, t in expected.items()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error

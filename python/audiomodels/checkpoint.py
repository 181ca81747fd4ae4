"""Checkpoints of a training run: safetensors and JSON, made visible by one rename. No pickle is ever read from a file.

    folder/step-00000100/  model.safetensors      weights and buffers, named as in the model's state_dict
                           optimizer.safetensors  "<parameter>.<key>", for example "head.weight.exp_avg"
                           state.json             step, the RNG of every rank, what the caller adds
                           SHA256SUMS             of the three; `sha256sum -c SHA256SUMS` checks it

A checkpoint is written to folder/.tmp-step-00000100, synced to disk and renamed; an old one is renamed back to .tmp-
before it is removed. So a folder called step-* is always whole, whenever the process is killed, and `clean` takes away
what a killed process left. Files are not trusted: sizes are bounded before anything is read, sums are compared before
anything is parsed, everything is compared with the model before anything in it changes; the one error is
CheckpointError. (The sums find damage. They are no signature: whoever writes the files can write the sums.)

Under torch.distributed every rank calls `save` and `load`; rank 0 alone touches the disk. Sharded state (fully_shard)
is gathered with torch.distributed.checkpoint.state_dict, so a checkpoint is the same whatever wrote it, and one process
can load it. Cost: the bytes of weights and optimizer, written once and hashed once.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from audiomodels._optional import require

__all__ = ["CheckpointError", "checkpoints", "clean", "latest", "load", "lock", "on_rank0", "save", "step_of", "unwrap"]

MODEL, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"
SUMMED = (MODEL, OPTIMIZER, STATE)
TEMP = ".tmp-"
FORMAT = 1
STEP = re.compile(r"step-(\d{8,15})")
MAX_SUMS, MAX_STATE = 1 << 12, 1 << 21  # bytes read before anything is known to be ours; the RNG of a rank takes 14,000
MAX_KEYS = 8  # tensors an optimizer may keep per parameter (AdamW: 3)


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names the path and the rule."""


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints in `folder`, oldest step first; empty where there is no such folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = [(int(m[1]), path) for path in Path(folder).iterdir() if (m := STEP.fullmatch(path.name))]
        return [path for _, path in sorted(found) if path.is_dir()]
    return []


def latest(folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint in `folder`, or None."""
    return (checkpoints(folder) or [None])[-1]


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(path.name.removeprefix("step-"))


def clean(folder: str | os.PathLike) -> None:
    """Remove what a killed process left half written. Call it once the folder is yours (see `lock`)."""
    for path in Path(folder).glob(f"{TEMP}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Make `folder` and hold it: a second process that trains into it gets CheckpointError. The lock dies with us."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{folder}: must be a folder that can be written: {error}") from error
    try:
        if os.name == "posix":  # Windows has no flock
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{folder}: another process is training into this folder") from None
            except OSError:
                pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


# --- save ---------------------------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, Any] | None = None,
    keep: int = 3,
) -> Path:
    """Write folder/step-<step> and remove all but the newest `keep` checkpoints; returns its path.

    `state` is anything JSON holds (no NaN). The RNG states of torch (CPU, the current CUDA device), numpy and Python go
    along. Raises CheckpointError (disk full, no permission, the step is there already); older checkpoints then stay.
    """
    path = Path(folder) / f"step-{step:08d}"
    weights, moments = _gather(unwrap(model), optimizer)
    meta = {
        "format": FORMAT,
        "step": step,
        "optimizer": _kind(optimizer),
        "rng": _gather_rng(),
        "state": state or {},
    }
    on_rank0(lambda: _write(path, weights, moments, meta, keep))
    return path


def _write(path: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], meta: dict, keep: int) -> None:
    save_file = require("safetensors.torch", "models").save_file
    safetensor_error = require("safetensors", "models").SafetensorError
    text = json.dumps(meta, allow_nan=False, separators=(",", ":"))
    if len(text) > MAX_STATE:
        raise CheckpointError(f"{path}: {STATE} must be at most {MAX_STATE} bytes, got {len(text)}")
    temp = path.with_name(TEMP + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean(path.parent)
        if path.exists():
            raise CheckpointError(f"{path}: there is a checkpoint of this step already")
        temp.mkdir()
        (temp / STATE).write_text(text)
        for name, tensors in ((MODEL, weights), (OPTIMIZER, moments)):
            save_file(tensors, temp / name, metadata={"format": "pt"})
            os.chmod(temp / name, os.stat(temp / STATE).st_mode)  # safetensors makes 0600, whatever the umask
        (temp / SUMS).write_text("".join(f"{_sha256(temp / name)}  {name}\n" for name in SUMMED))
        for name in (*SUMMED, SUMS, "."):
            _sync(temp / name)
        os.rename(temp, path)
        _sync(path.parent)
        for old in checkpoints(path.parent)[: -max(1, keep)]:
            dropped = old.with_name(TEMP + old.name)
            os.rename(old, dropped)
            shutil.rmtree(dropped, ignore_errors=True)
    except (OSError, safetensor_error) as error:
        shutil.rmtree(temp, ignore_errors=True)
        raise CheckpointError(f"{path}: cannot be written: {error}; older checkpoints are untouched") from error


def _gather(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of weights and optimizer state, whole and on the CPU; empty on ranks other than 0."""
    stepped = optimizer is not None and bool(optimizer.state)
    if distributed():
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)
        # on an optimizer that has not stepped this would take a step
        moments = get_optimizer_state_dict(model, optimizer, options=options).get("state", {}) if stepped else {}
    else:
        names = {parameter: name for name, parameter in model.named_parameters()}
        weights = model.state_dict()
        moments = {names[parameter]: values for parameter, values in optimizer.state.items()} if stepped else {}
    flat = {f"{name}.{key}": value for name, values in moments.items() for key, value in values.items()}
    return _copies(weights), _copies(flat)


def _copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: only tensors can be saved, got {type(value).__name__}")
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- load ---------------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    rng: bool = False,
) -> tuple[int, dict[str, Any]]:
    """Put the checkpoint at `path` into `model` (and `optimizer`, with rng=True also the global RNGs).

    Returns (step, state). Learning rate and the other options of the optimizer stay as they are. Raises
    CheckpointError, with nothing changed, if a file is missing, damaged, foreign, larger than this model can need, or
    made for another model or optimizer.
    """
    model, path = unwrap(model), Path(path)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}

    def read() -> dict:
        try:
            meta, sums = _read_meta(path)
            weights.update(_read_weights(path / MODEL, sums[MODEL], shapes))
            if optimizer is not None:
                if meta["optimizer"] != _kind(optimizer):
                    raise CheckpointError(f"{path}: must hold the state of {_kind(optimizer)}, has {meta['optimizer']}")
                moments.update(_read_moments(path / OPTIMIZER, sums[OPTIMIZER], parameters))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return {**meta, "stepped": bool(moments)}

    meta = on_rank0(read)
    states = _decode_rng(path, meta["rng"])
    _scatter(model, weights, optimizer, moments if meta["stepped"] else None)
    if rng:
        _set_rng(states, meta["step"])
    return meta["step"], meta["state"]


def _read_meta(path: Path) -> tuple[dict, dict[str, str]]:
    """The checked state.json and the sums of the files."""
    match = STEP.fullmatch(path.name)
    if not match:
        raise CheckpointError(f"{path}: must be a folder called step-<8 digits>")
    lines = _read_small(path / SUMS, MAX_SUMS).decode("ascii", "replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if set(sums) != set(SUMMED):
        raise CheckpointError(f"{path / SUMS}: must hold the sums of {', '.join(SUMMED)}")
    text = _read_small(path / STATE, MAX_STATE)
    if hashlib.sha256(text).hexdigest() != sums[STATE]:
        raise CheckpointError(f"{path / STATE}: damaged: does not match {SUMS}")
    try:
        meta = json.loads(text)
        version, step = meta["format"], meta["step"]
        whole = isinstance(meta["rng"], list) and isinstance(meta["state"], dict) and "optimizer" in meta
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path / STATE}: not the state of a checkpoint: {error!r}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path / STATE}: format must be {FORMAT}, got {version!r}")
    if not whole or type(step) is not int or step != int(match[1]):
        raise CheckpointError(f"{path / STATE}: not the state of step {int(match[1])}")
    return meta, sums


def _read_weights(path: Path, digest: str, shapes: dict[str, tuple]) -> dict[str, Tensor]:
    limit = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    weights = _read_tensors(path, digest, limit, _header_limit(shapes))
    if weights.keys() != shapes.keys():
        odd = sorted(weights.keys() ^ shapes.keys())
        raise CheckpointError(f"{path}: made for another model: {len(odd)} names differ, {odd[0]!r} among them")
    for name, tensor in weights.items():
        if (tuple(tensor.shape), tensor.dtype) != shapes[name]:
            has = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise CheckpointError(f"{path}: made for another model: {name} must be {shapes[name]}, is {has}")
    return weights


def _read_moments(path: Path, digest: str, parameters: dict[str, tuple]) -> dict[str, Tensor]:
    limit = MAX_KEYS * 8 * sum(math.prod(shape) for shape in parameters.values())
    moments = _read_tensors(path, digest, limit, MAX_KEYS * _header_limit(parameters))
    keys: dict[str, set[str]] = {}
    for full, tensor in moments.items():
        name, _, key = full.rpartition(".")
        if name not in parameters or tuple(tensor.shape) not in (parameters[name], ()):
            raise CheckpointError(f"{path}: made for another model: {full} {tuple(tensor.shape)} fits no parameter")
        keys.setdefault(name, set()).add(key)
    if len(set(map(frozenset, keys.values()))) > 1:
        raise CheckpointError(f"{path}: damaged: must hold the same kinds of state for every parameter")
    return moments


def _header_limit(names: Iterable[str]) -> int:
    """Bytes that the header of a safetensors file with these names may take (JSON may write 6 for one of a name)."""
    return 1024 + sum(256 + 6 * len(name) for name in names)


def _read_tensors(path: Path, digest: str, limit: int, header_limit: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file that matches `digest` and holds at most `limit` bytes of them."""
    size = _size(path)
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > header_limit or not 8 + header <= size <= 8 + header + limit:
        rule = f"must be safetensors with a header of at most {header_limit} bytes and {limit} bytes of data"
        raise CheckpointError(f"{path}: {rule}, has {header} and {size} in all")
    if _sha256(path) != digest:
        raise CheckpointError(f"{path}: damaged: does not match {SUMS}")
    try:
        return {name: t.clone() for name, t in require("safetensors.torch", "models").load_file(path).items()}
    except Exception as error:  # whatever its parser raises on a foreign file, the caller sees one error
        raise CheckpointError(f"{path}: not safetensors: {error}") from error


def _read_small(path: Path, limit: int) -> bytes:
    if _size(path) > limit:
        raise CheckpointError(f"{path}: must be at most {limit} bytes")
    return path.read_bytes()


def _size(path: Path) -> int:
    """Size of a plain file: a pipe or a device in its place would hang the reader."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path}: must be a plain file")
    return info.st_size


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _scatter(
    model: nn.Module,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    moments: dict[str, Tensor] | None,
) -> None:
    """Weights and optimizer state, whole at rank 0, into this process; moments None: the optimizer never stepped."""
    nested: dict[str, dict[str, Tensor]] = {}
    for full, tensor in (moments or {}).items():
        name, _, key = full.rpartition(".")
        nested.setdefault(name, {})[key] = tensor
    if distributed():
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=options)
        if optimizer is not None and moments is not None:
            groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
            set_optimizer_state_dict(model, optimizer, {"state": nested, "param_groups": groups}, options=options)
        elif optimizer is not None:
            optimizer.state.clear()
        return
    model.load_state_dict(weights)
    if optimizer is not None:
        groups = optimizer.state_dict()["param_groups"]
        names = {parameter: name for name, parameter in model.named_parameters()}
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.load_state_dict(
            {"state": {i: nested[name] for i, name in enumerate(order) if name in nested}, "param_groups": groups}
        )


# --- random numbers -----------------------------------------------------------------------------------------------


def _gather_rng() -> list[dict[str, Any]]:
    """The RNG states of every rank, as JSON."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    mine = {
        "torch": _encode(torch.get_rng_state().numpy()),
        "numpy": [_encode(keys), int(position), int(has_gauss), float(cached)],
        "python": [version, _encode(np.array(words, np.uint32)), gauss],
        "cuda": _encode(torch.cuda.get_rng_state().numpy()) if torch.cuda.is_initialized() else None,
    }
    if not distributed():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _decode_rng(path: Path, states: list) -> dict[str, Any] | None:
    """This rank's checked RNG states; None where the checkpoint was written by fewer ranks."""
    rank = dist.get_rank() if distributed() else 0
    if rank >= len(states):
        return None
    try:
        state = states[rank]
        keys, position, has_gauss, cached = state["numpy"]
        version, words, gauss = state["python"]
        keys, words = _decode(keys, np.uint32), _decode(words, np.uint32)
        cpu = torch.from_numpy(_decode(state["torch"], np.uint8))
        torch.Generator().set_state(cpu)
        random.Random().setstate((version, tuple(map(int, words)), gauss))
        if len(keys) != 624 or not 0 <= position <= 624:  # numpy would read beyond its table
            raise ValueError("numpy's state must be 624 words and a position in them")
        np.random.RandomState().set_state(("MT19937", keys, position, has_gauss, cached))
        cuda = torch.from_numpy(_decode(state["cuda"], np.uint8)) if state["cuda"] else None
        return {
            "torch": cpu,
            "python": (version, tuple(map(int, words)), gauss),
            "numpy": ("MT19937", keys, position, has_gauss, cached),
            "cuda": cuda,
        }
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path / STATE}: not the state of the random generators: {error}") from error


def _set_rng(states: dict[str, Any] | None, step: int) -> None:
    if states is None:  # more ranks than wrote the checkpoint: a stream of its own for each
        torch.manual_seed(hash((step, dist.get_rank())))
        return
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _encode(words: np.ndarray) -> str:
    return base64.b64encode(words.astype(words.dtype.newbyteorder("<")).tobytes()).decode()


def _decode(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), np.dtype(dtype).newbyteorder("<")).astype(dtype)


# --- ranks --------------------------------------------------------------------------------------------------------


def distributed() -> bool:
    """Whether this process is one rank of a process group."""
    return dist.is_available() and dist.is_initialized()


def on_rank0(function: Callable[[], Any]) -> Any:
    """function() on rank 0; its result, or its CheckpointError, on every rank."""
    result = error = None
    if not distributed() or dist.get_rank() == 0:
        try:
            result = function()
        except CheckpointError as caught:
            error = caught
    if distributed():
        box = [result, error]
        dist.broadcast_object_list(box, src=0)
        result, error = box
    if error is not None:
        raise error
    return result


def _kind(optimizer: torch.optim.Optimizer | None) -> str | None:
    return None if optimizer is None else type(optimizer).__name__

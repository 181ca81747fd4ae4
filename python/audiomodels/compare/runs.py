"""What every comparison does alike: the files of its runs, where a run was made, and the choice of a learning rate."""

import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from audiomodels.compare.report import replace_text
from audiomodels.train import TrainingError

RESULT = "result.json"  # of a finished run
LEARNING_RATES = (3e-4, 1e-3, 3e-3)


def check_corpus(data: Path | None) -> None:
    """Before anything is written. ValueError where there is no such folder; None is for the caller to judge."""
    if data is not None and not data.is_dir():
        raise ValueError(f"data must be a corpus folder, as audiokernels build-corpus writes; {data} is none")


def is_done(out: Path, asked: dict[str, Any]) -> bool:
    """Does `out` hold a finished run? ValueError where it was one of other settings than `asked`."""
    if not (out / RESULT).is_file():
        return False
    found = read(out / RESULT)
    if any(found.get(key) != value for key, value in asked.items()):
        raise ValueError(f"{out}: holds a run of other settings; use another --out")
    return True


def choose_learning_rate(
    folder: Path, row: Any, size: int, trial: Callable[[float, Path], float | None], best: Callable, where: str = ""
) -> float:
    """Of LEARNING_RATES the one whose trial(lr, folder of its training) is best (min or max), at a tenth of the steps.

    row: the first of its family, which shares the rate. A trial that diverges gives None. What was tried stands in
    folder/learning_rates.json, by family and size of a run; `where` is printed before the row's title.

    Raises:
        TrainingError: all diverge.
    """
    path = folder / "learning_rates.json"
    known = read(path) if path.is_file() else {}
    tried = known.setdefault(f"{row.family} at {size}", {})
    for lr in LEARNING_RATES:
        if f"{lr:g}" not in tried:
            out = folder / f"lr-{row.family}-{size}-{lr:g}"
            print(f"{where}{row.title}, learning rate {lr:g} on a tenth of the steps", flush=True)
            tried[f"{lr:g}"] = trial(lr, out)
            write(path, known)
            shutil.rmtree(out)
    ended = {lr: value for lr, value in tried.items() if value is not None}
    if not ended:
        raise TrainingError(f"{row.name} diverges at every learning rate of {', '.join(tried)}")
    return float(best(ended, key=lambda lr: ended[lr]))


def environment(device: str, protocol: Any) -> dict[str, Any]:
    """Where and with what a run was made."""
    return {"commit": commit(), "device": device_name(device), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "protocol": asdict(protocol)}  # fmt: skip


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def write(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    replace_text(path, json.dumps(value, allow_nan=False, indent=1))


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit of this checkout, "+" where files differ from it; "" where this is no checkout."""
    if shutil.which("git") is None:
        return ""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def device_name(device: str) -> str:
    """The processor's or the GPU's name."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

"""What the reports of all comparisons write alike: figures with intervals, files that are whole or not there."""

import os
from dataclasses import asdict
from pathlib import Path

from audiomodels.compare.bootstrap import Estimate

SEEDS_FOR_AN_ORDER = 3
SMOKE = "\nThis protocol tests the plumbing. Its figures mean nothing; no order is given.\n"


def form(estimate: Estimate | None, *, sign: bool = False) -> str:
    """ "3.204 [3.101, 3.310]"."""
    if estimate is None:
        return "-"
    plus = "+" if sign else ""
    return f"{estimate.value:{plus}.3f} [{estimate.low:{plus}.3f}, {estimate.high:{plus}.3f}]"


def plain(estimate: Estimate | None) -> dict[str, float] | None:
    """As JSON holds it."""
    return None if estimate is None else asdict(estimate)


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}")
    temp.write_text(text)
    os.replace(temp, path)

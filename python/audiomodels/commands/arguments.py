"""Arguments that several commands take, and what they must be."""

from pathlib import Path
from typing import Annotated

from audiomodels._optional import require

tyro = require("tyro")
Data = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
AudioFile = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME")]
Out = Annotated[Path, tyro.conf.arg(aliases=("-o",))]


def check_seconds(seconds: float, most: float = 3600) -> None:
    """ValueError unless seconds are above 0 and at most `most`."""
    if not 0 < seconds <= most:
        raise ValueError(f"--seconds must be above 0 and at most {most:g}, got {seconds:g}")


def check_sound_file(out: Path) -> None:
    """ValueError unless `out` can be written as sound; said before the work, not after it."""
    if out.suffix.lower() not in (".wav", ".flac"):
        raise ValueError(f"--out must end in .wav or .flac, got {out}")

"""Arguments that several commands take, and what they must be."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from audiomodels import audio, plots
from audiomodels._optional import require

tyro = require("tyro")
Data = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
AudioFile = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME")]
Out = Annotated[Path | None, tyro.conf.arg(aliases=("-o",), metavar="FILE")]
OutFolder = Annotated[Path, tyro.conf.arg(metavar="DIR", aliases=("-o",))]


def check_seconds(seconds: float, most: float = 3600) -> None:
    """ValueError unless seconds are above 0 and at most `most`."""
    if not 0 < seconds <= most:
        raise ValueError(f"--seconds must be above 0 and at most {most:g}, got {seconds:g}")


def check_seed(seed: int) -> None:
    """ValueError unless all random numbers here take it."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"--seed must be in 0 .. 2**64 - 1, got {seed}")


def check_sound_file(out: Path, *read: Path | None, named: bool = True) -> None:
    """ValueError unless `out` can be written as sound and is none of the files `read`; said before the work.

    A name that the user did not give (`named`) replaces nothing but what was made here.
    """
    _check_file(out, (".wav", ".flac"))
    check_not_read(out, *read)
    _check_replaced(out, named, audio.is_ours)


def check_not_read(out: Path, *read: Path | None) -> None:
    """ValueError if `out`, which will be written, is one of the files `read`: a recording would be lost."""
    for file in read:
        if file is not None and file.exists() and out.exists() and out.samefile(file):
            raise ValueError(f"--out must be another file than {file}, which is read and would be lost")


def check_picture_file(out: Path, *, named: bool = True) -> None:
    """The same of a picture."""
    _check_file(out, (".png", ".pdf", ".svg"))
    _check_replaced(out, named, plots.is_ours)


def _check_replaced(out: Path, named: bool, is_ours: Callable[[Path], bool]) -> None:
    if not named and out.exists() and not is_ours(out):
        raise ValueError(f"{out} is there already, and audiokernels did not make it: move it, or give another --out")


def _check_file(out: Path, suffixes: tuple[str, ...]) -> None:
    if out.suffix.lower() not in suffixes:
        raise ValueError(f"--out must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}, got {out}")
    if out.is_dir():
        raise ValueError(f"--out must be a file, {out} is a folder")
    _check_writable(out, out.absolute().parents)


def check_folder(out: Path) -> None:
    """ValueError unless `out` is a folder or can become one."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    _check_writable(out, (out.absolute(), *out.absolute().parents))


def _check_writable(out: Path, folders: Sequence[Path]) -> None:
    above = next(folder for folder in folders if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"--out {out} cannot be written: {above} is no folder that may be written to")

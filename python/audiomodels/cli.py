"""The `audiokernels` command: those of its commands that are about this install, and how all of them are run.

A mistake of the user's (a missing file, a folder that holds no model) is one line on standard error and exit code 2; a
demo whose result is not good enough is exit code 1.
"""

import importlib.metadata
import logging
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Union

import audiokernels
from audiomodels import checkpoint, peers
from audiomodels._optional import require
from audiomodels.commands import generators, taggers, units
from audiomodels.commands.arguments import File, Name, check_folder, check_not_read
from audiomodels.corpus.builder import CorpusError
from audiomodels.demo import DemoConfig, DemoError, run
from audiomodels.pretrained import ModelError, shipped, title
from audiomodels.registry import shipped_of
from audiomodels.train import TrainingError
from audiomodels.wavenet import WaveNet, WaveNetConfig

tyro = require("tyro")
CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = "numpy soundfile soxr safetensors huggingface_hub tyro tqdm matplotlib scikit-learn accelerate tensorboard"
USER_ERRORS = (ModelError, CorpusError, checkpoint.CheckpointError, TrainingError, ValueError, OSError, ImportError)


@dataclass
class Info:
    """Which kernel serves which op here, the facts of the build, what is installed, and the models that came along."""

    check: bool = False  # also run every op here, on the CPU and on each GPU, and compare it with plain torch

    def run(self) -> None:
        wrong = runpy.run_module("audiokernels.__main__")["main"](["--check"] if self.check else [])
        print()
        for name in PACKAGES.split():
            try:
                print(f"{name:16} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                print(f"{name:16} not installed")
        print("\nmodels that came with the package, and the command that takes them:")
        commands = dict.fromkeys(shipped_of(generators.GENERATORS), "generate")
        commands |= dict.fromkeys(shipped_of(taggers.TAGGERS), "tag")
        for name in shipped():
            print(f"{commands.get(name, 'continue'):9} {title(name)}")
        if wrong:
            raise SystemExit(1)


@dataclass
class Demo(DemoConfig):
    """Train a small WaveNet on a bundled recording (about two minutes on two cores), generate sound, write a report.

    Fails unless the model beats unigram and bigram on the part of the recording that it has not seen, the sound is
    alive and as loud as the recording, and the kernel's codes agree with plain PyTorch.
    """

    recording: File = None  # audio file to train on; default: a bundled one

    def run(self) -> None:
        check_folder(self.out)
        for name in ("out.wav", "piano.wav", "original.wav"):
            check_not_read(self.out / name, self.recording)
        run(self)


@dataclass
class Bench:
    """Time WaveNet generation here: the fused kernel beside eager PyTorch, one core, the standard model.

    In a checkout, `--only NAME` runs benchmarks/benchmark_NAME.py instead, with its own tables and limits.
    """

    only: Name = None  # for example wavenet_generate
    quick: bool = False  # shows that it runs, not how fast it is

    def run(self) -> int:
        found = {p.stem.removeprefix("benchmark_"): p for p in sorted(CHECKOUT.glob("benchmarks/benchmark_*.py"))}
        if self.only is not None:
            if self.only not in found:
                raise ValueError(
                    f"--only must be one of {', '.join(found) or 'none: this is no checkout'}; got {self.only}"
                )
            return subprocess.run([sys.executable, found[self.only], *["--quick"] * self.quick], check=False).returncode
        model = WaveNet(WaveNetConfig()).eval()
        print("WaveNet of 20 layers, R=64, S=256, A=256; samples/s of all streams together, one core, CPU time")
        for batch in (1, 4):
            rates = peers.samples_per_second(model, batch=batch, seconds=0.05 if self.quick else 1.0)
            ours = rates["fused kernel"]
            for name, rate in rates.items():
                print(
                    f"batch {batch}  {name:14} {rate:>10,.1f}" + f"   1/{ours / rate:,.1f}" * (name != "fused kernel")
                )
        if found:
            print(f"more: audiokernels bench --only {{{','.join(found)}}}")
        return 0


COMMANDS = {"info": Info, "demo": Demo, **generators.COMMANDS, **taggers.COMMANDS, **units.COMMANDS, "bench": Bench}
TRAIN = generators.TRAIN | taggers.TRAIN  # by --model


def chosen(words: Sequence[str]) -> tuple[dict[str, type], list[str]]:
    """The commands, `train` being that of the model that `train --model NAME` asks for, and the words without it."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--model=") else [word])]
    if words[:1] != ["train"] or "--model" not in words:
        return COMMANDS, words
    place = words.index("--model")
    name = words[place + 1] if place + 1 < len(words) else "nothing"
    if name not in TRAIN:
        raise ValueError(f"--model must be one of {', '.join(TRAIN)}; got {name}")
    return COMMANDS | {"train": TRAIN[name]}, words[:place] + words[place + 2 :]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the words (default: those of the process) ask for; always ends in SystemExit."""
    logging.basicConfig(format="audiokernels: %(message)s")
    warnings.showwarning = lambda message, *_: print(f"audiokernels: {message}", file=sys.stderr)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a letter gets its number, not a traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        if words == ["--version"]:
            print(f"audiokernels {audiokernels.__version__}")
            raise SystemExit(0)
        kinds, words = chosen(words)
        commands = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())
        command = tyro.cli(
            Union[commands],  # noqa: UP007 (a tuple)
            prog="audiokernels",
            description="Raw-audio models: generate sound, tell what is heard; on the fused kernels of audiokernels.",
            args=words,
        )
        raise SystemExit(command.run() or 0)
    except DemoError as error:
        code, text = 1, f"the demo failed: {error}"
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except USER_ERRORS as error:
        code, text = 2, " ".join(str(error).split())
    except KeyboardInterrupt:
        code, text = 130, "interrupted"
    print(f"audiokernels: {text}", file=sys.stderr)
    raise SystemExit(code)

"""Commands of `audiokernels` around codes: train-units, continue, compare-representations. cli.py runs them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from audiomodels import textless
from audiomodels._optional import require
from audiomodels.audio import read_audio, write_audio
from audiomodels.commands.arguments import AudioFile, Data, Name, Out, check_seconds, check_seed, check_sound_file
from audiomodels.compare.representations import CompareRepresentationsConfig, RepresentationComparison
from audiomodels.data import Recordings

tyro = require("tyro")
Models = Annotated[Path, tyro.conf.arg(aliases=("--model",))]


@dataclass
class TrainUnits:
    """Train what `continue` needs, on recordings alone: units of sound, a language model over them, and a way back.

    DATA is a folder of audio, a manifest.jsonl or one audio file; no text, no labels. Into the folder OUT go the models
    and the checkpoints of their training; the same command again goes on where it was stopped.
    """

    data: Data  # folder, manifest.jsonl or audio file
    training: Annotated[textless.UnitTraining, tyro.conf.arg(name="")]
    part: Name = None  # a part of the manifest, for example speech

    def run(self) -> None:
        if not self.data.exists():
            raise ValueError(f"{self.data}: no such file or folder")
        rate = 16000 if self.training.encoder else self.training.patches.sample_rate
        kind = {"sample_rate": rate, "companding": "linear", "n_class": 1 << 16, "part": self.part}
        try:
            recordings = Recordings.load(self.data, **kind, split="train")
        except ValueError:  # no such split, or a problem that the next line meets too
            recordings = Recordings.load(self.data, **kind)
        print(f"{self.training.n_code} units from {recordings.seconds:.1f} s of sound")
        textless.train_units(recordings, self.training)
        print(f"{self.training.out}: audiokernels continue FILE --models {self.training.out} -o out.wav")


@dataclass
class Continue:
    """Continue a recording: the sound, and what follows, by the shipped models of piano or those of `train-units`."""

    file: AudioFile  # audio file to continue
    models: Models = Path("piano-units")  # name of shipped models, or folder that train-units wrote
    seconds: float = 5.0  # of new sound
    out: Out = None  # .wav or .flac; default: out.wav
    temperature: float = 1.0  # 0: always the most probable unit and sample
    top_k: int | None = None  # draw only from so many most probable ones
    top_p: float | None = None  # draw only from the fewest most probable ones that hold this share, for example 0.9
    seed: int = 0  # of the draws

    def run(self) -> None:
        check_seconds(self.seconds)
        check_seed(self.seed)
        out = self.out or Path("out.wav")
        check_sound_file(out, self.file, named=self.out is not None)
        models = textless.load(self.models)
        audio, _ = read_audio(self.file, sample_rate=models.coder.sample_rate)
        sampling = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        sound = textless.continue_sound(models, audio, self.seconds, seed=self.seed, progress=True, **sampling)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_audio(out, sound, models.coder.sample_rate)
        print(out)


@dataclass
class CompareRepresentations(CompareRepresentationsConfig):
    """Learn representations of sound, read labels off all of them the same way, and say what the results allow.

    Rows: a supervised VGG, a language model over codes, SimCLR, a bag of codes, and controls. Into OUT go runs,
    representations.json, .md and .png. The same command again goes on where it was stopped.
    """

    def run(self) -> None:
        RepresentationComparison(self).run()


COMMANDS = {"train-units": TrainUnits, "continue": Continue, "compare-representations": CompareRepresentations}

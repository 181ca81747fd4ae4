"""Packet-loss concealment: what a lost packet held, generated from the sound before it, beside the usual stand-ins.

A filler is called with the sound before a gap, the length of the gap and the sound after it, and gives its samples
and a little more, which is cross-faded into the sound after it. Four of them:

    generated       a generator goes on from the sound before; of several continuations the one that meets the sound
                    after the gap best is taken, which a receiver knows that waits for the next packet
    silence         zeros
    last packet     the last packet that came, again and again
    pitch period    the last period of the sound, as in ITU-T G.711 Appendix I (without its attenuation)

Every sample outside the gaps and the cross-fades stays as it is, to the bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiomodels import features, plots, quantize
from audiomodels._optional import require
from audiomodels.generator import Generator

Filler = Callable[[Tensor, int, Tensor], Tensor]  # (past, n, following) -> n to n + len(following) samples
PITCH_HZ = (66.0, 400.0)  # of the periods that are looked for
FLOOR = 1e-8  # of log-spectral distances: -80 dB below the recording's loudest point


class Gap(NamedTuple):
    """Samples start .. end - 1 are lost."""

    start: int
    end: int


def parse_gaps(text: str, sample_rate: int) -> list[Gap]:
    """Gaps of "START:LENGTH,...", both in seconds. Errors: ValueError for what is not of this form."""
    gaps = []
    for part in text.split(","):
        try:
            start, length = (float(number) for number in part.split(":"))
        except ValueError:
            raise ValueError(f"gaps must be START:LENGTH,... in seconds, for example 1.5:0.02, got {part!r}") from None
        if not (0 <= start < math.inf and 0 < length < math.inf):
            raise ValueError(f"gaps must start at 0 or later and have a length above 0, got {part!r}")
        first = round(start * sample_rate)
        gaps.append(Gap(first, first + max(1, round(length * sample_rate))))
    return gaps


def lost_packets(n: int, packet: int, rate: float, seed: int = 0) -> list[Gap]:
    """Gaps of n samples whose packets are lost independently with probability `rate`; the first packet never is."""
    if not 0 < rate < 1:
        raise ValueError(f"loss rate must be above 0 and below 1, got {rate}")
    if packet < 1:
        raise ValueError(f"packet must hold at least one sample, got {packet}")
    lost = np.random.default_rng(seed).random(-(-n // packet)) < rate
    return [Gap(i * packet, min(n, (i + 1) * packet)) for i in np.flatnonzero(lost) if i > 0]


def check_gaps(gaps: Sequence[Gap], n: int) -> list[Gap]:
    """The gaps in order, those that touch as one. Errors: ValueError where one leaves no sound before it, lies outside
    n samples, or overlaps another."""
    joined: list[Gap] = []
    for gap in sorted(gaps):
        if not 0 < gap.start < gap.end <= n:
            rule = f"gaps must begin after the first sample and end within the {n:,} of the recording"
            raise ValueError(f"{rule}, got samples {gap.start:,} .. {gap.end:,}")
        if joined and gap.start < joined[-1].end:
            raise ValueError(f"gaps must not overlap, got samples {joined[-1]} and {gap}".replace("Gap", ""))
        if joined and gap.start == joined[-1].end:
            gap = Gap(joined.pop().start, gap.end)
        joined.append(gap)
    if not joined:
        raise ValueError("gaps must be at least one: nothing is lost")
    return joined


def conceal(audio: Tensor, gaps: Sequence[Gap], fade: int, filler: Filler, *, progress: bool = False) -> Tensor:
    """audio (time,) with every gap filled, in order: a filler sees what came and what was filled before.

    fade: samples after a gap over which the filling gives way to what came, less where the next gap comes earlier.
    """
    gaps, out = check_gaps(gaps, len(audio)), audio.clone()
    pairs = zip(gaps, [*gaps[1:], Gap(len(audio), len(audio))], strict=True)
    for gap, following in require("tqdm").tqdm(pairs, total=len(gaps), unit="gap", disable=not progress):
        after = audio[gap.end : min(gap.end + fade, following.start)]
        made = filler(out[: gap.start], gap.end - gap.start, after)
        out[gap.start : gap.end] = made[: gap.end - gap.start]
        rest = made[gap.end - gap.start :]
        weight = (torch.arange(len(rest)) + 0.5) / max(1, len(rest))
        out[gap.end : gap.end + len(rest)] = (1 - weight) * rest + weight * after[: len(rest)]
    return out


# ---- fillers


def silence(past: Tensor, n: int, following: Tensor) -> Tensor:
    """Zeros."""
    return past.new_zeros(n)


def last_packet(packet: int) -> Filler:
    """The last `packet` samples again and again."""
    return lambda past, n, following: _again(past[-packet:], n + len(following))


def pitch_period(sample_rate: int) -> Filler:
    """The last period again and again; the period is where the last 40 ms are most like what came before them."""

    def fill(past: Tensor, n: int, following: Tensor) -> Tensor:
        return _again(past[-period(past, sample_rate) :], n + len(following))

    return fill


def period(past: Tensor, sample_rate: int) -> int:
    """The lag of 66 to 400 Hz of the largest normalised correlation at the end of past (time,); at most its length."""
    low, high = (math.ceil(sample_rate / hz) for hz in reversed(PITCH_HZ))
    length = min(sample_rate // 25, len(past) - high)
    if length < low:
        return min(len(past), high)
    end = past[-length:].double()
    before = past[len(past) - length - high :].double().unfold(0, length, 1).flip(0)  # row i lags by i
    energy = before.square().sum(1)
    likeness = (before @ end) / (energy * energy[0]).sqrt().clamp(min=1e-12)
    return low + int(likeness[low : high + 1].argmax())


def _again(piece: Tensor, n: int) -> Tensor:
    return piece.repeat(-(-n // len(piece)))[:n]


def generated(model: Generator, *, candidates: int = 1, seed: int = 0, **options: object) -> Filler:
    """What `model` draws after the sound before the gap, at most the last train_context samples of it.

    candidates: continuations that are drawn; the one whose squared error on the sound after the gap is least is taken.
    seed: of the draws; every gap has numbers of its own. options: of model.generate (temperature, top_k, top_p, dtype).
    """
    if not 1 <= candidates <= 1024:
        raise ValueError(f"candidates must be 1 .. 1024, got {candidates}")
    config = model.config

    def fill(past: Tensor, n: int, following: Tensor) -> Tensor:
        prompt = quantize.encode(past[-model.train_context :], config.companding, config.n_class)
        several = candidates if len(following) else 1
        codes = model.generate(n + len(following), prompt, batch=several, seed=(seed + len(past)) % 2**64, **options)
        sounds = quantize.decode(model.to_codes(codes), config.companding, config.n_class)
        return sounds[int((sounds[:, n:] - following).square().sum(1).argmin())]

    return fill


# ---- what it is worth


class Measures(NamedTuple):
    """Of the gaps in which the recording is not silent."""

    total_snr: float  # dB, all gaps together
    snr: Tensor  # dB, of each gap
    distance: Tensor  # dB, log-spectral, of each gap


def measure(audio: Tensor, filled: Tensor, gaps: Sequence[Gap], sample_rate: int) -> Measures:
    """How near `filled` comes to `audio` (time,) in the gaps: signal-to-noise ratio, and log-spectral distance.

    The distance is the root mean square over frequencies of the difference of both spectra in dB, over the frames of 32
    ms whose centres lie in the gap; no spectrum counts as less than 80 dB below the recording's loudest point.
    """
    n_fft = 2 ** round(math.log2(0.032 * sample_rate))
    hop = n_fft // 8
    power = torch.stack([features.spectrogram(x.float(), n_fft, hop).square() for x in (audio, filled)])
    db = 10 * torch.log10(power.clamp(min=FLOOR * float(power[0].max().clamp(min=1e-30))))
    frame_distance = (db[0] - db[1]).square().mean(0).sqrt()
    signal, noise, distance = [], [], []
    for gap in gaps:
        truth, made = audio[gap.start : gap.end].double(), filled[gap.start : gap.end].double()
        if not truth.any():
            continue
        frames = slice(-(-gap.start // hop), max(-(-gap.start // hop) + 1, -(-gap.end // hop)))
        signal.append(truth.square().sum())
        noise.append((truth - made).square().sum().clamp(min=1e-20))
        distance.append(frame_distance[frames].mean())
    if not signal:
        raise ValueError("gaps must lie where the recording is not silent, or there is nothing to measure")
    signal, noise = torch.stack(signal), torch.stack(noise)
    return Measures(_db(signal.sum() / noise.sum()).item(), _db(signal / noise), torch.stack(distance))


def _db(ratio: Tensor) -> Tensor:
    return 10 * torch.log10(ratio)


def table(measures: Mapping[str, Measures]) -> str:
    """The measures as lines of text: medians over gaps, with quartiles."""

    def spread(values: Tensor) -> str:
        low, middle, high = torch.quantile(values.double(), torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
        return f"{middle:6.1f} ({low:.1f}..{high:.1f})"

    lines = [f"{'':14} {'SNR of all':>10}   {'SNR, dB':22} log-spectral distance, dB"]
    for name, m in measures.items():
        lines.append(f"{name:14} {m.total_snr:7.2f} dB   {spread(m.snr):22} {spread(m.distance)}")
    note = f"{len(next(iter(measures.values())).snr):,} gaps; medians and quartiles over them"
    return "\n".join([*lines, f"{note}; more SNR and less distance are better"])


def picture(
    audio: Tensor,
    filled: Mapping[str, Tensor],
    measures: Mapping[str, Measures],
    gaps: Sequence[Gap],
    sample_rate: int,
) -> plots.Figure:
    """The sound with its gaps, log-mel before and after, the measures, and the gap of middle distance sample by sample.

    filled, measures: by the name of the filler, the first one drawn in colour.
    """
    first = next(iter(filled))
    fig, grid = plots.figure(13, 11, 4, 2)
    axis = plots.add(fig, grid[0, :], f"{len(audio) / sample_rate:.1f} s, {len(gaps)} gaps (orange)")
    plots.waveform(axis, audio, sample_rate, color=plots.GREY)
    for gap in gaps:
        axis.axvspan(gap.start / sample_rate, gap.end / sample_rate, color=plots.ORANGE, alpha=0.6, linewidth=0)
    lost = conceal(audio, gaps, 0, silence)
    top = 10 * math.log10(float(plots.mel_power(audio, sample_rate).max()) + 1e-12)
    for column, (name, sound) in enumerate({"what came": lost, first: filled[first]}.items()):
        plots.log_mel(plots.add(fig, grid[1, column], f"log-mel, {name}"), sound, sample_rate, top_db=top)
    middle = {name: float(m.distance.quantile(0.5)) for name, m in measures.items()}
    axis = plots.add(fig, grid[2, 0], "log-spectral distance in the gaps, median (less is better)")
    plots.bars(axis, middle, "dB", form="{:.1f}")
    axis = plots.add(fig, grid[2, 1], "SNR in all gaps together (more is better; silence has 0)")
    axis.barh(list(measures), [m.total_snr for m in measures.values()], height=0.6,
              color=[plots.BLUE] + [plots.GREY] * (len(measures) - 1))  # fmt: skip
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("dB")
    audible = [gap for gap in gaps if audio[gap.start : gap.end].any()]
    gap = audible[int(measures[first].distance.argsort()[len(audible) // 2])]
    margin = max(gap.end - gap.start, sample_rate // 100)
    part = slice(max(0, gap.start - margin), gap.end + margin)
    axis = plots.add(fig, grid[3, :], f"the gap of middle distance, at {gap.start / sample_rate:.3f} s")
    ms = torch.arange(part.start, part.start + len(audio[part])) * (1000 / sample_rate)
    axis.axvspan(gap.start * 1000 / sample_rate, gap.end * 1000 / sample_rate, color=plots.ORANGE, alpha=0.2)
    shown = {name: sound for name, sound in filled.items() if name != "silence"} | {"lost": audio}
    for (name, sound), style in zip(shown.items(), ("-", "--", ":", "-"), strict=False):
        color = plots.BLUE if name == first else "black" if name == "lost" else plots.GREY
        axis.plot(ms, sound[part], style, color=color, linewidth=1.4 if name in (first, "lost") else 0.9, label=name)
    axis.set(xlabel="ms", xlim=(float(ms[0]), float(ms[-1])))
    axis.legend(fontsize=8, frameon=False, ncols=len(shown))
    return fig

"""Notes for the tests of codes: decaying harmonic tones, data sets of them, and the pitch that a sound has."""

import math

import torch
from audiomodels import quantize
from audiomodels.data import Recording, Recordings

RATE = 8000


def note(midi, seconds=0.5, *, rate=RATE, decay=0.4, gain=0.4):
    """A struck string: harmonics k of amplitude decay^k, higher ones fading faster; float32 (time,)."""
    t, hz = torch.arange(round(seconds * rate)) / rate, 440 * 2 ** ((midi - 69) / 12)
    partials = (
        torch.sin(2 * torch.pi * hz * k * t) * decay ** (k - 1) * torch.exp(-t * (2 + k))
        for k in range(1, 8)
        if hz * k < rate / 2
    )
    return gain * sum(partials) * (200 * t).clamp(max=1)


def pair(low=60, high=62, seconds=0.5, count=6):
    """Two notes in turn: (sound (time,), which of the two each sample belongs to)."""
    sound = torch.cat([note((low, high)[i % 2], seconds) for i in range(count)])
    return sound, torch.arange(len(sound)) // round(seconds * RATE) % 2


def recordings(sounds, *, rate=RATE, n_class=65536):
    """Sounds (time,) as a data set of 16-bit codes, each a group of its own."""
    rows = [Recording(f"{i}", quantize.encode(sound, "linear", n_class), f"{i}") for i, sound in enumerate(sounds)]
    return Recordings(rows, sample_rate=rate, companding="linear", n_class=n_class)


def notes(midis, seconds=0.5):
    """Each note in three loudnesses, after three pauses."""
    variants = ((1.0, 0), (0.8, 77), (0.6, 140))
    return recordings(
        [gain * torch.cat([torch.zeros(pause), note(m, seconds)]) for m in midis for gain, pause in variants]
    )


def cents_off(sound, midi, *, rate=RATE, skip=0.05, seconds=0.3):
    """How far the pitch of sound (time,) lies from a note: that of the first peak of the autocorrelation which is at
    least 0.9 of the largest, between 60 and 1200 Hz."""
    piece = sound[round(skip * rate) :][: round(seconds * rate)].double()
    n = len(piece)
    power = torch.fft.rfft(piece, 2 * n).abs().square()
    correlation = torch.fft.irfft(power)[: n // 2] / torch.arange(n, n - n // 2, -1)
    lags = range(max(2, rate // 1200), min(rate // 60, n // 2 - 1))
    peaks = [i for i in lags if correlation[i - 1] < correlation[i] >= correlation[i + 1]]
    if not peaks:
        return math.inf
    top = max(float(correlation[i]) for i in peaks)
    lag = next(i for i in peaks if correlation[i] >= 0.9 * top)
    before, at, after = correlation[lag - 1 : lag + 2].tolist()
    lag += 0.5 * (before - after) / (before - 2 * at + after)
    return abs(1200 * math.log2(rate / lag / 440) + 6900 - 100 * midi)

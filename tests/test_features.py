"""Spectrogram, log-frequency, mel, constant-Q: values against direct sums, and what each picture must show."""

import contextlib
import math

import numpy as np
import pytest
import torch
from audiomodels import features, plots, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 16000
KINDS = {
    "spectrogram": features.spectrogram,
    "log": lambda x: features.log_spectrogram(x, RATE),
    "mel": lambda x: features.mel(x, RATE),
    "constant_q": lambda x: features.constant_q(x, RATE),
}


def sines(hz, amplitudes=None, seconds=1.0, rate=RATE):
    time = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    amplitudes = amplitudes or [1.0] * len(hz)
    return sum(a * torch.sin(2 * math.pi * f * time) for f, a in zip(hz, amplitudes, strict=True)).float()


def harmonic(f0, count=8):
    return sines([f0 * n for n in range(1, count + 1)], [1 / n for n in range(1, count + 1)])


def peaks(column, floor=0.02):
    """Bins that are above their neighbours and above `floor` times the highest one."""
    c = column.tolist()
    return [i for i in range(1, len(c) - 1) if c[i - 1] < c[i] > c[i + 1] and c[i] > floor * max(c)]


# --- spectrogram ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_fft", "hop", "win"), [(1024, 256, None), (512, 160, 400), (63, 7, None), (2, 1, None)])
@pytest.mark.parametrize("length", [1, 100, 4001])
def test_spectrogram_is_torch_stft(n_fft, hop, win, length):
    audio = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(0))
    got = features.spectrogram(audio, n_fft, hop, win_length=win)
    padded = torch.nn.functional.pad(audio.flatten(0, 1), (n_fft, n_fft))  # torch.stft refuses audio below n_fft / 2
    window = torch.hann_window(win or n_fft)
    stft = torch.stft(padded, n_fft, 1, win or n_fft, window, pad_mode="constant", return_complex=True).abs()
    want = stft[..., n_fft : n_fft + length : hop].unflatten(0, (2, 3))
    torch.testing.assert_close(got[..., : want.shape[-1]], want, rtol=1e-5, atol=1e-5)
    assert got.shape == (2, 3, n_fft // 2 + 1, (length - n_fft % 2) // hop + 1)


def test_spectrogram_is_the_sum_that_defines_it():
    audio = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    got = features.spectrogram(audio, 256, 100)
    n = np.arange(256)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 256)
    for frame in (2, 17):
        piece = audio.numpy().astype(np.float64)[frame * 100 - 128 :][:256] * window
        want = np.abs([np.sum(piece * np.exp(-2j * np.pi * k * n / 256)) for k in range(129)])
        np.testing.assert_allclose(got[:, frame].numpy(), want, atol=1e-4)


@pytest.mark.parametrize("hz", [(500, 1000, 2500), (250, 3000, 7000)])
def test_three_sines_are_three_peaks(hz):
    audio = sines(hz)
    column = features.spectrogram(audio, 1024, 256)[:, 30]
    assert peaks(column) == [round(f * 1024 / RATE) for f in hz]
    np.testing.assert_allclose(column[peaks(column)], 1024 / 4, rtol=1e-3)  # amplitude 1: half the window's sum
    centres = np.array(features.log_bins(RATE))
    nearest = [int(np.abs(np.log(centres / f)).argmin()) for f in hz]
    for kind in ("constant_q", "log"):
        assert peaks(KINDS[kind](audio)[:, 30]) == nearest
    edges = [features.mel_to_hz(features.hz_to_mel(RATE / 2) * i / 81) for i in range(82)]
    found = peaks(features.mel(audio, RATE)[:, 30])
    assert len(found) == 3 and all(edges[i] < f < edges[i + 2] for i, f in zip(found, hz, strict=True))


def test_a_square_wave_has_odd_harmonics_that_fall_with_their_number():
    f0 = 250.0
    period = RATE / f0
    square = torch.where(torch.arange(RATE) % period < period / 2, 1.0, -1.0)
    column = features.spectrogram(square, 1024, 256)[:, 30]
    odd = [1, 3, 5, 7, 9]
    assert peaks(column)[:5] == [round(n * f0 * 1024 / RATE) for n in odd]
    # sampled without a filter a harmonic is 1 / sin, not 1 / n: 2 % more than 1/9 at the ninth
    heights = column[peaks(column)[:5]] / column[peaks(column)[0]]
    np.testing.assert_allclose(heights, [1 / n for n in odd], rtol=0.05)


# --- logarithmic axes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "f0", "count"), [("constant_q", 110, 8), ("log", 440, 5)])
@pytest.mark.parametrize("semitones", [1, 2, 5, 7, 12])
def test_a_tone_that_rises_shifts(kind, f0, count, semitones):
    low, high = (KINDS[kind](harmonic(f, count)).mean(-1) for f in (f0, f0 * 2 ** (semitones / 12)))
    shift = semitones * 24 // 12
    assert torch.corrcoef(torch.stack([low[:-shift], high[shift:]]))[0, 1] > 0.98
    assert torch.corrcoef(torch.stack([low, high]))[0, 1] < 0.6


def test_constant_q_is_the_sum_that_defines_it():
    audio = torch.randn(RATE, generator=torch.Generator().manual_seed(2))
    got = features.constant_q(audio, RATE, bins_per_octave=12, f_min=100.0, hop=1000)
    q = 1 / (2 ** (1 / 12) - 1)
    for index in (0, 20, got.shape[0] - 1):
        f = 100 * 2 ** (index / 12)
        half = round(q * RATE / f / 2)
        n = np.arange(-half, half + 1)
        window = 0.5 + 0.5 * np.cos(np.pi * n / half)
        kernel = window / window.sum() * np.exp(-2j * np.pi * f / RATE * n)
        want = [abs((audio.numpy()[t - half : t + half + 1] * kernel).sum()) for t in (5000, 8000)]
        np.testing.assert_allclose(got[index, [5, 8]], want, rtol=1e-4 if index < 30 else 1e-2)
    tone = features.constant_q(sines([100 * 2 ** (30 / 12)]), RATE, bins_per_octave=12, f_min=100.0)
    assert float(tone[30, 30]) == pytest.approx(0.5, rel=1e-3)
    # its own kernel and its neighbours: half a bin's resolution away nothing is left but the Hann window's shape
    assert float(tone[33:, 30].max()) < 0.01 and float(tone[:28, 30].max()) < 0.01


def test_log_bins():
    hz = features.log_bins(RATE, 12, 55.0)
    assert hz[0] == 55 and hz[12] == pytest.approx(110) and hz[-1] * 2 ** (2 / 12) <= 8000 < hz[-1] * 2 ** (3 / 12)
    rows = features._log_filters(hz, RATE, 1024, 12)
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-6)
    # below the STFT's resolution a bin interpolates between its two neighbours
    assert int((rows[0] > 0).sum()) == 2
    assert float((rows[0] * torch.linspace(0, 8000, 513)).sum()) == pytest.approx(55, rel=1e-5)


# --- mel --------------------------------------------------------------------------------------------------------------


def bands(n_mel, n_fft, rate, slaney, area):
    """Mel triangles by the closed forms, with numpy and for each bin by itself."""
    to = (
        (lambda f: 3 * f / 200 if f < 1000 else 15 + np.log(f / 1000) / (np.log(6.4) / 27))
        if slaney
        else (lambda f: 1127.0104805 * np.log1p(f / 700))
    )
    table = np.array([(to(f), f) for f in np.arange(0, rate, 0.05)])
    edges = np.interp(np.linspace(0, to(rate / 2), n_mel + 2), *table.T)
    rows = np.zeros((n_mel, n_fft // 2 + 1))
    for m in range(n_mel):
        for k in range(n_fft // 2 + 1):
            f, (a, b, c) = k * rate / n_fft, edges[m : m + 3]
            rows[m, k] = (f - a) / (b - a) if a <= f <= b else (c - f) / (c - b) if b < f <= c else 0
        rows[m] *= 2 / (edges[m + 2] - edges[m]) if area else 1
    return rows


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize("norm", [None, "slaney"])
def test_mel_filters_are_the_closed_form(scale, norm):
    got = features.mel_filters(40, 512, RATE, scale, norm)
    want = bands(40, 512, RATE, scale == "slaney", norm == "slaney")
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)
    fine = features.mel_filters(40, 1 << 16, RATE, scale, norm)
    if norm is None:
        np.testing.assert_allclose(fine.amax(1), 1, atol=0.02)
        # neighbours cross so that they sum to 1 between the first and the last centre
        first, last = (int(fine[i].argmax()) for i in (0, -1))
        np.testing.assert_allclose(fine.sum(0)[first + 1 : last], 1, atol=1e-4)
    else:
        np.testing.assert_allclose(fine.double().sum(1) * RATE / (1 << 16), 1, rtol=1e-3)


def test_mel_scales_have_their_known_points():
    assert features.hz_to_mel(1000) == pytest.approx(999.99, abs=0.01)
    assert features.hz_to_mel(1000, "slaney") == 15 and features.hz_to_mel(6400, "slaney") == pytest.approx(42)
    for scale in ("htk", "slaney"):
        for hz in (0.0, 100.0, 999.0, 1000.0, 7777.0):
            assert features.mel_to_hz(features.hz_to_mel(hz, scale), scale) == pytest.approx(hz)


def test_mel_equals_librosa():
    librosa = pytest.importorskip("librosa", reason="an oracle beside the closed form, where it is installed")
    for scale in ("htk", "slaney"):
        for norm in (None, "slaney"):
            want = librosa.filters.mel(sr=RATE, n_fft=1024, n_mels=64, htk=scale == "htk", norm=norm)
            np.testing.assert_allclose(features.mel_filters(64, 1024, RATE, scale, norm), want, atol=1e-5)


def test_mel_is_filters_times_power():
    audio = torch.randn(2, 5000, generator=torch.Generator().manual_seed(3))
    got = features.mel(audio, RATE, n_fft=512, hop=160, n_mel=20, scale="slaney", norm="slaney")
    want = features.mel_filters(20, 512, RATE, "slaney", "slaney") @ features.spectrogram(audio, 512, 160) ** 2
    torch.testing.assert_close(got, want)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_silence_dtypes_and_gradients(kind):
    f = KINDS[kind]
    audio = torch.randn(2, 3, 3000, generator=torch.Generator().manual_seed(4))
    got = f(audio)
    assert got.shape[:2] == (2, 3) and got.shape[3] == 3000 // 256 + 1 and got.dtype == torch.float32
    torch.testing.assert_close(got[1, 2], f(audio[1, 2].clone()), rtol=1e-4, atol=1e-4)
    assert float(f(torch.zeros(100)).abs().max()) == 0
    assert f(audio.double()).dtype == torch.float64
    torch.testing.assert_close(f(audio.double()).float(), got, rtol=1e-3, atol=1e-3)
    assert f(audio.bfloat16()).dtype == torch.float32
    audio.requires_grad_()
    f(audio).sum().backward()
    assert torch.isfinite(audio.grad).all() and audio.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("call", "error", "rule"),
    [
        (lambda: features.spectrogram(torch.zeros(9).long()), TypeError, "audio must be a floating point.*int64"),
        (lambda: features.spectrogram([0.0]), TypeError, "audio must be a floating point tensor, got list"),
        (lambda: features.spectrogram(torch.zeros(2, 0)), ValueError, r"at least one sample, got shape \(2, 0\)"),
        (lambda: features.spectrogram(torch.zeros(9), 1), ValueError, "n_fft must be 2 .. .*, got 1"),
        (lambda: features.spectrogram(torch.zeros(9), 8, 0), ValueError, "hop must be 1 .. .*, got 0"),
        (lambda: features.spectrogram(torch.zeros(9), 8, 2.0), TypeError, "hop must be an int, got float"),
        (lambda: features.spectrogram(torch.zeros(9), 8, win_length=9), ValueError, "at most n_fft, 8; got 9"),
        (lambda: features.mel(torch.zeros(9), RATE, n_mel=0), ValueError, "n_mel must be 1 .. .*, got 0"),
        (lambda: features.mel(torch.zeros(9), RATE, scale="bark"), ValueError, "'htk' or 'slaney', got 'bark'"),
        (lambda: features.mel(torch.zeros(9), RATE, norm="area"), ValueError, "None or 'slaney', got 'area'"),
        (
            lambda: features.constant_q(torch.zeros(9), RATE, f_min=5000.0),
            ValueError,
            "1000, the sample rate / 16; got 5000",
        ),
        (lambda: features.log_spectrogram(torch.zeros(9), RATE, bins_per_octave=0), ValueError, "bins_per_octave"),
    ],
)
def test_wrong_arguments(call, error, rule):
    with pytest.raises(error, match=rule):
        call()


@pytest.mark.parametrize("rate", [8000, 44100])
def test_every_kind_is_drawn(rate, tmp_path):
    fig, grid = plots.figure(6, 8, len(plots.KINDS), 1)
    audio = sines([440.0], seconds=0.3, rate=rate)
    for row, kind in enumerate(plots.KINDS):
        axis = plots.add(fig, grid[row, 0], kind)
        plots.sound(axis, kind, audio, rate)
        if kind != "waveform":
            image = axis.images[0].get_array()
            top = int(image[:, image.shape[1] // 2].argmax()) / image.shape[0]
            where = {
                "spectrogram": 440 / (rate / 2),
                "mel": features.hz_to_mel(440) / features.hz_to_mel(rate / 2),
            }.get(kind, 72 / len(features.log_bins(rate)))  # three octaves above 55 Hz
            assert top == pytest.approx(where, abs=0.02)
    fig.savefig(tmp_path / "x.png")
    with pytest.raises(ValueError, match="kind must be one of waveform, .*; got 'bark'"):
        plots.sound(axis, "bark", audio, rate)


@pytest.mark.parametrize("kind", ["mel", "log_spectrogram", "mu-law"])
def test_what_is_kept_is_whole_whoever_asked_first(kind):
    """Filter banks and tables are made once: under inference_mode, on another device, or while a model is exported."""

    class Model(torch.nn.Module):
        def forward(self, x):
            return call(x, rate)

    def call(x, rate):
        if kind == "mu-law":
            return quantize._mulaw_table(rate)[:4] * x.sum()
        return getattr(features, kind)(x, rate)

    def inference():
        with torch.inference_mode():
            call(torch.randn(1, 3000), rate)

    def elsewhere():
        with torch.device("meta"), contextlib.suppress(Exception):
            call(torch.randn(1, 3000, device="cpu"), rate)

    def export():
        torch.export.export(Model(), (torch.randn(1, 3000),), strict=False)

    for rate, first in ((8001, inference), (8002, elsewhere), (8003, export)):
        first()
        x = torch.randn(1, 3000, requires_grad=True)
        y = call(x, rate)
        assert type(y) is torch.Tensor and y.device.type == "cpu"
        y.sum().backward()
        assert x.grad.isfinite().all()


def test_filters_are_the_callers_own():
    features.mel_filters(10, 256, 8000).zero_()
    assert features.mel_filters(10, 256, 8000).sum() > 0

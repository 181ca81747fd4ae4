"""quantize.py against closed formulas in double precision, torchaudio's own expression, and published SNR figures."""

import math

import pytest
import torch
from audiomodels import quantize

INT16 = torch.arange(-32768, 32768).float() / 32768
MULAW_CLASSES = (2, 3, 4, 16, 100, 255, 256, 257, 1000, 4096, 32768, 32769, 65536)


def closed_mulaw(x: float, n_class: int) -> int:
    mu = n_class - 1
    y = math.copysign(math.log1p(mu * abs(x)) / math.log1p(mu), x)
    return math.floor((y + 1) / 2 * mu + 0.5)


def torchaudio_mulaw(x, quantization_channels):
    """torchaudio.functional.mu_law_encoding, line by line."""
    mu = torch.tensor(quantization_channels - 1.0, dtype=x.dtype)
    x_mu = torch.sign(x) * torch.log1p(mu * torch.abs(x)) / torch.log1p(mu)
    return ((x_mu + 1) / 2 * mu + 0.5).to(torch.int64)


@pytest.mark.parametrize("n_class", [256, 1024])
def test_mulaw_is_the_closed_formula(n_class):
    some = INT16[::17]
    assert quantize.mulaw_encode(some, n_class).tolist() == [closed_mulaw(x, n_class) for x in some.tolist()]


@pytest.mark.parametrize("n_class", [256, 1024, 65536])
def test_mulaw_is_torchaudios_expression_bit_for_bit(n_class):
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    audio = torch.cat([INT16, noise])
    assert torch.equal(quantize.mulaw_encode(audio, n_class).long(), torchaudio_mulaw(audio, n_class))


def test_mulaw_decode_is_the_closed_formula():
    for code, value in enumerate(quantize.mulaw_decode(torch.arange(256)).tolist()):
        y = code / 255 * 2 - 1
        assert value == pytest.approx(math.copysign((256 ** abs(y) - 1) / 255, y), rel=1e-6, abs=1e-9)


def test_linear_8_bit_is_the_closed_formula():
    expected = [math.floor((x + 1) / 2 * 255 + 0.5) for x in INT16.tolist()]
    assert quantize.linear_encode(INT16).tolist() == expected
    assert quantize.linear_decode(torch.arange(256)).tolist() == pytest.approx([c / 127.5 - 1 for c in range(256)])


@pytest.mark.parametrize("n_class", MULAW_CLASSES)
def test_every_mulaw_code_round_trips(n_class):
    codes = torch.arange(n_class).to(quantize.code_dtype(n_class))
    audio = quantize.mulaw_decode(codes, n_class)
    again = quantize.mulaw_encode(audio, n_class)
    assert audio.dtype == torch.float32 and float(audio.abs().max()) == 1.0
    assert again.dtype == codes.dtype and torch.equal(again, codes)


def test_every_linear_code_round_trips():
    for n_class in (256, 65536):
        codes = torch.arange(n_class).to(quantize.code_dtype(n_class))
        assert torch.equal(quantize.linear_encode(quantize.linear_decode(codes, n_class), n_class), codes)


def test_16_bit_linear_keeps_every_pcm_sample():
    codes = quantize.linear_encode(INT16, 65536)
    assert codes.dtype == torch.int32 and torch.equal(codes, torch.arange(65536, dtype=torch.int32))
    assert torch.equal(quantize.linear_decode(codes, 65536), INT16)


@pytest.mark.parametrize(
    "companding, n_class", [("mulaw", n) for n in MULAW_CLASSES] + [("linear", 256), ("linear", 65536)]
)
def test_silence_is_the_middle_code(companding, n_class):
    codes = quantize.encode(torch.tensor([0.0, -0.0]), companding, n_class)
    assert codes.tolist() == [n_class // 2] * 2
    assert quantize.decode(codes, companding, n_class).abs().max() <= 1 / (n_class - 1)


@pytest.mark.parametrize("sample_rate", [8000, 16000])
@pytest.mark.parametrize(
    "companding, figures", [("mulaw", (38.4, 37.6, 33.7)), ("linear", (50.0, 30.3, 9.3))], ids=["mulaw", "linear"]
)
def test_snr_of_a_sine(companding, figures, sample_rate):
    # 440 Hz meets few distinct values at these rates, so the figure is taken over 50 phases.
    time = torch.arange(sample_rate, dtype=torch.float64) / sample_rate
    phase = torch.arange(50, dtype=torch.float64)[:, None] * 2.4
    for amplitude, figure in zip((1.0, 0.1, 0.01), figures, strict=True):
        sine = amplitude * torch.sin(2 * math.pi * 440 * time + phase)
        error = quantize.decode(quantize.encode(sine, companding), companding).double() - sine
        assert 10 * math.log10(sine.square().mean() / error.square().mean()) == pytest.approx(figure, abs=0.06)


@pytest.mark.parametrize("companding, n_class", [("mulaw", 256), ("mulaw", 1000), ("linear", 256), ("linear", 65536)])
def test_out_of_range_is_clipped(companding, n_class):
    audio = torch.tensor([1.0, 1.5, 1e30, math.inf, -1.0, -1.5, -1e30, -math.inf])
    assert quantize.encode(audio, companding, n_class).tolist() == [n_class - 1] * 4 + [0] * 4


def test_ten_seconds_at_16_khz_are_160000_symbols():
    codes = quantize.encode(torch.zeros(2, 5, 16000 * 10))
    assert codes.shape == (2, 5, 160_000) and codes.dtype == torch.uint8


def test_types():
    assert [quantize.code_dtype(n) for n in (2, 256, 257, 32768, 32769, 65536)] == (
        [torch.uint8] * 2 + [torch.int16] * 2 + [torch.int32] * 2
    )
    audio = torch.linspace(-1, 1, 101)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(quantize.encode(audio.to(dtype)), quantize.encode(audio.to(dtype).float()))
    for dtype in (torch.uint8, torch.int16, torch.int64):
        assert torch.equal(quantize.decode(torch.arange(128).to(dtype)), quantize.decode(torch.arange(128)))
    assert quantize.encode(torch.empty(0, 3)).shape == quantize.decode(torch.empty(0, 3, dtype=torch.uint8)).shape


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: quantize.encode(torch.tensor([0.0, math.nan])), ValueError, "audio must not hold NaN; got 1 of 2"),
        (lambda: quantize.encode(torch.tensor([math.nan]), "linear"), ValueError, "NaN"),
        (lambda: quantize.encode(torch.zeros(3, dtype=torch.int16)), TypeError, "audio must be a floating-point"),
        (lambda: quantize.encode([0.0]), TypeError, "audio must be .* got list"),
        (lambda: quantize.encode(torch.zeros(1), "alaw"), ValueError, "companding must be one of mulaw, linear"),
        (lambda: quantize.decode(torch.zeros(1).long(), "alaw"), ValueError, "companding .* got 'alaw'"),
        (lambda: quantize.encode(torch.zeros(1), "linear", 1024), ValueError, "n_class must be 256 or 65536"),
        (lambda: quantize.encode(torch.zeros(1), "mulaw", 1), ValueError, "n_class must be in 2 .. 65536; got 1"),
        (lambda: quantize.encode(torch.zeros(1), "mulaw", 65537), ValueError, "n_class"),
        (lambda: quantize.encode(torch.zeros(1), "mulaw", 256.0), TypeError, "n_class must be an int"),
        (lambda: quantize.decode(torch.zeros(1)), TypeError, "codes must be an integer tensor"),
        (lambda: quantize.decode(torch.tensor([0, 256])), ValueError, r"codes must be in 0 .. 255; got 0 .. 256"),
        (lambda: quantize.decode(torch.tensor([-1])), ValueError, "codes must be in 0 .. 255; got -1"),
        (lambda: quantize.decode(torch.tensor([100]), "mulaw", 100), ValueError, "codes must be in 0 .. 99"),
    ],
)
def test_wrong_calls(call, error, words):
    with pytest.raises(error, match=words):
        call()

"""The learned first layer as a filter bank: the line of a Fourier basis, the rules of the kinds, the controls."""

import math

import pytest
import torch
from audiomodels import filters
from audiomodels.audio_transformer import LARGE, AudioTransformer

pytestmark = pytest.mark.usefixtures("one_thread")
RATE, PATCH = 16000, 400
TIME = torch.arange(PATCH) / RATE


def sine(hz, phase=0.3):
    return torch.sin(2 * math.pi * hz * TIME + phase)


def test_a_fourier_layer_gives_a_straight_line():
    torch.manual_seed(0)
    model = AudioTransformer(LARGE)
    with torch.no_grad():
        rows = filters.fourier_basis(2048, PATCH)[torch.randperm(2048)]  # the order in the layer is not the sorted one
        model.filters.weight.copy_(rows * torch.rand(2048, 1))
    bank = filters.filter_bank(model.filters.weight, RATE)
    assert bank.straightness > 0.99
    assert torch.allclose(bank.centre, torch.linspace(0, RATE / 2, 2048), atol=30)  # a bin is 3.9 Hz, a lobe 40 Hz
    assert float(bank.bandwidth.median()) == pytest.approx(RATE / PATCH, rel=0.02)
    assert filters.kinds(bank).count("sinusoid") > 2000
    # the mel scale, for one, does not
    mel = torch.stack([sine(700 * (10 ** (m / 2595) - 1)) for m in torch.linspace(0, 2840, 500)[1:-1].tolist()])
    curved = filters.filter_bank(mel, RATE)
    assert curved.straightness < 0.95


def test_centre_and_bandwidth():
    rows = torch.stack([sine(3000), torch.eye(PATCH)[7], sine(500), torch.ones(PATCH)])
    bank = filters.filter_bank(rows, RATE)
    order = bank.centre.argsort()
    assert torch.equal(order, torch.arange(4)) and bank.spectrum.shape == (4, 2049)
    assert float(bank.bandwidth.max()) == pytest.approx(8000, abs=5)  # the click
    assert bank.centre[-1] == pytest.approx(3000, abs=4) and bank.bandwidth[-1] == pytest.approx(40, rel=0.02)
    assert torch.equal(bank.weight[-1], rows[0]) and torch.equal(bank.weight[2], rows[2])
    torch.testing.assert_close(bank.spectrum.amax(1), torch.ones(4))
    naive = abs(sum(sine(3000)[n] * torch.exp(torch.tensor(-2j * math.pi * 700 * n / 4096)) for n in range(PATCH)))
    peak = torch.fft.rfft(sine(3000), 4096).abs().max()
    assert float(bank.spectrum[-1, 700]) == pytest.approx(float(naive / peak), rel=1e-3)


def test_kinds():
    hann, onset = torch.hann_window(PATCH), torch.exp(-800 * (TIME - 0.01).clamp(min=0)) * (TIME >= 0.01)
    generator = torch.Generator().manual_seed(0)
    rows = {
        "sinusoid": [sine(f) for f in (200, 1000, 5555)],
        "windowed": [hann, torch.hamming_window(PATCH), hann * sine(700), hann * sine(4000)],
        "onset-like": [onset * sine(900), onset, torch.eye(PATCH)[200], onset.flip(0) * sine(300)],
        "other": [torch.randn(PATCH, generator=generator), sine(500) + sine(3000), torch.zeros(PATCH)],
    }
    for kind, members in rows.items():
        bank = filters.filter_bank(torch.stack(members), RATE)
        assert filters.kinds(bank) == [kind] * len(members)


def test_controls():
    audio = [torch.randn(4100, generator=torch.Generator().manual_seed(1)) + 5 * torch.sin(torch.arange(4100) * 0.8),
             torch.zeros(399), torch.ones(800)]  # fmt: skip
    patches = filters.patches_of(audio, 400)
    assert patches.shape == (12, 400) and torch.equal(patches[1], audio[0][400:800]) and float(patches[11, 0]) == 1
    assert torch.equal(filters.patches_of(audio, 400, most=2), patches[[0, 11]])
    with pytest.raises(ValueError, match="at least one patch of 400"):
        filters.patches_of([torch.zeros(399)], 400)
    components = filters.principal_components(filters.patches_of(audio[:1], 20))
    torch.testing.assert_close(components @ components.T, torch.eye(20), atol=1e-4, rtol=0)
    strongest = filters.filter_bank(components[:2], 2 * math.pi)
    assert strongest.centre.tolist() == pytest.approx([0.8, 0.8], abs=0.08)  # both phases of the sine
    spectrum = filters.mean_spectrum(patches[:10])
    assert int(spectrum.argmax()) == pytest.approx(0.8 / (2 * math.pi) * 4096, abs=8) and float(spectrum.max()) == 1


def test_curve_distance_is_the_earth_movers():
    from scipy.stats import wasserstein_distance

    generator = torch.Generator().manual_seed(0)
    a, b = (filters.filter_bank(torch.randn(n, PATCH, generator=generator), RATE) for n in (300, 500))
    assert filters.curve_distance(a, b) == pytest.approx(wasserstein_distance(a.centre, b.centre), rel=0.1)
    assert filters.curve_distance(a, a) == 0 and filters.curve_distance(a, b) == filters.curve_distance(b, a)
    shifted = filters.filter_bank(torch.stack([sine(1100), sine(2100)]), RATE)
    assert filters.curve_distance(shifted, filters.filter_bank(torch.stack([sine(1000), sine(2000)]), RATE)) == (
        pytest.approx(100, abs=8)
    )


def test_the_picture_says_what_is_there(tmp_path):
    rows = torch.cat([filters.fourier_basis(30, PATCH), torch.hann_window(PATCH)[None]])
    bank = filters.filter_bank(rows, RATE)
    noise = filters.filter_bank(torch.randn(50, PATCH), RATE)
    figure = filters.draw(bank, {"before training": noise}, torch.ones(2049), "a layer")
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    counts = {kind: filters.kinds(bank).count(kind) for kind in filters.KINDS}
    assert "windowed: 1 of 31 filters" in titles and f"sinusoid: {counts['sinusoid']} of 31 filters" in titles
    assert not [title for title in titles if title.startswith("onset-like")]
    lines = {line.get_label(): line for line in figure.axes[2].lines}
    assert any(label.startswith("a layer") for label in lines) and "Fourier line" in lines
    assert any(label.startswith("before training") for label in lines)
    figure.savefig(tmp_path / "x.png")


def test_wrong_weights():
    for bad in (torch.zeros(3), torch.zeros(0, 5), torch.zeros(3, 5000), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match="weight must be"):
            filters.filter_bank(bad, RATE)
    assert math.isnan(filters.r_squared(torch.ones(5))) and math.isnan(filters.r_squared(torch.arange(2.0)))

"""SimCLR and the probe: the loss in closed form, each alteration of a view, what a linear classifier reads off."""

import math

import numpy as np
import pytest
import torch
from audiomodels import simclr
from audiomodels.cnn import CNN, CNNConfig
from audiomodels.data import Crops
from audiomodels.encoders import Encoder, VGGEncoder
from audiomodels.probe import GRID, ProbeScore, Split, features_of, linear_probe
from audiomodels.simclr import SimCLR, SimCLRConfig, Views, contrast, nt_xent
from audiomodels.train import Objective, TrainConfig, fit
from sklearn.linear_model import LogisticRegression
from sounds import RATE, recordings

CONFIG = SimCLRConfig(n_mel=40, n_projection=16, sample_rate=RATE)


def settings(out, **changes):
    usual = {"steps": 40, "batch": 16, "length": 6400, "lr": 3e-3, "warmup": 5, "save_every": 0}
    return TrainConfig(**{"out": str(out), **usual, "tensorboard": False, "progress": False, **changes})


def made_of(kind, rng, seconds=0.8):
    """A tone of one of four timbres; pitch, level, filter and noise are chance."""
    t, hz = np.arange(round(seconds * RATE)) / RATE, 110 * 2 ** rng.uniform(0, 1.5)
    rate, weights = 3 + 20 * (kind // 2), {0: 0.9, 1: 0.5}[kind % 2]  # slow or fast tremolo, bright or dark
    sound = sum(weights**k * np.sin(2 * np.pi * hz * k * t + rng.uniform(0, 6)) for k in range(1, 12))
    sound *= 1 + 0.9 * np.sin(2 * np.pi * rate * t + rng.uniform(0, 6))
    bins = np.arange(len(t) // 2 + 1)
    filtered = np.exp(np.interp(bins, np.linspace(0, len(bins), 5), rng.normal(0, 0.8, 5)))
    spectrum = np.fft.rfft(sound) * filtered
    sound = np.fft.irfft(spectrum)
    sound = sound / np.abs(sound).max() * rng.uniform(0.1, 0.8) + rng.normal(0, 10 ** rng.uniform(-3.5, -1.5), len(t))
    return torch.from_numpy(sound).float().clamp(-1, 1)


# ---- the loss


def test_nt_xent_in_closed_form():
    """Two sounds at right angles, their views equal: log(1 + 2 exp(-1/t)) for each of the four."""
    for t in (0.1, 0.5, 1.0):
        a = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
        assert nt_xent(a, 3 * a, t).item() == pytest.approx(math.log(1 + 2 * math.exp(-1 / t)), rel=1e-5, abs=1e-6)
        assert nt_xent(a, a.flip(0), t).item() == pytest.approx(math.log(math.exp(1 / t) + 2), rel=1e-5)


def test_nt_xent_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    z = [v / v.norm() for v in [*a, *b]]
    terms = []
    for i in range(10):
        others = sum(math.exp(z[i] @ z[k] / 0.3) for k in range(10) if k != i)
        terms.append(-math.log(math.exp(z[i] @ z[(i + 5) % 10] / 0.3) / others))
    assert nt_xent(a, b, 0.3).item() == pytest.approx(np.mean(terms), rel=1e-5)
    with pytest.raises(ValueError, match="batch >= 2"):
        nt_xent(a[:1], b[:1])


# ---- views


@pytest.fixture
def picture():
    """Two spectrograms (2, 12, 20) whose cell (band, frame) tells its place."""
    place = torch.arange(12.0)[:, None] * 100 + torch.arange(20.0)
    return torch.stack([place, -place])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_crop(picture):
    places = set()
    for seed in range(40):
        part = simclr.crop(picture, 15, seeded(seed))
        first = part[:, 0, 0].abs().long()
        assert all(torch.equal(row, full[:, i : i + 15]) for row, full, i in zip(part, picture, first, strict=True))
        places.update(first.tolist())
    assert places == set(range(6))
    with pytest.raises(ValueError, match="frames must be 1 .. 20"):
        simclr.crop(picture, 21, seeded())


def test_shift_pitch(picture):
    shifts = set()
    for seed in range(40):
        for row, full in zip(simclr.shift_pitch(picture, seeded(seed), most=2), picture, strict=True):
            by = next(k for k in range(-2, 3) if torch.equal(row[5], full[5 - k]))
            assert torch.equal(row[3:9], full[3 - by : 9 - by]) and torch.equal(row[0], full[max(0, -by)])
            shifts.add(by)
    assert shifts == {-2, -1, 0, 1, 2}


def test_equalise_changes_bands_alike_over_time(picture):
    change = simclr.equalise(picture, seeded()) - picture
    assert torch.allclose(change, change[:, :, :1].expand_as(change), atol=1e-3)
    assert 0.3 < change.abs().max() <= 1.5 + 1e-3 and not torch.allclose(change[0], change[1])
    assert change[:, :, 0].diff(dim=1).diff(dim=1).abs().mean() < 0.3  # smooth


def test_add_noise_fills_what_is_quiet():
    x = torch.full((1, 40, 200), -20.0)
    x[0, 3] = 0.0
    noisy = simclr.add_noise(x, seeded(), quietest=6.0, loudest=6.0)
    power = noisy[0, 10:].exp()
    assert power.mean().item() == pytest.approx(math.exp(-6), rel=0.05)
    assert power.std().item() == pytest.approx(math.exp(-6), rel=0.1)  # a power of noise is exponential
    assert (noisy[0, 3] - x[0, 3]).abs().mean() < 0.01


def test_blur_keeps_sums_and_spreads():
    x = torch.zeros(2, 15, 15)
    x[:, 7, 7] = 1
    blurred = simclr.blur(x, seeded())
    assert torch.allclose(blurred.sum((1, 2)), torch.ones(2), atol=1e-5) and (blurred[:, 7, 7] < 1).all()
    assert torch.allclose(blurred, blurred.flip(1), atol=1e-6) and torch.allclose(
        blurred, blurred.transpose(1, 2), atol=1e-6
    )
    assert torch.allclose(simclr.blur(torch.ones(2, 8, 8), seeded()), torch.ones(2, 8, 8), atol=1e-5)


def test_flip(picture):
    seen = set()
    for seed in range(20):
        for row, full in zip(simclr.flip(picture, seeded(seed)), picture, strict=True):
            assert torch.equal(row, full) or torch.equal(row, full.flip(1))
            seen.add(torch.equal(row, full))
    assert seen == {True, False}


def test_mask_patches(picture):
    masked = simclr.mask_patches(picture, seeded(1), count=1, share=0.5)
    hidden = masked != picture
    for row, cells in zip(masked, hidden, strict=True):
        bands, frames = cells.any(1), cells.any(0)
        assert torch.equal(cells, bands[:, None] & frames) and 1 <= bands.sum() <= 7 and 1 <= frames.sum() <= 11
        assert (row[cells] == row[cells][0]).all()


def test_views_depend_on_seed_and_step():
    model, sounds = (
        SimCLR(CONFIG),
        Crops(recordings([made_of(0, np.random.default_rng(0))]), batch=2, length=4000, context=0),
    )
    views = Views(sounds.audio, model.cnn.log_mel, frames=24, seed=1)
    assert views.data == sounds.data
    a, b = views(3)
    assert a.shape == b.shape == (2, 40, 24) and not torch.equal(a, b)
    assert torch.equal(views(3)[0], a) and torch.equal(views(3)[1], b)
    assert not torch.equal(views(4)[0], a)
    assert not torch.equal(Views(sounds.audio, model.cnn.log_mel, frames=24, seed=2)(3)[0], a)


# ---- training and probing


@pytest.fixture(scope="module")
def data():
    """(train, dev, test) of labelled sounds."""
    rng, splits = np.random.default_rng(0), []
    for count in (48, 48, 160):
        labels = torch.arange(count) % 4
        splits.append(([made_of(int(kind), rng) for kind in labels], labels))
    return splits


def probed(encoder, data, shots=(5,)):
    return linear_probe(*(Split(features_of(encoder, sounds), labels) for sounds, labels in data), shots=shots)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    torch.manual_seed(0)
    model = SimCLR(CONFIG)
    rng = np.random.default_rng(1)
    unlabelled = recordings([made_of(i % 4, rng) for i in range(64)])
    crops = Views(Crops(unlabelled, batch=16, length=6400, context=0).audio, model.cnn.log_mel, frames=56)
    history = fit(model, crops, settings(tmp_path_factory.mktemp("simclr"), steps=150), task=Objective(contrast))
    assert np.mean(history.bits[-10:]) < 0.7 * np.mean(history.bits[:10])
    return model.eval()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_contrast_beats_a_random_encoder(trained, data):
    torch.manual_seed(1)
    random = SimCLR(CONFIG).eval()
    ours, theirs = (probed(model, data)[0] for model in (trained, random))
    print(ours, theirs)
    assert ours.test > theirs.test + 0.05 and ours.test > 0.5


def test_it_trains_and_embeds_what_the_projection_reads(tmp_path):
    torch.manual_seed(0)
    trained, sounds = SimCLR(CONFIG), recordings([made_of(i % 4, np.random.default_rng(i)) for i in range(4)])
    crops = Views(Crops(sounds, batch=4, length=4000, context=0).audio, trained.cnn.log_mel, frames=24)
    before = trained.cnn.net[0].weight.clone()
    config = settings(tmp_path / "run", steps=12, batch=4, lr=1e-3)
    history = fit(trained, crops, config, task=Objective(contrast))
    assert np.mean(history.bits[-4:]) < np.mean(history.bits[:4]) and not torch.equal(trained.cnn.net[0].weight, before)
    trained.eval()
    sound = made_of(0, np.random.default_rng(5))[None]
    rows = trained.embed(sound)
    assert isinstance(trained, Encoder) and rows.shape == (1, 10, trained.dim)
    h = trained.cnn.net(trained.cnn.standardise(trained.cnn.log_mel(sound))[:, None])
    assert torch.allclose(rows.mean(1), h, atol=1e-5)
    trained.save_pretrained(tmp_path)
    assert torch.equal(SimCLR.from_pretrained(tmp_path).embed(sound), rows)


def test_supervised_vgg_encodes_too():
    cnn = CNN(CNNConfig(n_class=4, n_mel=40, sample_rate=RATE, output="softmax"))
    encoder, sound = VGGEncoder(cnn), made_of(0, np.random.default_rng(5))[None]
    rows = encoder.embed(sound)
    assert isinstance(encoder, Encoder) and rows.shape == (1, 10, encoder.dim) and not cnn.training
    assert torch.allclose(cnn.net[-1](rows.mean(1)), cnn(sound), atol=1e-5)
    with pytest.raises(ValueError, match="must be of kind vgg"):
        VGGEncoder(CNN(CNNConfig(n_class=4, kind="crnn", sample_rate=RATE)))


# ---- the probe itself


def clusters(count, rng, noise, n_class=3, dim=6):
    centres = np.eye(n_class, dim) * 2
    labels = torch.arange(count) % n_class
    return Split(torch.from_numpy(centres[labels] + rng.normal(0, noise, (count, dim))).float(), labels)


def test_probe_on_what_is_known():
    rng = np.random.default_rng(0)
    easy_split = clusters(60, rng, 1.0)
    easy = linear_probe(*(clusters(n, rng, 0.1) for n in (60, 60, 60)))
    assert [score.shots for score in easy] == [1, 5, 10, None]
    assert easy[0].test > 0.8 and [score.test for score in easy[2:]] == [1, 1]
    hard = linear_probe(*(clusters(n, rng, 1.5) for n in (300, 150, 300)), draws=5)
    assert hard[0].test < hard[2].test < hard[3].test < 0.95 and hard[0].spread > 0 == hard[3].spread
    assert len(hard[0].strengths) == 5 and len(hard[3].strengths) == 1
    assert linear_probe(*[easy_split] * 3, shots=[1]) == linear_probe(*[easy_split] * 3, shots=[1])
    chance = clusters(300, rng, 1.0)
    none = linear_probe(*(Split(torch.randn(len(chance.labels), 4), chance.labels) for _ in range(3)), shots=[None])
    assert abs(none[0].test - 1 / 3) < 0.12


def test_dev_chooses_the_regularisation():
    """As a loop over scikit-learn's own; test has no say."""
    rng = np.random.default_rng(1)
    train, dev, test = (clusters(n, rng, 1.3, dim=20) for n in (45, 200, 200))
    score = linear_probe(train, dev, test, shots=[None])[0]
    mean, std = train.features.mean(0), train.features.std(0, correction=0)
    x, x_dev, x_test = (((split.features - mean) / std).double() for split in (train, dev, test))
    fits = {c: LogisticRegression(C=c, max_iter=500).fit(x, train.labels) for c in GRID}
    found = {c: fit.score(x_dev, dev.labels) for c, fit in fits.items()}
    best = min(c for c in GRID if found[c] == max(found.values()))
    assert len(set(found.values())) > 2 and best not in (GRID[0], GRID[-1])
    assert score.strengths == (best,) and score.dev == found[best]
    assert score.test == fits[best].score(x_test, test.labels)
    other = linear_probe(train, dev, Split(test.features, test.labels.roll(1)), shots=[None])[0]
    assert other.strengths == (best,) and other.test != score.test


def test_probe_of_several_labels():
    rng = np.random.default_rng(0)
    splits = []
    for count in (80, 40, 80):
        x = torch.from_numpy(rng.normal(size=(count, 5))).float()
        splits.append(Split(x, x[:, :3] > 0.3))
    score = linear_probe(*splits, shots=[5, None])
    assert isinstance(score[0], ProbeScore) and 0.5 < score[0].test < score[1].test and score[1].test > 0.95


def test_features_pool_over_time():
    class Ramp:
        sample_rate, hop, dim = RATE, 1, 2

        def embed(self, audio):
            return torch.stack([audio, 2 * audio], 2)

    found = features_of(Ramp(), [torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0, 3.0])])
    assert torch.allclose(found, torch.tensor([[2, 4, 1, 2], [1, 2, 2**0.5, 8**0.5]]))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: Split(s.features[:, :2], s.labels), r"dev.features must be finite \(n, 6\)"),
        (lambda s: Split(s.features * torch.nan, s.labels), "dev.features must be finite"),
        (lambda s: Split(s.features, s.labels[:-1]), r"dev.labels must be \(n,\)"),
        (lambda s: Split(s.features, s.labels[:, None]), r"dev.labels must be \(n,\)"),
    ],
)
def test_wrong_splits(change, words):
    split = clusters(12, np.random.default_rng(0), 1.0)
    with pytest.raises(ValueError, match=words):
        linear_probe(split, change(split), split)
    with pytest.raises(ValueError, match="shots must be at least 1"):
        linear_probe(split, split, split, shots=[0])

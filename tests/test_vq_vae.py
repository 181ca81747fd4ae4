"""VQ-VAE: rates of its levels, what they keep, codes in use, and new codes from the top down."""

import dataclasses

import numpy as np
import pytest
import torch
from audiomodels import codebook as cb
from audiomodels.code_lm import CodeLM, CodeLMConfig
from audiomodels.data import Crops
from audiomodels.encoders import Coder, Decoder, Encoder
from audiomodels.train import Objective, TrainConfig, fit
from audiomodels.vq_vae import VQVAE, Level, VQVAEConfig, sample, snr, spectral_distance, train_prior, vq_loss
from sounds import RATE, note, notes

CONFIG = VQVAEConfig(n_code=32, width=12, depth=1, n_embd=16, sample_rate=RATE)
LM = CodeLMConfig(n_layer=1, n_head=2, n_embd=16, window=16)


def settings(out, **changes):
    usual = {"steps": 90, "batch": 4, "length": 1024, "lr": 5e-3, "warmup": 10, "save_every": 0}
    return TrainConfig(**{"out": str(out), **usual, "tensorboard": False, "progress": False, **changes})


@pytest.fixture(scope="module")
def data():
    return notes(range(48, 72, 2))


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    torch.manual_seed(0)
    model = VQVAE(CONFIG)
    crops = Crops(data, batch=4, length=1024, context=0)
    history = fit(model, crops.audio, settings(tmp_path_factory.mktemp("vq_vae")), task=Objective(vq_loss))
    assert np.mean(history.bits[-10:]) < 0.75 * np.mean(history.bits[:10])
    return model.eval()


@pytest.fixture(scope="module")
def sounds():
    """Notes between those of the training."""
    return torch.stack([note(midi, gain=0.3)[:3840] for midi in range(49, 71, 2)])


def test_rates(model):
    audio = torch.rand(2, 1280) - 0.5
    assert [codes.shape for codes in model.encode(audio)] == [(2, 160), (2, 40), (2, 10)]
    assert [codes.shape for codes in model.encode(audio[:, :1153])] == [(2, 160), (2, 40), (2, 10)]
    for level, codes in zip(model.levels, model.encode(audio), strict=True):
        assert all(isinstance(level, kind) for kind in (Encoder, Coder, Decoder))
        assert level.embed(audio).shape == (*codes.shape, 16) and level.decode(codes).shape == audio.shape
    assert VQVAEConfig().hops == (8, 32, 128) and VQVAEConfig().n_code == 2048


def test_finer_levels_keep_more(model, sounds):
    found = [level.decode(level.encode(sounds)) for level in model.levels]
    ratios = [snr(x, sounds) for x in found]
    distances = [float(spectral_distance(x, sounds)) for x in found]
    assert ratios[0] > ratios[1] > ratios[2] and ratios[0] > 5, ratios
    assert distances[0] < distances[1] < distances[2], distances


def test_codes_are_in_use(model, sounds):
    """At the default decay; at 0.99 codes that nobody chooses start anew too late for so short a training."""
    shares = [cb.usage(codes, CONFIG.n_code) for codes in model.encode(sounds)]
    assert min(shares) > 0.5, shares


def test_dead_codes_start_anew():
    """Codes far from all sound come back into use; with restart 0 they stay dead."""
    for restart, alive in ((0.1, True), (0.0, False)):
        torch.manual_seed(0)
        level = Level(dataclasses.replace(CONFIG, restart=restart), 8).train()
        with torch.no_grad():
            level(torch.rand(4, 256) - 0.5)  # k-means over the first batch
        level.quantiser._codebook.embed[:, 1:] += 1000
        level.quantiser._codebook.embed_avg[:, 1:] += 1000
        with torch.no_grad():
            for _ in range(40):
                level(torch.rand(4, 256) - 0.5)
        assert (cb.usage(level.encode(torch.rand(4, 256) - 0.5), 32) > 0.5) == alive


def test_the_loss_by_hand(model):
    audio = torch.stack([note(60)[:1024], note(64)[:1024]])
    torch.manual_seed(0)
    power = audio.square().mean()
    expected = sum(
        (x - audio).square().mean() / power + spectral_distance(x, audio) + 0.02 * c for x, c in model(audio)
    )
    assert vq_loss(model, audio, audio).item() == pytest.approx(expected.item())
    assert spectral_distance(audio, audio) == 0
    assert spectral_distance(0 * audio, audio).item() == pytest.approx(1)
    assert spectral_distance(audio.roll(3, 1), audio) < 0.2 < 1 < (audio.roll(3, 1) - audio).norm() / audio.norm() + 0.9
    assert snr(0.9 * audio, audio) == pytest.approx(20, abs=1e-3)


def test_gradients_reach_every_parameter():
    model = VQVAE(CONFIG)
    vq_loss(model, torch.rand(2, 1024) - 0.5, torch.rand(2, 1024) - 0.5).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_save_load_and_train_on(model, sounds, tmp_path):
    model.save_pretrained(tmp_path / "model")
    again = VQVAE.from_pretrained(tmp_path / "model")
    assert again.config == model.config and again.config.hops == (8, 32, 128)
    assert all(torch.equal(a, b) for a, b in zip(again.encode(sounds), model.encode(sounds), strict=True))
    crops = Crops(notes([60]), batch=2, length=256, context=0)
    history = fit(again, crops.audio, settings(tmp_path / "run", steps=2, batch=2), task=Objective(vq_loss))
    assert np.isfinite(history.bits).all()


def test_resume_is_exact(tmp_path):
    """Codebooks, their moving means and the draws of restarts are part of a checkpoint."""
    crops, states = Crops(notes([60]), batch=2, length=256, context=0), []
    for steps in ((6,), (3, 6)):
        torch.manual_seed(0)
        model = VQVAE(dataclasses.replace(CONFIG, hops=(32,), restart=0.99))
        for count in steps:
            config = settings(tmp_path / str(len(steps)), steps=count, batch=2, schedule="constant")
            fit(model, crops.audio, config, task=Objective(vq_loss))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_new_codes_from_the_top_down(model, data, tmp_path):
    priors = []
    for level, length in enumerate((64, 32, 16)):
        torch.manual_seed(0)
        config = settings(tmp_path / str(level), steps=4, batch=4, length=length, context=16)
        priors.append(train_prior(model, level, data, LM, config))
    assert [p.config.condition_hop for p in priors] == [4, 4, 1] and [p.config.hop for p in priors] == [8, 32, 128]
    codes, audio = sample(model, priors, 5, seed=1, batch=2)
    assert [c.shape for c in codes] == [(2, 80), (2, 20), (2, 5)] and [a.shape for a in audio] == [(2, 640)] * 3
    again = sample(model, priors, 5, seed=1, batch=2)
    assert all(torch.equal(a, b) for a, b in zip(codes, again.codes, strict=True))
    middle = priors[1].generate(20, condition=codes[2], seed=1, batch=2)
    assert torch.equal(middle, codes[1]) and torch.equal(audio[1], model.levels[1].decode(middle))
    with pytest.raises(ValueError, match="priors must be 3"):
        sample(model, priors[1:], 5)
    with pytest.raises(ValueError, match=r"priors\[0\] must be made for the codebook of level 0"):
        sample(model, [CodeLM(dataclasses.replace(priors[0].config, codebook="")), *priors[1:]], 5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m(torch.zeros(1, 100)), "a multiple of 128 samples"),
        (lambda m: m.encode(torch.zeros(1, 0)), "at least 1 sample"),
        (lambda m: m.encode(torch.full((1, 9), torch.nan)), "audio must be finite"),
        (lambda m: m.levels[0].decode(torch.tensor([[64]])), "codes must be 0 .. 31, got 64 .. 64"),
        (lambda m: spectral_distance(torch.zeros(1, 99), torch.zeros(1, 99)), "at least 128 samples"),
        (lambda m: VQVAEConfig(hops=(8, 24)), "hops must be rising powers of two"),
        (lambda m: VQVAEConfig(hops=(32, 8)), "hops must be rising powers of two"),
        (lambda m: VQVAEConfig(commit=-1.0), "commit must be at least 0"),
        (lambda m: VQVAEConfig(n_code=1), "n_code must be 2 .. 32768, got 1"),
    ],
)
def test_wrong_input(model, call, words):
    with pytest.raises(ValueError, match=words):
        call(model)

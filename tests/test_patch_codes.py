"""Patch codes: what k-means finds, what codes tell apart, what comes back as sound, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from audiomodels import codebook as cb
from audiomodels.patch_codes import PatchCodes, PatchCodesConfig, griffin_lim, learn
from audiomodels.pretrained import ModelError
from audiomodels.train import TrainConfig
from sklearn.cluster import KMeans
from sounds import RATE, cents_off, note, notes, pair, recordings

SCALE = range(48, 84)
CONFIG = PatchCodesConfig(n_code=512, n_fft=1024, hop=256, patch_frames=1, hidden=256, n_embd=64, sample_rate=RATE)
TINY = PatchCodesConfig(n_code=4, n_fft=64, hop=16, patch_frames=2, n_band=2, hidden=32, n_embd=8, sample_rate=RATE)


def settings(out, **changes):
    usual = {"steps": 800, "batch": 16, "length": 1024, "lr": 4e-3, "warmup": 10, "save_every": 0}
    return TrainConfig(**{"out": str(out), **usual, "tensorboard": False, "progress": False, **changes})


@pytest.fixture(scope="module")
def scale():
    return notes(SCALE)


@pytest.fixture(scope="module")
def model(scale, tmp_path_factory):
    torch.manual_seed(0)
    model = PatchCodes(CONFIG)
    history = learn(model, scale, settings(tmp_path_factory.mktemp("patch_codes")))
    assert np.mean(history.bits[-20:]) < 0.1 * history.bits[0]
    return model.eval()


def with_codes(model, recordings, n_code):
    """The same autoencoder with another number of codes."""
    other = PatchCodes(dataclasses.replace(model.config, n_code=n_code))
    other.encoder, other.decoder = model.encoder, model.decoder
    other.fit_codes(recordings)
    return other.eval()


# ---- codebook


def test_k_means_is_within_2_percent_of_the_full_one():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 16, generator=generator)
    rows = centres[torch.randint(40, (3000,), generator=generator)] + 0.5 * torch.randn(3000, 16, generator=generator)
    for n_code in (16, 100):
        full = KMeans(n_code, n_init=2, random_state=0).fit(rows.numpy()).inertia_
        found = cb.fit_codebook(rows, n_code)
        ours = (rows - found[cb.nearest(rows, found).long()]).square().sum().item()
        assert ours <= 1.02 * full, n_code
    assert torch.equal(found, cb.fit_codebook(rows, 100))
    assert not torch.equal(found, cb.fit_codebook(rows, 100, seed=1))


def test_nearest_by_hand():
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert cb.nearest(torch.tensor([[[0.9, 0.2], [0.1, 0.6]], [[0.5, 0.0], [9.0, 0.0]]]), codebook).tolist() == [
        [1, 2],
        [0, 1],
    ]
    assert cb.nearest(torch.zeros(0, 2), codebook).shape == (0,)
    assert cb.nearest(torch.zeros(1, 2), torch.zeros(257, 2)).dtype == torch.int16


def test_units_and_durations():
    codes = torch.tensor([3, 3, 3, 1, 2, 2, 3], dtype=torch.uint8)
    units, durations = cb.collapse(codes)
    assert units.tolist() == [3, 1, 2, 3] and durations.tolist() == [3, 1, 2, 1]
    assert torch.equal(cb.expand(units, durations), codes)
    assert cb.usage(codes, 8) == 3 / 8
    assert cb.purity(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 6, 6])) == 0.75
    assert cb.name_of(torch.ones(2, 2)) != cb.name_of(torch.zeros(2, 2)) == cb.name_of(torch.zeros(4, 2)[::2])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: cb.fit_codebook(torch.zeros(9, 2), 4), "at least 4 different ones for as many codes, got 1"),
        (lambda: cb.fit_codebook(torch.full((9, 2), torch.nan), 4), "rows must be finite"),
        (lambda: cb.fit_codebook(torch.zeros(9, 2), 1), "n_code must be 2 .. 32768, got 1"),
        (lambda: cb.check_codes(torch.tensor([[0, 4]]), 4), r"codes must be 0 .. 3, got 0 .. 4: .* another codebook"),
        (lambda: cb.check_codes(torch.tensor([0]), 4), "codes must have 2 dimensions"),
    ],
)
def test_wrong_codebooks(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- patches


def test_patches_go_back_to_their_sound():
    """Nothing learned: spectrogram -> patches -> magnitudes -> Griffin-Lim keeps pitch, and level within 1 dB."""
    model = PatchCodes(dataclasses.replace(CONFIG, hop=128, patch_frames=3, n_band=4))
    sound = torch.stack([note(57), note(76)])
    patches = model.patches(sound)
    assert patches.shape == (2, 11, 4, 3 * 512 // 4) and model.hop == 384
    assert 0.4 < patches.max() < 1
    for row, midi in zip(griffin_lim(model.levels(patches), 128), (57, 76), strict=True):
        assert len(row) == 11 * 384 and cents_off(row, midi) < 10
        assert 20 * torch.log10(row[:4000].norm() / note(midi).norm()).abs() < 1


def test_a_patch_lies_where_it_says():
    model = PatchCodes(TINY)
    quiet, loud = torch.zeros(1, 320), torch.zeros(1, 320)
    loud[0, 224:] = torch.rand(96) - 0.5
    changed = (model.patches(quiet) != model.patches(loud)).flatten(2).any(2)[0]
    assert model.patches(quiet).shape == (1, 10, 2, 2 * 16) and model.dim == 16
    assert changed.tolist() == [False] * 6 + [True] * 4  # a window reaches 32 samples = one patch ahead
    low = torch.sin(torch.arange(320) * 2 * torch.pi * 4 / 64)[None]
    assert model.patches(low)[0, :, 0].max() > 10 * model.patches(low)[0, 2:8, 1].max()


# ---- codes


def test_more_codes_tell_two_notes_apart(model, scale):
    """The talk's figure: with 16 codes for 36 notes, some neighbours share codes; with more, a code is one note."""
    found = {}
    for n_code in (16, 512):
        coder = with_codes(model, scale, n_code)
        for low in range(50, 80, 2):
            sound, which = pair(low, low + 1)
            codes = coder.encode(sound[None])[0]
            labels = which[(torch.arange(len(codes)) * model.hop + model.hop // 2).clamp(max=len(which) - 1)]
            found[n_code, low] = cb.purity(codes, labels)
    few, many = ([p for (k, _), p in found.items() if k == n_code] for n_code in (16, 512))
    assert min(few) < 0.6 and min(many) >= 0.95, found


def test_tones_regenerated_from_codes_keep_their_pitch(model):
    off = [cents_off(model.decode(model.encode(note(midi)[None]))[0], midi) for midi in SCALE]
    assert np.mean(np.array(off) < 50) >= 0.95, sorted(off)[-4:]


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".safetensors"]
    again, sound = PatchCodes.from_pretrained(tmp_path), note(64)[None]
    codes = model.encode(sound)
    assert codes.dtype == torch.int16 and codes.shape == (1, 16)
    assert torch.equal(again.encode(sound), codes) and torch.equal(again.decode(codes), model.decode(codes))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_code": 100}))
    with pytest.raises(ModelError, match="codebook must be float of shape"):
        PatchCodes.from_pretrained(tmp_path)


def test_other_sounds_on_resuming(tmp_path, caplog):
    for sound, said in ((note(60), False), (note(60), False), (note(61), True)):
        learn(PatchCodes(TINY), recordings([sound]), settings(tmp_path, steps=5, length=320))
        assert ("resumed with other settings: {'data': " in caplog.text) == said


def test_bands_share_a_stream(tmp_path):
    torch.manual_seed(0)
    model, data = PatchCodes(TINY), recordings([note(60), note(70)])
    learn(model, data, settings(tmp_path / "a", steps=5, length=320))
    codes = model.encode(note(60)[None, :330])
    assert codes.shape == (1, 2 * 11) and model.embed(note(60)[None, :330]).shape == (1, 11, 16)
    patches = model.patches(note(60)[None, :330])
    one = cb.nearest(model.encoder(patches[0, 3, 1]), model.codebook)
    assert codes[0, 3 * 2 + 1] == one
    assert model.decode(codes).shape == (1, 11 * 32)
    again = PatchCodes(TINY)
    torch.manual_seed(0)
    learn(again, data, settings(tmp_path / "a", steps=5, length=320))  # a finished run: the same model
    assert torch.equal(again.codebook, model.codebook)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m.encode(torch.zeros(1, 31)), "at least one patch, 32 samples, got 31"),
        (lambda m: m.encode(torch.zeros(0)), "audio must be float"),
        (lambda m: m.encode(torch.full((1, 64), torch.inf)), "audio must be finite"),
        (lambda m: m.encode(torch.zeros(1, 64)), "no codes yet: see PatchCodes.fit_codes"),
        (lambda m: m.decode(torch.zeros(1, 3, dtype=torch.uint8)), "groups of 2 bands, got 3"),
        (lambda m: m.decode(torch.full((1, 4), 4)), "codes must be 0 .. 3, got 4 .. 4"),
        (lambda m: m.fit_codes(recordings([torch.rand(31)])), "at least one patch"),
        (lambda m: learn(m, recordings([torch.zeros(999)]), settings("x")), "silence alone"),
        (lambda m: learn(m, recordings([note(60)], rate=16000), settings("x")), "must be at 8000 Hz"),
        (lambda m: PatchCodesConfig(n_band=3), "n_fft must be a multiple of 6"),
        (lambda m: PatchCodesConfig(hop=1024), "hop must be at most n_fft / 2 = 512, got 1024"),
        (lambda m: PatchCodesConfig(n_code=1), "n_code must be 2 .. 32768, got 1"),
    ],
)
def test_wrong_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(PatchCodes(TINY))

"""The shipped models that continue piano: they load by name and go on with a clip."""

import pytest
import torch
from audiomodels import textless
from audiomodels.audio import read_mono
from audiomodels.data import clips

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_goes_on_with_a_bundled_clip():
    models = textless.load("piano-units")
    rate = models.coder.sample_rate
    audio, _ = read_mono(clips() / "music" / "prelude_bwv846.flac", sample_rate=rate)
    prompt = audio[: rate // models.coder.hop * models.coder.hop]
    sound = textless.continue_sound(models, prompt, 0.5, seed=1)
    assert len(sound) == len(prompt) + rate // 2 and torch.equal(sound[: len(prompt)], prompt)
    made = sound[len(prompt) :]
    assert torch.isfinite(made).all() and made.std() > 0.05 * prompt.std() and made.std() < 5 * prompt.std()
    assert torch.equal(sound, textless.continue_sound(models, prompt, 0.5, seed=1))
    assert not torch.equal(sound, textless.continue_sound(models, prompt, 0.5, seed=2))


def test_the_command_uses_it(call, tmp_path):
    code, _, err = call("continue", clips() / "effects" / "kick.flac", "--seconds", "0.1", "-o", tmp_path / "out.wav")
    assert code == 0, err
    assert (tmp_path / "out.wav").stat().st_size > 1000

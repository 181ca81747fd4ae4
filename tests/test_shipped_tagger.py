"""The tagger that comes with the package: its labels, what its card says, what it hears in the clips."""

import re

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("soundfile")
from audiomodels.audio import read_audio
from audiomodels.audio_transformer import AudioTransformer
from audiomodels.data import clips
from audiomodels.pretrained import model_folder
from audiomodels.tagger import seconds_of

pytestmark = pytest.mark.usefixtures("one_thread")
HEARD = {  # clip: its most probable labels, the probability of the last of them
    "effects/snare.flac": (("Musical_instrument", "Percussion", "Snare_drum"), 0.365),
    "effects/tom.flac": (("Musical_instrument", "Percussion", "Tom-tom"), 0.849),
    "effects/crash.flac": (("Musical_instrument", "Percussion", "Crash_cymbal"), 0.762),
    "music/choir.flac": (("Musical_instrument", "Choir"), 0.313),
    "speech/en_demo.flac": (("Human_sound", "Speech"), 0.959),
    "speech/fr_demo.flac": (("Human_sound", "Speech"), 0.898),
}


@pytest.fixture(scope="module")
def tagger():
    return AudioTransformer.from_pretrained("tagger")


def heard(model, path):
    audio, rate = read_audio(clips() / path, sample_rate=model.config.sample_rate)
    return model.score(torch.stack(seconds_of(audio, rate))).mean(0)


def test_labels(tagger):
    """Each has a name, and none stands for nothing: its output is not the same for all clips."""
    config = tagger.config
    assert len(config.labels) == config.n_class == len(set(config.labels)) and config.sample_rate == 16000
    assert tagger.head.weight.norm(dim=1).min() > 0.1


def test_card(tagger):
    text = (model_folder("tagger") / "README.md").read_text()
    assert f"{sum(p.numel() for p in tagger.parameters()):,} parameters" in text
    assert f"{tagger.config.n_class} labels" in text
    for words in ("CC0-1.0", "CC-BY-SA-3.0", "audiokernels build-corpus", "mAP"):
        assert words in text, words
    for label in re.findall(r"^\| (\S+) \| [01]\.\d+ ", text, re.MULTILINE):
        assert label in tagger.config.labels, label


@pytest.mark.parametrize("clip", HEARD)
def test_what_it_hears(tagger, clip):
    """The labels of the bundled clips do not change by accident."""
    labels, probability = HEARD[clip]
    scores = heard(tagger, clip)
    best = scores.argsort(descending=True)[: len(labels)].tolist()
    assert {tagger.config.labels[i] for i in best} == set(labels)
    assert float(scores[tagger.config.labels.index(labels[-1])]) == pytest.approx(probability, abs=0.02)


def test_it_is_sure_of_nothing_that_it_has_not_learned(tagger):
    """There was no bird."""
    assert "Bird" not in tagger.config.labels and float(heard(tagger, "effects/crow.flac").max()) < 0.4


def test_the_first_layer_matters(tagger):
    """A damaged filter bank is seen."""
    before = heard(tagger, "speech/en_demo.flac")
    weight = tagger.filters.weight
    weight.data, kept = weight.roll(1, 0), weight.data
    after = heard(tagger, "speech/en_demo.flac")
    weight.data = kept
    assert (before - after).abs().max() > 0.05


def test_it_is_what_tag_uses(call, tmp_path):
    code, out, _ = call("tag", clips() / "speech/en_demo.flac", "--top", 2, "--out", tmp_path / "x.png")
    assert code == 0 and out.split()[1] in AudioTransformer.from_pretrained("tagger").config.labels

"""Scores of taggers: mean average precision, note F1, frame AP, and clips scored by their seconds."""

import math

import numpy as np
import pytest
import torch
from audiomodels.audio_transformer import AudioTransformer, AudioTransformerConfig
from audiomodels.tag_data import TagClips, TagCrops
from audiomodels.tagger import seconds_of
from audiomodels.tagging import (
    Tagging,
    average_precisions,
    frame_ap,
    mean_average_precision,
    note_f1,
    score_clips,
    tag_scores,
)
from audiomodels.train import TrainConfig, evaluate, fit

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 1000
CONFIG = AudioTransformerConfig(
    n_class=3, n_layer=2, n_head=2, n_embd=8, n_hidden=8, n_filter=32, patch=50, sample_rate=RATE
)


def by_hand(scores, labels):
    """Average precision: mean over positives of the precision down to their score (ties together)."""
    return np.mean([labels[scores >= s].mean() for s, y in zip(scores, labels, strict=True) if y])


def drawn(clips=40, n_class=6, ties=False):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(clips, n_class, generator=generator)
    labels = torch.rand(clips, n_class, generator=generator) < 0.3
    labels[:, 4] = False
    return (scores * 5).round() / 5 if ties else scores, labels


@pytest.mark.parametrize("ties", [False, True])
def test_map_is_the_mean_over_labels_with_a_positive(ties):
    scores, labels = drawn(ties=ties)
    columns = [by_hand(scores[:, k].numpy(), labels[:, k].numpy()) for k in (0, 1, 2, 3, 5)]
    mean, skipped = mean_average_precision(scores, labels)
    assert skipped == 1 and mean == pytest.approx(np.mean(columns), abs=1e-6)
    found = average_precisions(scores, labels)
    assert math.isnan(found[4]) and found[[0, 1, 2, 3, 5]].tolist() == pytest.approx(columns)
    from sklearn.metrics import average_precision_score

    kept = [0, 1, 2, 3, 5]
    macro = average_precision_score(labels[:, kept].numpy(), scores[:, kept].numpy(), average="macro")
    assert mean == pytest.approx(macro, abs=1e-6)
    assert frame_ap(scores, labels) == pytest.approx(by_hand(scores.flatten().numpy(), labels.flatten().numpy()))


def test_labels_with_few_positives_can_be_left_out():
    scores, labels = drawn()
    many = [k for k in range(6) if int(labels[:, k].sum()) >= 12]
    assert 0 < len(many) < 5
    mean, skipped = mean_average_precision(scores, labels, least=12)
    assert skipped == 6 - len(many) and mean == pytest.approx(float(average_precisions(scores, labels)[many].mean()))
    mean, skipped = mean_average_precision(scores, torch.zeros_like(labels))
    assert math.isnan(mean) and skipped == 6


def test_note_f1():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.7, 0.6]])
    labels = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    assert note_f1(scores, labels) == pytest.approx(2 * 3 / (4 + 4))  # 0.5 counts as found
    assert note_f1(scores, labels, threshold=0.55) == pytest.approx(2 * 3 / (3 + 4))
    assert note_f1(labels.float(), labels) == 1 and math.isnan(note_f1(torch.zeros(1, 2), torch.zeros(1, 2)))


def test_all_figures_together():
    scores, labels = drawn()
    figures = tag_scores(scores, labels)
    p, y = scores.double().numpy(), labels.numpy()
    assert figures.bits == pytest.approx(-np.mean(np.log2(np.where(y, p, 1 - p))), rel=1e-5)
    assert (figures.n_scored, figures.n_skipped, figures.n_clip) == (5, 1, 40)
    assert figures.mean_ap == mean_average_precision(scores, labels)[0]
    assert tag_scores(labels.float(), labels).bits == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match=r"must both be \(clips, n_class\)"):
        average_precisions(scores[:, :2], labels)


def tones(n, seed=0):
    """Clips of 0.4 to 2.6 s of a sine whose frequency is its label; label 2 never comes alone."""
    generator = torch.Generator().manual_seed(seed)
    audio, labels = [], []
    for _ in range(n):
        first, both, length, phase = torch.rand(4, generator=generator).tolist()
        mine = [first < 0.5, first >= 0.5, both < 0.3]
        time = torch.arange(int(RATE * (0.4 + 2.2 * length))) / RATE
        sound = sum(torch.sin(6.283 * (hz * time + phase)) for hz, on in zip((60, 150, 330), mine, strict=True) if on)
        audio.append((sound * 8000).to(torch.int16))
        labels.append(mine)
    return TagClips(audio, torch.tensor(labels), ("low", "mid", "high"), RATE)


def test_a_clip_scores_the_mean_of_its_seconds():
    torch.manual_seed(0)
    model, clips = AudioTransformer(CONFIG).eval(), tones(70)
    scores = score_clips(model, clips)
    for i in (0, 31, 32, 69):
        crops = torch.stack(seconds_of(clips[i][0], RATE))
        torch.testing.assert_close(scores[i], model(crops).sigmoid().mean(0))
    assert len({len(seconds_of(clips[i][0], RATE)) for i in range(70)}) > 3
    with pytest.raises(ValueError, match="clips must have the model's 1000 Hz, got 8000"):
        score_clips(model, TagClips(clips.audio, clips.labels, clips.names, 8000))


def settings(out, **changes):
    usual = {"steps": 60, "batch": 16, "length": RATE, "context": 0, "lr": 0.01, "warmup": 5, "eval_every": 20}
    return TrainConfig(**{"out": str(out), **usual, "tensorboard": False, "progress": False, **changes})


def test_training_learns_resumes_and_logs(tmp_path):
    valid, crops = tones(60, seed=1), TagCrops(tones(200), batch=16, seed=0)

    def stop(step, bits):
        if step == 33:
            raise KeyboardInterrupt

    def run(out, on_step=None):
        torch.manual_seed(0)
        model = AudioTransformer(CONFIG)
        config = settings(out, save_every=10, schedule="constant")
        return model, fit(model, crops, config, valid=valid, on_step=on_step, task=Tagging())

    model, history = run(tmp_path / "whole")
    assert history.valid_step == [20, 40, 60] and history.valid[-1].mean_ap > 0.9 > history.valid[0].bits
    assert (
        history.valid[-1]
        == Tagging().evaluate(model, valid, settings(tmp_path))
        == tag_scores(score_clips(model, valid), valid.labels)
    )
    assert history.valid[-1].n_scored == 3 and history.valid[-1].note_f1 > 0.8
    assert history.bits[-1] < 0.5 < history.bits[0]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop)
    again, resumed = run(tmp_path / "parts")
    assert resumed.valid == history.valid and resumed.bits == history.bits  # read back from log.jsonl
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    few = Tagging().evaluate(model, valid, settings(tmp_path, eval_targets=7))
    assert few.n_clip == 7


def test_resumed_with_other_clips_is_told_so(tmp_path, caplog):
    for count in (20, 20, 21):
        assert "other settings" not in caplog.text
        config = settings(tmp_path, steps=count - 18)
        fit(AudioTransformer(CONFIG), TagCrops(tones(count), batch=16), config, task=Tagging())
    assert "resumed with other settings: {'steps': '2 -> 3', 'data': '20 recordings, " in caplog.text


def test_the_first_step_by_hand(tmp_path):
    torch.manual_seed(0)
    model, other = AudioTransformer(CONFIG), AudioTransformer(CONFIG)
    other.load_state_dict(model.state_dict())
    crops = TagCrops(tones(20), batch=16, seed=3)
    history = fit(model, crops, settings(tmp_path, steps=1, warmup=0), task=Tagging())
    audio, labels = crops(0)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(other(audio), labels)
    assert history.bits == [pytest.approx(loss.item() / math.log(2), rel=1e-6)]


def test_wrong_crops(tmp_path):
    model = AudioTransformer(CONFIG)
    for drawn, came in (((torch.zeros(16, 900), torch.zeros(16, 3)), r"\(16, 900\), 16"),
                        ((torch.zeros(16, 1000), torch.zeros(9, 3)), r"\(16, 1000\), 9")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"audio of shape \(16, 1000\) and as many labels, got {came}"):
            fit(model, lambda step, drawn=drawn: drawn, settings(tmp_path), task=Tagging())
    with pytest.raises(AttributeError):
        evaluate(model, tones(3), context=0)  # the yardstick of generators is not for taggers

"""The comparison of taggers: weighted average precision, intervals, what may be said, a smoke run of the command."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("tyro")
from audiomodels import cli
from audiomodels.compare import tagger_report
from audiomodels.compare.taggers import PROTOCOLS, CompareTaggersConfig, TaggerComparison, rows
from audiomodels.tag_data import TagClips
from audiomodels.tagging import frame_ap, mean_average_precision, note_f1
from tag_cases import corpus

pytestmark = pytest.mark.usefixtures("one_thread")


def clips(n=60, n_class=4, groups=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, n_class, generator=generator) < torch.tensor([0.5, 0.3, 0.25, 0.05])
    names = tuple(f"group {i % groups}" for i in range(n))
    return TagClips([torch.zeros(1, dtype=torch.int16)] * n, labels, tuple("abcd"), 1000, names)


def scores_for(data, strength, seed=0):
    noise = torch.randn(data.labels.shape, generator=torch.Generator().manual_seed(seed))
    return (strength * data.labels.float() + noise).sigmoid().double().numpy()


def test_weighted_average_precision_is_sklearns():
    from sklearn.metrics import average_precision_score

    data = clips()
    scores, labels = scores_for(data, 1.0)[:, 0], data.labels[:, 0].numpy()
    weights = tagger_report.group_weights(data.groups)[:50]
    found = tagger_report.resampled(scores, labels, weights)
    want = [average_precision_score(labels, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(found, want, rtol=1e-9)
    assert np.isnan(tagger_report.resampled(scores, np.zeros(60), weights)).all()


def test_weights_draw_whole_groups():
    data = clips()
    weights = tagger_report.group_weights(data.groups)
    assert weights.shape == (1001, 60) and (weights[0] == 1).all() and (weights.sum(1) == 60).all()
    assert (weights[:, :20] == weights[:, 20:40]).all() and weights[1:].std() > 0.5


def test_mixtures_vary_with_each_of_their_recordings():
    """Ten mixtures of one pair of recordings tell as much as one, not as ten."""
    others = [f"x{i}" for i in range(20)]
    weights = tagger_report.group_weights(["a | b"] * 10 + ["c", "d | a", *others])
    assert (weights[:, :10] == weights[:, :1]).all() and (weights[0] == 1).all()
    assert np.corrcoef(weights[1:, 0], weights[1:, 11])[0, 1] > 0.1  # they share a
    alone = tagger_report.group_weights([f"clip {i}" for i in range(12)] + others)
    assert weights[:, :10].mean(1).std() > 1.5 * alone[:, :10].mean(1).std()


def test_figures_without_resampling_are_those_of_tagging():
    data = clips()
    scores = scores_for(data, 1.5)
    rare = int((data.labels.sum(0) < 10).sum())
    assert rare == 1
    for least in (1, 10):
        want, skipped = mean_average_precision(torch.from_numpy(scores), data.labels, least=least)
        assert tagger_report.map_values(scores, data, least)[0] == pytest.approx(want)
        assert skipped == (rare if least == 10 else 0)
    assert tagger_report.frame_values(scores, data)[0] == pytest.approx(frame_ap(torch.from_numpy(scores), data.labels))
    assert tagger_report.note_values(scores, data)[0] == pytest.approx(note_f1(torch.from_numpy(scores), data.labels))
    interval = tagger_report.estimate(tagger_report.map_values(scores, data))
    assert interval.low < interval.value < interval.high and 0.02 < interval.half_width < 0.2
    assert tagger_report.estimate(tagger_report.map_values(scores, data, 100)) is None


def test_the_interval_of_rare_labels_holds_its_figure():
    """Twelve labels of two clips each: the resamples' own mean is far above the figure."""
    labels = torch.zeros(100, 12, dtype=torch.bool)
    for label in range(12):
        labels[[label, 50 + label], label] = True
    rare = TagClips([torch.zeros(1, dtype=torch.int16)] * 100, labels, tuple("abcdefghijkl"), 1000,
                    tuple(f"group {i}" for i in range(100)))  # fmt: skip
    values = tagger_report.map_values(scores_for(rare, 0.5), rare, 1)
    interval = tagger_report.estimate(values)
    assert np.nanmean(values[1:]) > values[0] + interval.half_width / 2  # the bias is no trifle
    assert interval.low < interval.value == values[0] < interval.high


def verdict(strengths, seeds=((0, 1, 2), (0, 1, 2)), curves=((0.4, 0.5), (0.3, 0.4))):
    """What is said of large-haar against large, of made-up strengths."""
    data, runs, values = clips(200), [], {}
    for name, strength, mine, curve in zip(("large-haar", "large"), strengths, seeds, curves, strict=True):
        runs += [{"row": name, "title": name, "seed": seed, "curve": [{"mean_ap": v} for v in curve]} for seed in mine]
        found = [
            tagger_report.map_values(scores_for(data, strength, seed + 10 * (name == "large")), data) for seed in mine
        ]
        values[name] = {"mAP": dict(zip(mine, found, strict=True))}
    (said,) = tagger_report.said(runs, values, "tags")
    return said["says"]


def test_what_may_be_said():
    assert verdict((2.0, 1.0)) == "large-haar is better"
    assert verdict((1.0, 2.0), curves=((0.3, 0.3), (0.4, 0.4))) == "large is better"
    assert verdict((1.0, 1.0)).startswith("not separated; a difference below 0.0")
    assert verdict((2.0, 1.0), curves=((0.4, 0.5), (0.4, 0.4))) == "no order yet: the last two checkpoints disagree"
    assert verdict((2.0, 1.0), curves=((0.5,), (0.4,))) == "no order yet: the last two checkpoints disagree"
    assert verdict((2.0, 1.0), curves=((None, 0.5), (0.3, 0.4))) == "no order yet: the last two checkpoints disagree"
    assert verdict((2.0, 1.0), seeds=((0, 1), (0, 1))).startswith("no order yet: seeds [0, 1] and [0, 1]")
    assert verdict((2.0, 1.0), seeds=((0, 1, 2), (0, 1, 3))).startswith("no order yet: seeds")


def test_the_rows_are_what_the_talk_compares():
    table = rows(PROTOCOLS["h100"])
    assert list(table)[:4] == ["vgg", "crnn", "resnet18", "densenet121"] and not PROTOCOLS["h100"].skipped
    transformers = [row.build(("a", "b")) for row in table.values() if row.family == "transformer"]
    counts = {sum(p.numel() for p in model.parameters()) for model in transformers[1:]}
    assert len(counts) == 1 and len(transformers) == 7  # pooling of either kind has no parameter
    assert {first for first, _, _ in tagger_report.ORDERS} | {second for _, second, _ in tagger_report.ORDERS} <= set(
        table
    )
    assert set(PROTOCOLS["compact"].skipped) == {"resnet18", "densenet121"}


def test_smoke_run(tmp_path, capsys):
    """The command end to end, with one task and then with both; nothing is trained twice."""
    made, out = corpus(tmp_path / "corpus"), tmp_path / "out"
    words = ["compare-taggers", "--data", made, "--out", out, "--protocol", "smoke", "--no-progress", "--seeds", "0"]

    def call(*more):
        with pytest.raises(SystemExit) as exit:
            cli.main([str(word) for word in (*words, *more)])
        assert not exit.value.code
        return capsys.readouterr().out

    first = call("--tasks", "tags", "--rows", "small")
    assert "tags: transformer, 3 layers, seed 0, lr" in first
    result = json.loads((out / "runs/smoke-tags/small/seed0/result.json").read_text())
    again = call("--rows", "small")
    assert "tags: transformer, 3 layers, seed 0" not in again and "pitch: transformer, 3 layers, seed 0" in again
    assert "learning rate" not in "".join(line for line in again.splitlines() if line.startswith("tags"))
    table = json.loads((out / "taggers.json").read_text())
    assert [(run["task"], run["row"]) for run in table["runs"]] == [("tags", "small"), ("pitch", "small")]
    assert table["runs"][0] == result
    speed = table["speeds"]["small"]
    assert speed["flops"] > 1e5 and speed["crops_per_second"] > 1 and "one thread's CPU time" in speed["clock"]
    assert result["parameters"] > 1000 and result["steps"] == 4
    assert result["crops_seen"] == 16 and len(result["curve"]) == 2 and result["device"] and len(result["data"]) == 2
    assert not table["estimates"]["tags"]["orders"]  # a smoke run prints no order
    text = (out / "taggers.md").read_text()
    assert "no order is given" in text and "| ResNet-18 | not run |" in text and "is better" not in text
    assert "unseen 8 clips" in text and "chance" in text
    assert (out / "taggers.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.rglob("training"))
    with pytest.raises(ValueError, match="holds a run of other settings"):
        TaggerComparison(CompareTaggersConfig(data=made, out=out, protocol="smoke", seeds=(0,), steps=8)).run()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seeds": ()}, "tasks and seeds must name at least one each"),
        ({"rows": ("vgg", "alexnet")}, "rows must be among vgg, .*; got alexnet"),
    ],
)
def test_wrong_settings(change, rule):
    with pytest.raises(ValueError, match=rule):
        CompareTaggersConfig(data=".", **change)

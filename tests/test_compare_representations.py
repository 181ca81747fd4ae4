"""The comparison of representations: its data, what may be said, a smoke run of the command."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("tyro")
from audiomodels.cnn import CNN, CNNConfig
from audiomodels.code_lm import CodeLM
from audiomodels.compare import representation_report as report
from audiomodels.compare.representation_data import noisy, sources, tasks, unlabelled
from audiomodels.compare.representations import (
    PROTOCOLS,
    CompareRepresentationsConfig,
    RepresentationComparison,
    parameters_of,
    rows,
)
from audiomodels.encoders import CodeLMEncoder, VGGEncoder
from audiomodels.patch_codes import PatchCodes, PatchCodesConfig
from tag_cases import clip_writer, tone

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 16000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """tags, tags_src and speech: Bark and Bell are leaves of Thing; a sound that is both is none's."""
    folder, listed = tmp_path_factory.mktemp("corpus"), []
    add = clip_writer(folder, RATE, listed)
    for i in range(20):
        labels = [("Bark", "Bell")[i % 2], "Thing"]
        add(
            "tags_src",
            "train",
            f"{i:05d}",
            tone(i % 2, 0.5 + 0.1 * i, RATE),
            labels,
            f"bank:x/{'abcdefghij'[i // 2] * 2}.wav",
        )
    add("tags_src", "train", "00020", tone(0, 1, RATE), ["Bark", "Bell", "Thing"], "bank:x/zz.wav")
    add("tags_src", "train", "00021", tone(0, 1, RATE), ["Thing"], "bank:x/yy.wav")
    for split, count in (("train", 6), ("dev", 6), ("test", 6)):
        for i in range(count):
            source = f"bank:{split}/{'klmnop'[i] * 2}.wav"
            add("tags", split, f"{i:05d}", tone(i % 2, 2, RATE), [("Bark", "Bell")[i % 2], "Thing"], source)
    for i in range(15):
        add("speech", ("train", "test")[i % 2], f"{i:05d}", tone(i % 3, 1.5, RATE), ["en", f"voice{i % 3}"], "")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    (folder / "labels.json").write_text(json.dumps({"tags": ["Bark", "Bell", "Thing"], "pitch": [60]}))
    return folder


def test_folds_share_no_group_and_hold_every_source_once(corpus):
    held = []
    for fold in range(5):
        task = sources(corpus, fold, 1000, 10)
        assert task.names == ("Bark", "Bell") if hasattr(task, "names") else task.test.names == ("Bark", "Bell")
        groups = [set(clips.groups) for clips in (task.train, task.dev, task.test)]
        assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
        assert all((clips.labels.sum(1) == 1).all() for clips in (task.train, task.dev, task.test))
        assert sum(map(len, (task.train, task.dev, task.test))) == 20
        held += task.test.groups
        assert sources(corpus, (fold + 1) % 5, 1000, 10).test.groups == task.dev.groups
    assert len(held) == 20 and len(set(held)) == 10
    with pytest.raises(ValueError, match="two labels of at least 11 recordings, got 0"):
        sources(corpus, 0, 1000, 11)


def test_nothing_held_out_is_learned_from(corpus):
    found = tasks(corpus, corpus, 0, 1000, least=10)
    sound, train = unlabelled(found), (found["sources"].train, found["voices"].train)
    assert len(sound) == sum(map(len, train)) and sound.n_class == 1 << 16
    assert found["voices"].names == () if hasattr(found["voices"], "names") else len(found["voices"].test.names) == 3
    assert [len(getattr(found["voices"], split)) for split in ("train", "dev", "test")] == [9, 3, 3]
    assert not set(found["voices"].train.groups) & set(found["voices"].test.groups)
    half = unlabelled(found, 0.5)
    kept = {tuple(r.codes[:50].tolist()) + (len(r.codes),) for r in sound}
    assert len(half) == round(0.5 * len(sound))
    assert {tuple(r.codes[:50].tolist()) + (len(r.codes),) for r in half} <= kept
    assert all(RATE <= len(r.codes) <= 2 * RATE for r in sound)
    assert len(tasks(corpus, corpus, 0, 4, least=10)["tags"].test) == 4


def test_noise_is_as_loud_as_told(corpus):
    clips = tasks(corpus, corpus, 0, 1000, least=10)["sources"].test
    for decibels in (30.0, 10.0):
        for (clean, _), (loud, _) in zip(clips, noisy(clips, decibels), strict=False):
            found = 10 * torch.log10(clean.square().mean() / (loud - clean).square().mean())
            assert abs(float(found) - decibels) < 0.3


def made_up(strengths, seeds=(0, 1, 2), before=None):
    """Runs of vgg and code-lm whose every task has these accuracies; test sounds in 40 groups of 5."""
    runs, draw = [], np.random.default_rng(0)
    chance = draw.random(200)
    for row, strength in zip(("vgg", "code-lm"), strengths, strict=True):
        for seed in seeds:
            hits, found = (chance < strength).astype(float), {}
            for task in report.TITLES:
                for shots in (None, 5):
                    found[f"{task}:{shots}"] = hits if task != "tags" else np.full(1001, strength)
                found[f"{task}:groups"] = np.array([f"{seed}-{i // 5}" for i in range(200)])
            dev = {task: [{"dev": strength}] for task in report.TITLES}
            last = dict.fromkeys(report.TITLES, strength if before is None else before[row])
            runs.append({"row": row, "title": row, "seed": seed, "found": found, "tasks": dev, "dev_before": last})
    return runs


def test_what_may_be_said():
    def says(*args, **options):
        (found,) = {v["says"] for v in report.said(made_up(*args, **options)) if v["task"] == "sources"}
        return found

    assert says((0.8, 0.5)) == "vgg is better" and says((0.5, 0.8)) == "code-lm is better"
    assert says((0.6, 0.6)).startswith("not separated; a difference below 0.000")
    assert says((0.8, 0.5), seeds=(0, 1)) == "no order yet: 2 seeds of both, 3 are needed"
    assert says((0.8, 0.5), before={"vgg": 0.4, "code-lm": 0.5}).endswith("the last two checkpoints disagree on dev")
    difference = next(v for v in report.said(made_up((0.8, 0.5))) if v["task"] == "sources")["difference"]
    assert difference["value"] == pytest.approx(0.3, abs=0.1) and difference["low"] < difference["value"]


def test_a_sweep_compares_the_same_seeds():
    """A row that lacks a seed is not compared with the others' mean over more seeds: folds differ."""
    first, second = (made_up((0.9, strength), seeds=(seed,))[1] for strength, seed in ((0.8, 0), (0.4, 1)))
    fewer = {**second, "row": "code-lm-k16"}
    for run, n_code in ((first, 256), (second, 256), (fewer, 16)):
        run["config"] = {"kind": "code_lm", "n_code": n_code, "share": 1.0, "width": 1.0}
    usual = {"n_code": 256, "share": 1.0, "width": 1.0}
    sweep = report.sweep_of([first, second, fewer], "n_code", usual)
    assert sweep.seeds == [1] and sweep.rows == {"code_lm": {16: "code-lm-k16", 256: "code-lm"}}
    assert sweep.estimates["sources", "code-lm"] == sweep.estimates["sources", "code-lm-k16"]
    assert sweep.estimates["sources", "code-lm"].value == pytest.approx(0.4, abs=0.1)
    assert report.sweep_of([first, second, fewer], "width", usual) is None
    assert report.sweep_of([first, fewer], "n_code", usual) is None


def test_encoders_are_of_one_size(tmp_path):
    """Within 20 %, as the protocol asks; the autoencoder's way down is a part of the code LM's."""
    config = CompareRepresentationsConfig(data=tmp_path, protocol="compact")
    comparison = RepresentationComparison(config)
    coder = PatchCodes(PatchCodesConfig(n_code=comparison.protocol.n_code, **comparison.protocol.coder))
    lm = CodeLM(comparison.lm_config(rows(comparison.protocol)["code-lm"], coder))
    sizes = [parameters_of(CodeLMEncoder(coder, lm)), parameters_of(VGGEncoder(CNN(CNNConfig(n_class=41))))]
    assert max(sizes) / min(sizes) < 1.2, sizes


def test_smoke_run_of_the_command(call, corpus, tmp_path):
    words = ("compare-representations", "--data", corpus, "--out", tmp_path, "--protocol", "smoke", "--seeds", "0",
             "--device", "cpu", "--no-progress", "--sweep", "codes")  # fmt: skip
    code, out, err = call(*words, "--rows", "simclr", "bag", "code-lm", "code-lm-k16", "vgg")
    assert code == 0, err
    found = json.loads((tmp_path / "representations.json").read_text())
    assert [run["row"] for run in found["runs"]] == ["vgg", "code-lm", "simclr", "bag", "code-lm-k16"]
    assert found["orders"] == []
    text = (tmp_path / "representations.md").read_text()
    assert "no order is given" in text and "is better" not in text and "Noise" in text
    assert "Sweep over the number of codes, all labels, seeds 0" in text and text.count("code LM, 16 codes") == 2
    assert (tmp_path / "representations.png").stat().st_size > 10_000
    for run in found["runs"]:
        assert set(run["tasks"]) == set(run["dev_before"]) == set(report.TITLES)
        assert all(0 <= score["test"] <= 1 for scores in run["tasks"].values() for score in scores)
        assert len(run["data"]["tags"]["test"]) == 64
    assert all(0 < found["runs"][i]["noise"]["10"]["changed"] <= 1 for i in (1, 4))
    before = (tmp_path / "representations.json").read_bytes()
    assert call(*words, "--rows", "bag", "vgg")[0] == 0  # made already: only the tables are written again
    assert (tmp_path / "representations.json").read_bytes() == before
    code, _, err = call(*words, "--rows", "bag", "--steps", "3")
    assert code == 2 and "holds a run of other settings" in err
    assert "rows must be among" in call(*words, "--rows", "nobody")[2]
    assert set(PROTOCOLS) == {"smoke", "compact", "h100"}

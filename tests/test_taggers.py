"""The commands around listening: train taggers, tag, spectrogram, plot-filters; one clear line for every mistake."""

import json

import pytest
import torch

pytest.importorskip("tyro")
from audiomodels import plots
from audiomodels.audio import write_audio
from audiomodels.audio_transformer import AudioTransformer, AudioTransformerConfig
from audiomodels.cnn import CNN
from audiomodels.tag_data import TagClips
from audiomodels.tagging import score_clips, tag_scores
from tag_cases import corpus, fsd50k, tone

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 4000
SMALL = ["--steps", 3, "--batch", 4, "--no-progress", "--no-tensorboard", "--model.sample-rate", RATE]
SIZES = ["--model.n-layer", 2, "--model.patch", 100, "--model.n-filter", 32]


@pytest.fixture(scope="module")
def fsd(tmp_path_factory):
    return fsd50k(tmp_path_factory.mktemp("fsd"), RATE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "tags" / "model"
    labels = ("Bark", "Bell", "Crow", "Rain")
    config = AudioTransformerConfig(n_class=4, labels=labels, n_layer=1, n_filter=32, patch=100, sample_rate=RATE)
    net = AudioTransformer(config)
    with torch.no_grad():
        for layer in (net.filters, net.embed, net.head):  # so that different sounds get different probabilities
            layer.weight.mul_(10)
    net.save_pretrained(folder)
    return folder


def is_picture(path):
    return path.read_bytes()[:4] == b"\x89PNG"


def test_train_on_fsd50k_in_one_command(call, fsd, tmp_path):
    words = ["train", fsd, "--model", "audio_transformer", "--out", tmp_path / "run", *SMALL, *SIZES]
    code, out, _ = call(*words, "--model.haar", "every", "--model.pool-every", 1)
    assert code == 0 and "4 labels; training on" in out and "8 clips; held out: dev, 4 clips" in out
    model = AudioTransformer.from_pretrained(tmp_path / "run" / "model")
    assert model.config.labels == ("Bark", "Bell", "Crow", "Rain")
    assert (model.config.haar, model.config.pool_every, model.config.sample_rate) == ("every", 1, RATE)
    dev = TagClips.load(fsd, split="dev", sample_rate=RATE)
    want = tag_scores(score_clips(model, dev), dev.labels)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["mean_ap"] == pytest.approx(want.mean_ap) and scores["n_skipped"] == want.n_skipped == 2
    assert f"mAP {want.mean_ap:.3f} over 2 labels (2 skipped" in out
    assert is_picture(tmp_path / "run" / "report.png")
    first = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert call(*words, "--steps", 5)[0] == 0  # goes on from step 3
    assert (tmp_path / "run/model/model.safetensors").read_bytes() != first


def test_train_on_the_corpus(call, tmp_path):
    made = corpus(tmp_path / "corpus", RATE)
    words = ["train", made, "--model=cnn", "--out", tmp_path / "tags", *SMALL]
    code, out, err = call(*words)
    assert code == 0 and "3 labels" in out and "6 clips" in out, err
    model = CNN.from_pretrained(tmp_path / "tags" / "model")
    assert model.config.kind == "vgg" and model.config.labels == ("Bark", "Bell", "Crow")
    words = ["train", made, "--model", "audio_transformer", "--part", "pitch", "--out", tmp_path / "pitch"]
    code, out, _ = call(*words, *SMALL, *SIZES)
    assert code == 0 and "training on 4 s in 4 clips" in out
    assert AudioTransformer.from_pretrained(tmp_path / "pitch" / "model").config.labels == ("60", "61", "62", "63")
    words = ["tag", made / "pitch/train/0_00000.flac", "--model", tmp_path / "tags/model", "--top", 1]
    code, out, _ = call(*words, "--out", tmp_path / "x.png")
    assert code == 0 and out.split()[1] in ("Bark", "Bell", "Crow") and is_picture(tmp_path / "x.png")


@pytest.mark.parametrize("seconds", [0.4, 1.0, 1.45])
def test_tag(call, model, tmp_path, seconds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sound = tone(0, seconds, RATE) * (torch.arange(round(seconds * RATE)) < 0.05 * RATE)  # in the first crop alone
    write_audio(tmp_path / "sound.wav", sound, RATE)
    code, out, _ = call("tag", tmp_path / "sound.wav", "--model", model, "--top", 3)
    lines = out.splitlines()
    net = AudioTransformer.from_pretrained(model)
    clip = TagClips([(sound * 32768).round().short()], torch.zeros(1, 4), ("a", "b", "c", "d"), RATE)
    want = score_clips(net, clip)[0]
    best = want.argsort(descending=True)[:3].tolist()
    assert code == 0 and len(lines) == 4 and lines[3] == "sound_tags.png" and is_picture(tmp_path / "sound_tags.png")
    for line, i in zip(lines, best, strict=False):
        assert float(line.split()[0]) == pytest.approx(float(want[i]), abs=0.006)
        assert line.split()[1] == net.config.labels[i]


def test_spectrogram(call, tmp_path):
    for name, rate in (("a", 8000), ("b", 22050)):
        write_audio(tmp_path / f"{name}.wav", tone(1, 0.2, rate), rate)
    files = (tmp_path / "a.wav", tmp_path / "b.wav")
    code, out, _ = call("spectrogram", *files, "--kinds", "mel", "--out", tmp_path / "new")
    assert code == 0 and len(out.splitlines()) == 2
    assert is_picture(tmp_path / "new" / "a.png") and is_picture(tmp_path / "new" / "b.png")
    assert call("spectrogram", tmp_path / "a.wav", "--out", tmp_path / "all")[0] == 0
    assert (tmp_path / "all" / "a.png").stat().st_size > 2 * (tmp_path / "new" / "a.png").stat().st_size
    code, _, err = call("spectrogram", tmp_path / "a.wav", tmp_path / "mel" / "a.wav", "--out", tmp_path)
    assert code == 2 and "must have different names" in err
    code, _, err = call("spectrogram", tmp_path / "missing.wav", "--out", tmp_path)
    assert code == 2 and "missing.wav: No such file" in err


def test_a_picture_that_nobody_named_replaces_only_its_like(call, model, tmp_path, monkeypatch):
    """holiday.wav may lie beside holiday.png, a photograph."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_audio(tmp_path / f"{name}.wav", tone(1, 0.2, RATE), RATE)
    tag, draw = ["tag", "b.wav", "--model", model], ["spectrogram", "a.wav", "b.wav", "--kinds", "waveform"]
    for words, picture in ((tag, tmp_path / "b_tags.png"), (draw, tmp_path / "b.png")):
        picture.write_bytes(b"a photograph")
        code, out, err = call(*words)
        assert code == 2 and f"{picture.name} is there already, and audiokernels did not make it" in err
        assert out == "" and picture.read_bytes() == b"a photograph"
        picture.unlink()
        assert call(*words)[0] == 0 and is_picture(picture) and call(*words)[0] == 0
    assert (tmp_path / "a.png").exists()
    (tmp_path / "named.png").write_bytes(b"a picture")
    assert call(*tag, "-o", "named.png")[0] == 0 and is_picture(tmp_path / "named.png")


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    fig, _ = plots.figure(1, 1, 1, 1)
    plots.save(fig, tmp_path / "new" / "a.png")
    before = (tmp_path / "new" / "a.png").read_bytes()

    def full(path, **options):
        path.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fig, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        plots.save(fig, tmp_path / "new" / "a.png")
    assert plots.is_ours(tmp_path / "new" / "a.png") and (tmp_path / "new" / "a.png").read_bytes() == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_plot_filters(call, model, tmp_path):
    other = tmp_path / "pitch" / "model"
    torch.manual_seed(1)
    AudioTransformer(AudioTransformer.from_pretrained(model).config).save_pretrained(other)
    write_audio(tmp_path / "a.wav", tone(0, 2, RATE), RATE)
    code, out, _ = call("plot-filters", model, other, "--sounds", tmp_path / "a.wav", "--out", tmp_path / "new")
    assert code == 0 and "tags: line R²" in out and "Hz from before training" in out and "tags and pitch:" in out
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        "filters_tags.png", "filters_tags.npy", "filters_pitch.png", "filters_pitch.npy", "filters_curves.png",
    }  # fmt: skip
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note.wav").write_text("no sound")
    write_audio(tmp_path / "folder" / "b.wav", tone(0, 1, 2 * RATE), 2 * RATE)
    code, _, err = call("plot-filters", model, "--sounds", tmp_path / "folder", "--out", tmp_path / "new")
    assert code == 0 and "left out: " in err and "1 of 1 files resampled to 4000 Hz" in err
    code, _, err = call("plot-filters", model, "piano", "--out", tmp_path / "none")
    assert code == 2 and "piano: is not one of audio_transformer" in err and not (tmp_path / "none").exists()
    code, _, err = call("plot-filters", model, model)
    assert code == 2 and "must be different folders, got" in err


def test_plot_filters_tells_seeds_from_tasks(call, tmp_path):
    """Folders as compare-taggers leaves them: they end alike, and models of one task have one list of labels."""
    for task, labels in (("tags", ("a", "b")), ("pitch", ("60", "61"))):
        for seed in range(2):
            torch.manual_seed(seed)
            sizes = {"n_class": 2, "n_layer": 1, "n_filter": 64, "patch": 100, "sample_rate": RATE}
            net = AudioTransformer(AudioTransformerConfig(labels=labels, **sizes))
            if task == "pitch":  # smoother filters: lower centres
                kernel = torch.ones(1, 1, 9) / 9
                weight = torch.nn.functional.conv1d(net.filters.weight[:, None], kernel, padding=4)[:, 0]
                net.filters.weight.data = weight
            net.save_pretrained(tmp_path / f"{task}/large/seed{seed}/model")
    models = [tmp_path / f"{task}/large/seed{seed}/model" for task in ("tags", "pitch") for seed in (0, 1)]
    code, out, _ = call("plot-filters", *models, "--out", tmp_path / "new")
    assert code == 0 and is_picture(tmp_path / "new" / "filters_curves.png")
    apart = {line.split(":")[0]: line for line in out.splitlines() if " in the mean of " in line}
    assert apart["one task"].endswith("of 2 pairs") and apart["two tasks"].endswith("of 4 pairs")
    hz = {kind: float(line.split(":")[1].split(" Hz")[0].replace(",", "")) for kind, line in apart.items()}
    assert hz["two tasks"] > 3 * hz["one task"] > 0
    assert (tmp_path / "new" / "filters_pitch-large-seed1.png").exists()


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["train", "x", "--model", "alexnet"], "audio_transformer, cnn; got alexnet"),
        (["train", "x", "--model"], "got nothing"),
        (["train", "MISSING", "--model", "audio_transformer", "--out", "OUT"], "must hold FSD50K.ground_truth"),
        (["train", "FSD", "--model", "cnn", "--out", "OUT", "--model.n-class", "3"], "come from the data"),
        (["tag", "x.wav", "--model", "MISSING"], "no such folder"),
        (["tag", "x.wav", "--model", "MODEL"], "x.wav: No such file"),
        (["tag", "x.wav", "--model", "MODEL", "--top", "0"], "--top must be at least 1, got 0"),
        (["plot-filters", "MISSING"], "no such folder"),
        (["plot-filters"], "at least one MODEL"),
        (["plot-filters", "piano", "--out", "OUT"], "is not one of audio_transformer; of the models shipped these are"),
        (["plot-filters", "MODEL", "--out", __file__], "--out must be a folder"),
        (["spectrogram", "x.wav", "--out", "OUT"], "x.wav: No such file"),
        (["spectrogram", "x.wav", "--out", __file__], "--out must be a folder"),
        (["spectrogram"], "at least one FILE"),
    ],
)
def test_mistakes_are_one_line(call, fsd, model, tmp_path, words, rule):
    names = {"MISSING": tmp_path / "missing", "FSD": fsd, "OUT": tmp_path / "out", "MODEL": model}
    code, out, err = call(*(names.get(word, word) for word in words))
    assert code == 2 and rule in err and len(err.splitlines()) == 1 and out == ""
    assert not (tmp_path / "out").exists()


def test_train_without_model_is_wavenets(call):
    code, out, _ = call("train", "--help")
    assert code == 0 and "--model.dilation-cycle" in out and "audio_transformer" in out
    assert "--model.pool-every" in call("train", "--model", "audio_transformer", "--help")[1]
    assert call("train", "--model", "wavenet", "--help")[1] == out

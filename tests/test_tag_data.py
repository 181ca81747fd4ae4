"""Clips with labels: FSD50K's folder, the corpus's parts, batches that are a function of the seed and the step."""

import warnings

import pytest
import torch
from audiomodels.audio import AudioError, AudioNotice, write_audio
from audiomodels.tag_data import HELD_OUT_PROGRAMS, Mixtures, TagClips, TagCrops
from tag_cases import VOCABULARY, corpus, fsd50k, tone

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 4000


@pytest.fixture(scope="module")
def fsd(tmp_path_factory):
    return fsd50k(tmp_path_factory.mktemp("fsd"), RATE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"), RATE)


# --- FSD50K -----------------------------------------------------------------------------------------------------------


def test_fsd50k_splits(fsd):
    clips = {split: TagClips.load(fsd, split=split, sample_rate=RATE) for split in ("train", "dev", "test")}
    assert {split: len(c) for split, c in clips.items()} == {"train": 8, "dev": 4, "test": 6}
    assert clips["train"].groups == ("1000", "1001", "1003", "1004", "1006", "1007", "1009", "1010")
    assert clips["dev"].groups == ("1002", "1005", "1008", "1011")
    for c in clips.values():
        assert c.names == VOCABULARY and c.labels.shape == (len(c), 4) and c.sample_rate == RATE
        for i, group in enumerate(c.groups):
            number = int(group) % 1000
            audio, labels = c[i]
            assert labels.tolist() == [*(number % 3 == k for k in range(3)), number % 4 == 0]
            torch.testing.assert_close(audio, tone(number % 3, 0.4 + 0.3 * number, RATE), atol=1e-4, rtol=0)
    assert clips["dev"].seconds == pytest.approx(sum(0.4 + 0.3 * i for i in (2, 5, 8, 11)), abs=1e-2)


def test_fsd50k_is_resampled_with_one_notice(fsd):
    with pytest.warns(AudioNotice, match=r"resampled to 8000 Hz \(4 of 4 files\)") as told:
        clips = TagClips.load(fsd, split="dev", sample_rate=8000)
    assert len(told) == 1 and len(clips[0][0]) == 8000


@pytest.mark.parametrize(
    ("file", "text", "rule"),
    [
        ("vocabulary.csv", None, "vocabulary.csv: cannot be read"),
        ("vocabulary.csv", "0,Bark,/m/0\n1,Bark,/m/1\n", "must list labels, each once"),
        ("vocabulary.csv", "0,Bark\n", "vocabulary.csv, row 1: must have 3 columns, has 2"),
        ("dev.csv", "fname,labels,mids,split\n1000,Bark,/m/0\n", "dev.csv, row 2: must have 4 columns, has 3"),
        ("dev.csv", "fname,labels,mids,split\n1000,Meow,/m/0,train\n", "'Meow' is none of the 4"),
        ("dev.csv", "fname,labels,mids,split\n../1000,Bark,/m/0,train\n", "'../1000' is no name of a clip"),
        ("dev.csv", "fname,labels,mids,split\n77,Bark,/m/0,train\n", "77.wav: No such file"),
        ("dev.csv", "fname,labels,mids,split\n1000,Bark,/m/0,val\n", "holds no clips of the split 'train'"),
        ("dev.csv", b"\xff\xfe", "dev.csv: cannot be read"),
    ],
)
def test_fsd50k_that_is_damaged(tmp_path, file, text, rule):
    path = fsd50k(tmp_path / "x", RATE, dev=3, test=1) / "FSD50K.ground_truth" / file
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AudioError, match=rule):
        TagClips.load(tmp_path / "x", split="train", sample_rate=RATE)


def test_wrong_arguments(fsd, made, tmp_path):
    with pytest.raises(ValueError, match="split must be train, dev or test; got 'valid'"):
        TagClips.load(fsd, split="valid", sample_rate=RATE)
    with pytest.raises(ValueError, match="part must be tags, tags_src or pitch; got 'piano'"):
        TagClips.load(made, split="train", part="piano", sample_rate=RATE)
    with pytest.raises(AudioError, match="split must be train, dev, test or unseen and hold clips; got 'valid'"):
        TagClips.load(made, split="valid", part="pitch", sample_rate=RATE)
    with pytest.raises(AudioError, match="must hold FSD50K.ground_truth, or a manifest.jsonl"):
        TagClips.load(tmp_path, split="train")


# --- the corpus -------------------------------------------------------------------------------------------------------


def test_corpus_tags(made):
    clips = {split: TagClips.load(made, split=split, sample_rate=RATE) for split in ("valid", "dev", "test")}
    assert len(clips["valid"]) == 12 and len(clips["dev"]) + len(clips["test"]) == 12 and len(clips["dev"])
    assert not set(clips["dev"].groups) & set(clips["test"].groups)
    assert clips["valid"].names == VOCABULARY[:3] and (clips["valid"].labels.sum(1) == 1).all()
    assert clips["valid"].groups[0] == clips["valid"].groups[6] == "sounds:bank:gg"
    sources = TagClips.load(made, split="train", part="tags_src", sample_rate=RATE)
    assert len(sources) == 6 and sources.names == VOCABULARY[:3] and sources.labels.sum() == 6  # "Unheard" is left out
    assert sources.only([4, 1]).groups == (sources.groups[4], sources.groups[1])


def test_corpus_pitch_is_split_by_instrument(made):
    assert {73, 42} < HELD_OUT_PROGRAMS and len(HELD_OUT_PROGRAMS) == 5
    clips = {
        split: TagClips.load(made, split=split, part="pitch", sample_rate=RATE)
        for split in ("train", "dev", "test", "unseen")
    }
    # of five programs two are seen, two unseen, one has both kinds at once and belongs nowhere
    assert {split: len(c) for split, c in clips.items() if split in ("train", "unseen")} == {"train": 4, "unseen": 8}
    assert len(clips["dev"]) + len(clips["test"]) == 4
    assert clips["train"].names == ("60", "61", "62", "63")
    every = [group for c in clips.values() for group in c.groups]
    assert len(set(every)) == len(every) == 16


def test_labels_json_is_needed(tmp_path):
    made = corpus(tmp_path, RATE)
    (made / "labels.json").write_text('{"tags": 3}')
    with pytest.raises(AudioError, match="labels.json: must list the labels of tags"):
        TagClips.load(made, split="valid", sample_rate=RATE)


# --- batches ----------------------------------------------------------------------------------------------------------


def clips(lengths, labels, rate=1000):
    """Clip i holds 1000 * (i + 1) + its time in ms, as int16."""
    audio = [(1000 * (i + 1) + torch.arange(n) % 1000).to(torch.int16) for i, n in enumerate(lengths)]
    return TagClips(audio, torch.tensor(labels).bool(), tuple("abc"[: len(labels[0])]), rate)


def test_crops_are_seconds_of_clips():
    source = clips([1000, 2500, 300], [[1, 0], [0, 1], [1, 1]])
    crops = TagCrops(source, batch=600, seed=5)
    audio, labels = crops(0)
    assert audio.shape == (600, 1000) and labels.shape == (600, 2) and labels.dtype == torch.float32
    values = (audio * 32768).round().int()
    which, starts = values[:, 0] // 1000 - 1, values[:, 0] % 1000
    assert torch.equal(labels.bool(), source.labels[which])
    assert all(150 < int((which == i).sum()) < 250 for i in range(3))
    for row, i, start in zip(values, which, starts, strict=True):
        want = torch.arange(1000) + start
        want = want % 300 if i == 2 else want % 1000
        assert torch.equal(row, (1000 * (i + 1) + want).int())
    # the long clip's second begins anywhere; the short one, repeated four times, anywhere within its spare 200 samples
    assert starts[which == 0].max() == 0 and len(set(starts[which == 1].tolist())) > 100
    assert starts[which == 2].max() > 150


@pytest.mark.parametrize("kind", [TagCrops, Mixtures])
def test_crops_tell_what_they_are_drawn_from(kind):
    lengths, labels = [1000, 2500, 300], [[1, 0], [0, 1], [1, 1]]
    told = kind(clips(lengths, labels), batch=2, seed=1).data
    assert told.startswith("3 recordings, 3800 samples, ") and told == kind(clips(lengths, labels), batch=8).data
    others = [clips([1000, 2500, 301], labels), clips(lengths, labels[::-1]), clips(lengths, labels).only([0, 2, 1])]
    assert len({told, *(kind(other, batch=2).data for other in others)}) == 4


@pytest.mark.parametrize("kind", [TagCrops, Mixtures])
def test_batches_depend_on_seed_and_step_alone(kind):
    source = clips([1000, 2500, 300], [[1, 0], [0, 1], [1, 1]])
    first = kind(source, batch=8, seed=1)
    again = kind(source, batch=8, seed=1)
    first(9)
    for step in (0, 3):
        assert all(torch.equal(a, b) for a, b in zip(first(step), again(step), strict=True))
    assert not torch.equal(first(0)[0], first(1)[0])
    assert not torch.equal(first(0)[0], kind(source, batch=8, seed=2)(0)[0])


def test_a_recorded_batch_of_mixtures():
    """The stream is part of every published table: these figures must never change."""
    source = clips([1000, 2500, 300], [[1, 0], [0, 1], [1, 1]])
    audio, labels = Mixtures(source, batch=4, seed=7)(11)
    assert labels.tolist() == [[0, 1], [1, 1], [1, 1], [1, 1]]
    torch.testing.assert_close(audio.abs().sum(1), torch.tensor([191.462, 147.298, 560.353, 51.9]), rtol=1e-4, atol=0)


def test_mixtures_hold_what_their_labels_say():
    """Three sines, a label each: a mixture's spectrum has just those of its labels, in the drawn proportions."""
    sines = [(0.9 * 32767 * torch.sin(6.283185 * hz * torch.arange(n) / 1000)).to(torch.int16)
             for hz, n in ((50, 700), (120, 1000), (300, 1700))]  # fmt: skip
    source = TagClips(sines, torch.eye(3).bool(), tuple("abc"), 1000)
    audio, labels = Mixtures(source, batch=400, seed=0)(0)
    peak = torch.fft.rfft(audio).abs()[:, [50, 120, 300]]
    loud = peak > 0.05 * peak.amax(1, keepdim=True)
    assert not (loud & ~labels.bool()).any()
    assert float(loud[labels.bool()].float().mean()) > 0.98  # two events of one sine can cancel each other
    level = 20 * audio.abs().amax(1).log10()
    assert -15.01 < level.min() < -13 and -3 < level.max() < -0.99
    counts = labels.sum(1)
    # one event: 50 %; two: 35 %, of one label in a third of the cases; three: 15 %, of one label in a ninth, ...
    assert abs(float((counts == 1).float().mean()) - (0.5 + 0.35 / 3 + 0.15 / 9)) < 0.08
    assert float((counts == 3).float().mean()) == pytest.approx(0.15 * 2 / 9, abs=0.03)
    assert labels.mean(0).std() < 0.06  # labels are drawn evenly


def test_silent_clips_make_no_nan():
    source = TagClips([torch.zeros(500, dtype=torch.int16)], torch.ones(1, 1).bool(), ("a",), 1000)
    assert torch.equal(Mixtures(source, batch=3)(0)[0], torch.zeros(3, 1000))


def test_wrong_batches():
    source = clips([1000], [[1]])
    for options, rule in (
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"batch": 1, "seed": -1}, r"seed must be in 0 .. 2\*\*64 - 1; got -1"),
    ):
        with pytest.raises(ValueError, match=rule):
            TagCrops(source, **options)
    with pytest.raises(ValueError, match="step must be in"):
        TagCrops(source, batch=1)(-1)
    with pytest.raises(ValueError, match="at least one clip"):
        TagCrops(source.only([]), batch=1)
    with pytest.raises(ValueError, match="must carry labels"):
        Mixtures(clips([1000], [[0]]), batch=1)


def test_a_file_too_loud_is_clipped_not_wrapped(tmp_path):
    fsd50k(tmp_path, RATE, dev=3, test=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AudioNotice)
        write_audio(tmp_path / "FSD50K.eval_audio" / "5000.wav", 2 * tone(0, 0.5, RATE), RATE)
    audio, _ = TagClips.load(tmp_path, split="test", sample_rate=RATE)[0]
    torch.testing.assert_close(audio, (2 * tone(0, 0.5, RATE)).clamp(-1, 1), atol=1e-4, rtol=0)

"""data.py: loading, splits that never change, and crops that are a pure function of (seed, step)."""

import json
import math
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audiomodels import data, quantize
from audiomodels.audio import AudioError, AudioNotice, read_audio, write_audio
from audiomodels.data import Crops, Recording, Recordings, clips, groups_of, half_of, split_of

RATE = 16000


def tone(seconds=0.5, rate=RATE, frequency=440):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def counting(*sizes, n_class=256):
    """Recordings whose codes tell where they are from: recording r holds 10 r + 1 + (i mod 9), never silence (128)."""
    made = [
        Recording(f"r{r}", (torch.arange(n) % 9 + 10 * r + 1).to(torch.uint8), f"g{r}") for r, n in enumerate(sizes)
    ]
    return Recordings(made, sample_rate=RATE, n_class=n_class)


def row(part, split, number, source, labels=(), **more):
    path = f"{part}/{split}/{number:05d}.flac"
    seconds, license_ = 0.1, "CC0-1.0"
    return {"path": path, "part": part, "split": split, "seconds": seconds, "labels": list(labels), "source": source,
            "license": license_, "detail": {}, **more}  # fmt: skip


def write_corpus(folder, rows, seconds=0.1):
    """What the corpus builder writes: FLAC files, manifest.jsonl, and its packs of mu-law codes."""
    by_pack = {}
    for number, entry in enumerate(rows):
        path = folder / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(seconds + number / 1000, frequency=200 + 10 * number), RATE, subtype="PCM_16")
        by_pack.setdefault(f"{entry['part']}_{entry['split']}", []).append(entry)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    for name, entries in by_pack.items():
        codes = [quantize.mulaw_encode(read_audio(folder / e["path"])[0]).numpy() for e in entries]
        np.savez_compressed(
            folder / f"{name}.mulaw.npz",
            codes=np.concatenate(codes),
            rate=RATE,
            offsets=np.cumsum([0] + [len(c) for c in codes]),
            paths=np.array([e["path"] for e in entries]),
            labels=np.array([json.dumps(e["labels"]) for e in entries]),
        )
    return folder / "manifest.jsonl"


VOICES = ("allison", "june", "carlo", "ivrvoice")
CORPUS = (
    [row("piano", s, n, f"music21:bach/bwv{n}.mxl + font", ["bach"]) for n, s in enumerate(["train", "valid"] * 12)]
    + [row("speech", "valid", n, f"pack:voice/{n}.g722", ["en", VOICES[n % 4]]) for n in range(12)]
    + [row("speech", "train", n, f"pack:voice/{n}.g722", ["en", VOICES[n % 4]]) for n in range(12, 16)]
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), CORPUS)


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("companding, n_class", [("mulaw", 256), ("mulaw", 1024), ("linear", 256), ("linear", 65536)])
def test_codes_are_the_file_encoded(companding, n_class):
    path = clips() / "music/choir.flac"
    (one,) = Recordings.load(path, sample_rate=16000, companding=companding, n_class=n_class)
    assert torch.equal(one.codes, quantize.encode(read_audio(path)[0], companding, n_class))
    assert one.codes.dtype == quantize.code_dtype(n_class) and one.name == "choir.flac"


def test_the_bundled_clips_at_8_and_16_khz():
    at16 = Recordings.load(clips(), sample_rate=16000)
    with pytest.warns(AudioNotice, match=r"resampled to 8000 Hz \(23 from 16000 Hz, of 23 files\)") as caught:
        at8 = Recordings.load(clips(), sample_rate=8000)
    assert len(caught) == 1, "one notice for all files"
    assert len(at16) == len(at8) == 23 and at16.seconds == pytest.approx(67.6, abs=0.05)
    assert at8.seconds == pytest.approx(at16.seconds, abs=0.01) and at8.sample_rate == 8000
    for low, high in zip(at8, at16, strict=True):
        assert low.name == high.name and abs(2 * len(low.codes) - len(high.codes)) <= 2
        assert low.condition is None and low.label is None
    assert at16.labels is None and repr(at8) == "Recordings(23 of mulaw 256 at 8000 Hz, 67.6 s)"


def test_a_folder_without_a_manifest(tmp_path):
    for name in ("b/two.WAV", "a/one.flac", "b/.hidden.wav", "b/._x.wav", "three.ogg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, tone(), RATE, format=name.rsplit(".")[-1].upper())
    (tmp_path / "notes.txt").write_text("no audio")
    loaded = Recordings.load(str(tmp_path), sample_rate=RATE)
    assert [(r.name, r.group) for r in loaded] == [
        ("a/one.flac", "a/one"),
        ("b/two.WAV", "b/two"),
        ("three.ogg", "three"),
    ]
    several = Recordings.load([tmp_path / "three.ogg", str(tmp_path / "a/one.flac")], sample_rate=RATE)
    assert [r.name for r in several] == ["three.ogg", "one.flac"]


def test_in_a_folder_a_bad_file_is_left_out_with_a_notice(tmp_path):
    soundfile.write(tmp_path / "good.wav", tone(), RATE)
    (tmp_path / "bad.wav").write_bytes(b"nothing")
    with pytest.warns(AudioNotice, match="left out: .*bad.wav: is not a readable audio file"):
        assert len(Recordings.load(tmp_path, sample_rate=RATE)) == 1
    with pytest.raises(AudioError, match="bad.wav"):
        Recordings.load(tmp_path / "bad.wav", sample_rate=RATE)
    (tmp_path / "good.wav").unlink()
    with pytest.warns(AudioNotice), pytest.raises(AudioError, match="none of its 1 audio files can be read; the last"):
        Recordings.load(tmp_path, sample_rate=RATE)


def test_clipped_samples_are_told(tmp_path):
    audio = tone()
    audio[:7] = 1.5
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    with pytest.warns(AudioNotice, match="7 of 8000 samples lay beyond full scale and were clipped"):
        (one,) = Recordings.load(tmp_path, sample_rate=RATE)
    assert one.codes[:7].tolist() == [255] * 7


def test_manifest_roundtrip(corpus):
    for source in (corpus, corpus.parent, str(corpus)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = Recordings.load(source, sample_rate=RATE)
        assert [r.name for r in loaded] == [entry["path"] for entry in CORPUS]
    for one, entry in zip(loaded, CORPUS, strict=True):
        assert torch.equal(one.codes, quantize.mulaw_encode(read_audio(corpus.parent / entry["path"])[0]))
    piano = Recordings.load(corpus, sample_rate=RATE, part="piano", split="train")
    assert [r.name for r in piano] == [e["path"] for e in CORPUS if (e["part"], e["split"]) == ("piano", "train")]
    assert {r.group for r in piano} == {f"music21:bach/bwv{n}.mxl" for n in range(0, 24, 2)}


def test_global_labels(corpus):
    speech = Recordings.load(corpus, sample_rate=RATE, part="speech", labels=VOICES)
    assert speech.labels.tolist() == [n % 4 for n in range(16)] and speech.labels.dtype == torch.int64
    assert speech.label_names == VOICES and speech.cut(0.5)[0].labels.tolist() == speech.labels.tolist()
    with pytest.raises(ValueError, match="labels must name one label of each recording; .* carries"):
        Recordings.load(corpus, sample_rate=RATE, part="speech", labels=["en", *VOICES])
    with pytest.raises(ValueError, match="labels must name one label"):
        Recordings.load(corpus, sample_rate=RATE, labels=VOICES)


@pytest.mark.parametrize(
    "line, words",
    [
        ("not json", "line 2: must be a JSON object with a path"),
        ("[1]", "line 2: must be a JSON object"),
        ('{"part": "piano"}', "line 2: must be a JSON object with a path"),
        ('{"path": 3}', "line 2: must be"),
        ("[" * 100_000, "line 2: must be"),
        ('{"path": "../../etc/passwd"}', "line 2: path must stay below the manifest"),
        ('{"path": "/etc/passwd"}', "line 2: path must stay below"),
        ('{"path": ""}', "line 2: path must stay below"),
        ('{"path": "a.flac", "labels": "x"}', "line 2: labels must be a list"),
        ('{"path": "a.flac", "source": null}', "line 2: source must be a str"),
        ('{"path": "gone.flac"}', "gone.flac: No such file"),
    ],
)
def test_bad_manifests(tmp_path, line, words):
    soundfile.write(tmp_path / "ok.flac", tone(), RATE)
    (tmp_path / "manifest.jsonl").write_text(f'{{"path": "ok.flac"}}\n{line}\n')
    with pytest.raises(AudioError, match=words):
        Recordings.load(tmp_path, sample_rate=RATE)


def test_nothing_to_load(tmp_path):
    with pytest.raises(AudioError, match="the folder holds no audio files"):
        Recordings.load(tmp_path, sample_rate=RATE)
    with pytest.raises(AudioError, match="the list of files is empty"):
        Recordings.load([], sample_rate=RATE)
    with pytest.raises(AudioError, match="No such file"):
        Recordings.load(tmp_path / "gone", sample_rate=RATE)
    (tmp_path / "manifest.jsonl").write_text("\n")
    with pytest.raises(AudioError, match="holds no recordings"):
        Recordings.load(tmp_path, sample_rate=RATE)
    with pytest.raises(AudioError, match="cannot be read"):
        Recordings.load(tmp_path / "other.jsonl", sample_rate=RATE)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"split": "validation"}, "split must be one of dev, test, train, valid; got 'validation'"),
        ({"part": "drums"}, "part must be one of piano, speech; got 'drums'"),
        ({"companding": "alaw"}, "companding must be one of mulaw, linear"),
        ({"n_class": 1}, "n_class must be in 2"),
        ({"sample_rate": 3}, "sample_rate must be in 1000"),
    ],
)
def test_wrong_arguments_of_load(corpus, options, words):
    with pytest.raises(ValueError, match=words):
        Recordings.load(corpus, **{"sample_rate": RATE, **options})


# -------------------------------------------------------------------------------------------------------------- packs


def test_a_pack_is_its_manifest_encoded(corpus):
    for part, split in (("piano", "train"), ("piano", "valid"), ("speech", "valid")):
        packed = Recordings.load(corpus.parent / f"{part}_{split}.mulaw.npz", sample_rate=RATE)
        read = Recordings.load(corpus, sample_rate=RATE, part=part, split=split)
        assert [(r.name, r.group) for r in packed] == [(r.name, r.group) for r in read]
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(packed, read, strict=True))
        for half in ("dev", "test") if split == "valid" else ():
            packed = Recordings.load(corpus.parent / f"{part}_{split}.mulaw.npz", sample_rate=RATE, split=half)
            read = Recordings.load(corpus, sample_rate=RATE, part=part, split=half)
            assert [r.name for r in packed] == [r.name for r in read]


def test_a_pack_without_its_manifest(corpus, tmp_path):
    for name in ("piano_valid", "speech_valid"):
        pack = tmp_path / f"{name}.mulaw.npz"
        pack.write_bytes((corpus.parent / pack.name).read_bytes())
        assert len(Recordings.load(pack, sample_rate=RATE, split="valid")) == 12
    speech = Recordings.load(pack, sample_rate=RATE, split="dev", labels=VOICES)
    assert [r.name for r in speech] == [
        r.name for r in Recordings.load(corpus, sample_rate=RATE, part="speech", split="dev")
    ]
    with pytest.raises(AudioError, match="a pack needs its manifest.jsonl beside it to tell dev from test"):
        Recordings.load(tmp_path / "piano_valid.mulaw.npz", sample_rate=RATE, split="dev")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sample_rate": 8000}, "sample_rate must be 16000, as in .*; got 8000"),
        ({"companding": "linear"}, "companding must be mulaw"),
        ({"n_class": 128}, "n_class must be 256"),
    ],
)
def test_a_pack_is_not_converted(corpus, options, words):
    with pytest.raises(ValueError, match=words):
        Recordings.load(corpus.parent / "piano_train.mulaw.npz", **{"sample_rate": RATE, **options})


GOOD = {
    "codes": np.arange(10, dtype=np.uint8),
    "rate": RATE,
    "offsets": np.array([0, 4, 10]),
    "paths": np.array(["p/train/a.flac", "p/train/b.flac"]),
    "labels": np.array(["[]", '["x"]']),
}


class Canary:
    """Unpickling this would leave a file behind."""

    def __reduce__(self):
        return (Path("canary").touch, ())


@pytest.mark.parametrize(
    "change",
    [
        {"codes": np.arange(10.0)},
        {"codes": np.zeros((2, 5), np.uint8)},
        {"offsets": np.array([0, 4, 11])},
        {"offsets": np.array([0, 11, 10])},
        {"offsets": np.array([1, 4, 10])},
        {"offsets": np.array([0, 0, 10])},
        {"offsets": np.array([0, 10])},
        {"offsets": np.array([0.0, 4.0, 10.0])},
        {"labels": np.array(["[]"])},
        {"labels": np.array(["[]", "{"])},
        {"labels": np.array(["[]", "3"])},
        {"paths": np.array([1, 2])},
        {"rate": np.array([1, 2])},
        {"codes": None},
        {"codes": np.array([Canary()], dtype=object)},
        {"paths": np.array(["a", Canary()], dtype=object)},
    ],
    ids=lambda change: "-".join(f"{k}_{getattr(v, 'dtype', v)}" for k, v in change.items()),
)
def test_bad_packs(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", **GOOD)
    assert [r.codes.tolist() for r in Recordings.load("good.npz", sample_rate=RATE)] == [
        [0, 1, 2, 3],
        list(range(4, 10)),
    ]
    np.savez_compressed("bad.npz", **{k: v for k, v in {**GOOD, **change}.items() if v is not None})
    with pytest.raises(AudioError, match="bad.npz"):
        Recordings.load("bad.npz", sample_rate=RATE)
    assert not Path("canary").exists()


def test_mutated_packs(tmp_path):
    np.savez_compressed(tmp_path / "good.npz", **GOOD)
    whole = (tmp_path / "good.npz").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        bad = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        (tmp_path / "bad.npz").write_bytes(bad[: rng.integers(len(bad))] if rng.random() < 0.2 else bad)
        try:
            Recordings.load(tmp_path / "bad.npz", sample_rate=RATE)
        except ValueError:
            refused += 1
    assert refused > 100


def test_a_pack_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", **{**GOOD, "codes": np.zeros(1 << 20, np.uint8)})
    monkeypatch.setattr(data, "MAX_PACK_BYTES", 1 << 20)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", None)
    with pytest.raises(AudioError, match="may unpack to 1048576 bytes at most; it claims 10"):
        Recordings.load(tmp_path / "a.npz", sample_rate=RATE)


# ------------------------------------------------------------------------------------------------- groups and splits


def test_golden_splits():
    """A split must never change: a model would be tested on what an older one was trained on."""
    names = ["music21:bach/bwv846.mxl", "voice:allison", "voice:carlo", "a", "b", "take one", "é"]
    names += [f"g{n}" for n in range(20)]
    assert "".join(half_of(name)[0] for name in names) == "dtddtddtdddttttddtdttdtddtd"
    sides = {side: [name for name in names if split_of(name) == side] for side in ("dev", "test")}
    assert sides == {"dev": ["music21:bach/bwv846.mxl", "a", "take one", "g8", "g14"], "test": ["g4", "g7"]}


def test_shares_of_the_splits():
    count = Counter(split_of(f"group {n}") for n in range(20_000))
    assert set(count) == {"train", "dev", "test"}
    # Four standard deviations of a fair draw.
    assert abs(count["dev"] - 2000) < 170 and abs(count["test"] - 2000) < 170


def test_splits_are_disjoint_by_group_and_complete(corpus):
    for part in ("piano", "speech"):
        load = {
            s: Recordings.load(corpus, sample_rate=RATE, part=part, split=s) for s in ("train", "valid", "dev", "test")
        }
        groups = {s: {r.group for r in load[s]} for s in load}
        names = {s: [r.name for r in load[s]] for s in load}
        assert not groups["dev"] & groups["test"]
        assert sorted(names["dev"] + names["test"]) == sorted(names["valid"])
        assert not set(names["train"]) & set(names["valid"]) and min(len(n) for n in names.values()) > 0
        assert len(names["train"]) + len(names["valid"]) == sum(entry["part"] == part for entry in CORPUS)
        if part == "piano":
            assert not groups["train"] & groups["valid"]


def test_a_manifest_without_splits_is_split_by_group(tmp_path):
    takes = ("hard", "soft", "1", "2", "b")
    rows = [
        {"path": f"{n}_{t}.flac", "source": f"pack:drums/{'abcdefghijklmnopqrst'[n] * 4}_{t}.wav"}
        for n in range(20)
        for t in takes
    ]
    for entry in rows:
        soundfile.write(tmp_path / entry["path"], tone(0.01), RATE)
    (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(entry) for entry in rows))
    sides = {s: {r.group for r in Recordings.load(tmp_path, sample_rate=RATE, split=s)} for s in ("train", "valid")}
    assert len(sides["train"]) + len(sides["valid"]) == 20 and not sides["train"] & sides["valid"]


def test_an_empty_side_says_so(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"path": "a.flac", "split": "train"}')
    with pytest.raises(
        AudioError, match=r"split 'dev' holds none of the 1 recordings \(dev 0, test 0, train 1, valid 0\)"
    ):
        Recordings.load(tmp_path, sample_rate=RATE, split="dev")


def test_a_manifests_own_dev_and_test_stand(tmp_path):
    rows = [{"path": f"{name}.flac", "split": name} for name in ("dev", "test", "extra")]
    for entry in rows:
        soundfile.write(tmp_path / entry["path"], tone(0.01), RATE)
    (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(entry) for entry in rows))
    names = {
        s: [r.name for r in Recordings.load(tmp_path, sample_rate=RATE, split=s)] for s in ("dev", "valid", "extra")
    }
    assert names == {"dev": ["dev.flac"], "valid": ["dev.flac", "test.flac"], "extra": ["extra.flac"]}


SOUNDS = "minetest-data:usr/share/games/minetest/sounds"


@pytest.mark.parametrize(
    "entry, groups",
    [
        (row("piano", "train", 0, "music21:bach/bwv846.mxl + fluid-soundfont-gm"), ["music21:bach/bwv846.mxl"]),
        (row("piano", "train", 1, "music21:bach/bwv846.mxl + csound-soundfont"), ["music21:bach/bwv846.mxl"]),
        (row("speech", "train", 0, "pack:a/b.g722", ["en", "allison"]), ["voice:allison"]),
        (row("tags_src", "train", 0, f"{SOUNDS}/snow_footstep.1.ogg"), ["minetest-data:sounds:snow footstep"]),
        (row("tags_src", "train", 0, f"{SOUNDS}/SnowFootstep2_hard.ogg"), ["minetest-data:sounds:snow footstep"]),
        (row("tags", "valid", 0, f"{SOUNDS}/door_2.ogg | {SOUNDS}/axe.ogg | {SOUNDS}/door_1.ogg"),
         ["minetest-data:sounds:axe", "minetest-data:sounds:door"]),
        (row("tags", "valid", 0, "font:program 24 phrase 1"), ["font:program 24"]),
        (row("pitch", "valid", 0, "font:programs [73, 0]"), ["font:program 0", "font:program 73"]),
        (row("tags", "valid", 0, "font:programs []"), ["font::programs"]),
        ({"path": "music/prelude.flac", "source": "fluid-soundfont-gm program 0"}, ["music/prelude"]),
        ({"path": "LJ/LJ001-0002.wav"}, ["LJ/LJ001-0002"]),
        ({"path": "a.wav", "group": "mine", "source": f"{SOUNDS}/axe.ogg"}, ["mine"]),
    ],
)  # fmt: skip
def test_groups(entry, groups):
    assert list(groups_of(entry)) == groups


def test_a_mixture_of_both_sides_is_on_neither():
    dev, test = (
        next(f"word{c * 3}" for c in "abcdefghij" if half_of(f"p:d:word{c * 3}") == side) for side in ("dev", "test")
    )
    both = row("tags", "valid", 0, f"p:d/{dev}.ogg | p:d/{test}.ogg")
    alone = row("tags", "valid", 0, f"p:d/{dev}1.ogg | p:d/{dev}2.ogg")
    assert data._splits_of(both) == {"valid"} and data._splits_of(alone) == {"valid", "dev"}


# -------------------------------------------------------------------------------------------------------------- cut


@pytest.mark.parametrize("fraction", [0.5, 0.8, 0.001, 0.999])
def test_cut_divides_each_recording_in_time(fraction):
    whole = counting(1000, 17, 1)
    head, tail = whole.cut(fraction)
    assert head.n_sample + tail.n_sample == whole.n_sample
    for one in whole:
        parts = [r.codes for side in (head, tail) for r in side if r.name == one.name]
        assert torch.equal(torch.cat(parts), one.codes)
        assert [r.group for side in (head, tail) for r in side if r.name == one.name][0] == one.group
    assert len(next(r for r in head if r.name == "r0").codes) == round(1000 * fraction)
    assert (head.sample_rate, head.companding, head.n_class) == (RATE, "mulaw", 256)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, math.nan])
def test_cut_refuses(fraction):
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1"):
        counting(10).cut(fraction)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_a_name_that_is_no_text_is_read_and_has_a_side(tmp_path):
    names = [*(f"{i}.wav" for i in range(12)), "caf\udce9.wav"]
    for name in names:
        write_audio(tmp_path / name, torch.linspace(-1, 1, 100), RATE)
    sides = [Recordings.load(tmp_path, sample_rate=RATE, split=side) for side in ("train", "valid")]
    assert sorted(r.name for side in sides for r in side) == sorted(names)
    assert "13 recordings" in data.in_words((r.name, r.codes) for side in sides for r in side)


@pytest.mark.parametrize(
    ("lengths", "fraction", "text"),
    [((1,), 0.8, "r0: too short, nothing is left to test on"), ((1, 2), 0.1, "2 recordings: .* left to train on")],
)
def test_cut_refuses_what_has_one_side_alone(lengths, fraction, text):
    with pytest.raises(ValueError, match=text):
        counting(*lengths).cut(fraction)


def test_cut_refuses_a_local_condition():
    one = Recording("a", torch.zeros(10, dtype=torch.uint8), "a", condition=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="without a local condition"):
        Recordings([one], sample_rate=RATE).cut(0.5)


def test_recordings_are_a_sequence():
    some = counting(5, 6, 7)
    assert len(some[1:]) == 2 and some[1:].n_sample == 13 and some[-1].name == "r2"
    assert some[0] in some and [r.name for r in reversed(some)] == ["r2", "r1", "r0"]


# -------------------------------------------------------------------------------------------------------------- crops


def test_crops_are_pieces_of_the_recordings():
    some = counting(500, 40, 3, 1)
    crops = Crops(some, batch=16, length=50, context=30, seed=3)
    padded = [torch.cat([torch.full((100,), 128, dtype=torch.uint8), r.codes]) for r in some]
    for step in range(40):
        batch = crops(step)
        assert batch.shape == (16, 81) and batch.dtype == torch.uint8
        for codes, which, first in zip(batch, *crops.places(step), strict=True):
            assert torch.equal(codes, padded[which][100 + first - 31 : 100 + first + 50])
            assert first + 50 <= len(some[which].codes), "targets end within the recording"
            assert first >= 0 or len(some[which].codes) < 50, "silence is a target only where there is no choice"


def test_context_never_leaks_across_recordings():
    crops = Crops(counting(60, 200, 31), batch=64, length=20, context=100, seed=1)
    for step in range(30):
        batch = crops(step).long()
        recording = torch.where(batch == 128, -1, (batch - 1) // 10)
        for codes, index in zip(recording, crops.places(step)[0], strict=True):
            assert set(codes.tolist()) <= {-1, index}
            heard = (codes >= 0).nonzero()[0]
            assert (codes[heard:] == index).all(), "silence lies only to the left"


def test_crops_are_a_pure_function_of_seed_and_step():
    some = counting(5000, 70)
    first = Crops(some, batch=4, length=50, context=10, seed=7)
    wanted = [first(step) for step in range(20)]
    np.random.seed(0), torch.manual_seed(0)
    again = Crops(some, batch=4, length=50, context=10, seed=7)
    for step in (13, 0, 19, 13, 5):
        assert torch.equal(again(step), wanted[step]), "resuming at a step gives that step's crops"
    other = Crops(some, batch=4, length=50, context=10, seed=8)
    assert sum(torch.equal(other(step), wanted[step]) for step in range(20)) == 0
    assert len({tuple(w.flatten().tolist()) for w in wanted}) == 20
    for seed, step in (((1 << 64) - 1, 3), (0, (1 << 64) - 1)):
        assert torch.equal(*(Crops(some, batch=4, length=50, context=10, seed=seed)(step) for _ in range(2)))


def test_golden_crops():
    """A resumed training must go on with the same crops, whatever versions of numpy it was begun and resumed with."""
    crops = Crops(counting(5000, 70, 1000), batch=4, length=50, context=10, seed=7)
    assert [crops.places(step) for step in (0, 1, 1_000_000)] == [
        ([2, 0, 0, 0], [209, 2529, 468, 1767]),
        ([2, 0, 0, 0], [268, 3122, 4324, 2276]),
        ([0, 0, 2, 0], [4122, 1080, 913, 1429]),
    ]


def test_a_batch_owns_its_memory():
    some = counting(100)
    crops = Crops(some, batch=2, length=50, context=10)
    before = crops(0)
    crops(0).zero_()
    assert torch.equal(crops(0), before) and torch.equal(some[0].codes, counting(100)[0].codes)


def test_coverage_is_uniform():
    sizes, length, steps, batch = (3000, 700, 2000, 30), 100, 400, 256
    crops = Crops(counting(*sizes), batch=batch, length=length, context=5, seed=0)
    cover = [np.zeros(n) for n in sizes]
    for step in range(steps):
        for which, first in zip(*crops.places(step), strict=True):
            cover[which][max(first, 0) : first + length] += 1
    mean = steps * batch * length / sum(sizes)  # how often each sample would be a target were all alike
    for counts, size in zip(cover, sizes, strict=True):
        if size < length:
            assert (counts == counts[0]).all() and counts[0] > 0
            continue
        # Further than `length` from both ends all samples are alike; crops that do not overlap are independent draws.
        inner = counts[length:-length]
        assert np.abs(inner[::length] / mean - 1).max() < 4.5 / math.sqrt(mean)
        assert inner.mean() / mean == pytest.approx(1, abs=0.03)
        # A recording's share is its share of the samples, and its ends get at least half of the mean.
        assert counts.mean() / mean == pytest.approx(1, abs=0.05)
        ends = np.concatenate([counts[:length], counts[-length:]]) / mean
        assert 0.4 < ends.min() < 0.65 and 1.3 < ends.max() < 1.6


@pytest.mark.parametrize("sizes", [(9000, 900, 90, 10), (1, 1, 2, 1)])
def test_the_share_of_a_recording_is_its_share_of_the_samples(sizes):
    crops = Crops(counting(*sizes), batch=1000, length=100, context=0, seed=2)
    count = Counter(which for step in range(100) for which in crops.places(step)[0])
    assert sum(count.values()) == 100_000
    for index, size in enumerate(sizes):
        wanted = 100_000 * size / sum(sizes)
        assert abs(count[index] - wanted) < 4.5 * math.sqrt(wanted)


def test_crops_of_16_bit_codes():
    one = Recording("a", torch.full((10,), 5, dtype=torch.int32), "a")
    crops = Crops(
        Recordings([one], sample_rate=RATE, companding="linear", n_class=65536), batch=1, length=12, context=2
    )
    assert crops(0).dtype == torch.int32 and crops(0).tolist() == [[32768] * 5 + [5] * 10]
    assert crops.audio(0).tolist() == [[0.0] * 2 + [5 / 32768 - 1] * 10]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"length": 0}, "length must be at least 1"),
        ({"context": -1}, "context must be at least 0"),
        ({"seed": -1}, r"seed must be in 0 .. 2\*\*64 - 1; got -1"),
        ({"recordings": counting(0, 0)}, "recordings must hold at least one sample"),
        ({"recordings": counting()}, "recordings must hold at least one sample"),
    ],
)
def test_wrong_crops(options, words):
    with pytest.raises(ValueError, match=words):
        Crops(**{"recordings": counting(100), "batch": 1, "length": 10, "context": 5, **options})
    with pytest.raises(ValueError, match="step must be in 0"):
        Crops(counting(10), batch=1, length=1, context=0)(-1)


def test_importing_the_package_imports_nothing_optional():
    code = "import sys, audiomodels; print([m for m in ('torch', 'numpy', 'soundfile', 'soxr') if m in sys.modules])"
    path = str(Path(data.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

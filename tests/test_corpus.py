"""The corpus builder on a miniature: made-up packages, a stand-in for fluidsynth, no network."""

import json
import os
import random
import struct

import numpy as np
import pytest

pytest.importorskip("soundfile")
pytest.importorskip("scipy")
import soundfile
from audiomodels.corpus import builder, labels, piano, pitch, tags, tools
from audiomodels.corpus.builder import CorpusConfig
from audiomodels.corpus.recipe import FREE
from audiomodels.corpus.tools import CorpusError, write_midi
from audiomodels.data import Recordings, groups_of, voice_sides
from audiomodels.tag_data import HELD_OUT_PROGRAMS, TagClips

RATE = 8000
PIECES = [f"composer{i % 2}/piece{i}.mxl" for i in range(6)]
VOICES = ("ann", "bob", "eve")
SOUNDS = {  # file: the labels it should get
    **{f"dog {name} {take}.wav": {"Canidae", "Animal"} for name in ("rex", "fido", "lux") for take in ("soft", "hard")},
    **{f"{name}-engine.wav": {"Engine", "Vehicle_or_machine"} for name in ("old", "new", "odd", "blue", "red")},
    "crow.wav": {"Bird", "Animal"},  # Crow alone has too few
}


@pytest.fixture
def cache(tmp_path):
    """Packages as they are once unpacked: three voices (one clip twice, one silent, one broken), a soundfont."""
    folder, rng = tmp_path / "cache", np.random.default_rng(0)
    for voice in VOICES:
        sounds = folder / f"voice-{voice}/sounds"
        sounds.mkdir(parents=True)
        for i in range(3):
            clip = np.concatenate([np.zeros(4000), 0.1 * rng.standard_normal(9000), np.zeros(8000)])
            soundfile.write(sounds / f"word {i}.wav", clip, 16000)
        soundfile.write(sounds / "word 2 again.wav", clip, 16000)
        soundfile.write(sounds / "silence.wav", np.zeros(16000), 16000)
        (sounds / "broken.wav").write_bytes(b"RIFF")
        (folder / f"voice-{voice}/.done").touch()
    font = folder / "fluid-soundfont-gm" / builder.SOUNDFONTS["fluid-soundfont-gm"][0]
    font.parent.mkdir(parents=True)
    font.touch()
    (folder / "fluid-soundfont-gm/.done").touch()
    return folder


@pytest.fixture
def recipe(tmp_path):
    speech = [
        {"package": f"voice-{v}", "glob": "sounds/*.wav", "language": "en", "speaker": v, "license": "CC0"}
        for v in VOICES
    ]
    piano = [{"soundfont": "fluid-soundfont-gm", "minutes": 100, "max_seconds": 20, "pieces": PIECES}]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"name": "tiny", "valid_fraction": 0.4, "piano": piano, "speech": speech}))
    return path


@pytest.fixture
def fluidsynth(tmp_path, monkeypatch):
    """A program that writes six seconds of noise where fluidsynth would write sound; scores of 40 notes."""
    program = tmp_path / "bin/fluidsynth"
    program.parent.mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal((6 * 48000, 2))
    soundfile.write(tmp_path / "noise.wav", noise, 48000)
    program.write_text(f"""#!/bin/sh
while [ $# -gt 1 ]; do
  [ "$1" = -F ] && out=$2
  shift
done
[ "$(head -c 4 "$1")" = MThd ] && cp {tmp_path}/noise.wav "$out"
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(piano, "candidates", lambda block: [(f"music21:{p}", p) for p in block["pieces"]])
    monkeypatch.setattr(piano, "score_notes", lambda path: [(i / 2, i / 2 + 0.5, 60 + i % 7) for i in range(40)])


@pytest.fixture
def sounds(cache):
    """A package of effects, a second each but for a longer one, one under another licence, one that has no label."""
    rng = np.random.default_rng(1)
    for package, names in {"sounds": [*SOUNDS, "nothing.wav"], "copyleft": ["cat.wav", "green cat.wav"]}.items():
        (cache / package / "s").mkdir(parents=True)
        for name in names:
            clip = 0.1 * rng.standard_normal((5 if name == "crow.wav" else 1) * 16000)
            soundfile.write(cache / package / "s" / name, clip, 16000)
        (cache / package / ".done").touch()
    return {
        "clip_seconds": 2.0,
        "clips": {"train": 60, "valid": 40},
        "min_groups": 2,
        "without": ["GPL"],
        "effects": [
            {"package": "sounds", "glob": "s/*.wav", "license": "CC0-1.0", "licenses": {"*/old-*": "MIT"}},
            {
                "package": "copyleft",
                "glob": "s/*.wav",
                "license": "CC0-1.0",
                "licenses": {"*/*cat.wav": "GPL-2.0-only"},
            },
        ],
    }


def rows_of(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def built(tmp_path, cache, recipe, name="corpus", **options):
    builder.build(CorpusConfig(out=tmp_path / name, cache=cache, recipe=recipe, rate=RATE, jobs=1, **options))
    return tmp_path / name


def test_speech(tmp_path, cache, recipe, capsys):
    out = built(tmp_path, cache, recipe, parts=("speech",), pack=True)
    rows, sides = rows_of(out), voice_sides({f"voice:{v}" for v in VOICES})
    assert len(rows) == 9  # nothing silent, broken or twice
    assert capsys.readouterr().err.count("skipped") == 3
    for row in rows:
        assert row["split"] == sides[row["group"]] and row["group"] == f"voice:{row['labels'][1]}"
        audio, rate = soundfile.read(out / row["path"])
        assert rate == RATE and len(audio) / RATE == pytest.approx(row["seconds"], abs=1e-3)
        assert 0.5625 <= row["seconds"] < 0.72 and 0.2 < np.abs(audio).max() <= 0.81  # silence cut, level even
    assert {row["split"] for row in rows} == {"train", "dev", "test"}
    packed = Recordings.load(out / "speech_test.mulaw.npz", sample_rate=RATE, split="test")
    plain = Recordings.load(out, sample_rate=RATE, split="test", part="speech")
    assert [r.group for r in packed] == [r.group for r in plain] and len(packed) == 3
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(packed, plain, strict=True))
    facts = json.loads((out / "sources.json").read_text())
    assert facts["rate"] == RATE and set(facts["debian"]) == {f"voice-{v}" for v in VOICES}
    assert not (out / ".work").exists()


def test_piano(tmp_path, cache, recipe, fluidsynth):
    out = built(tmp_path, cache, recipe, parts=("piano",))
    rows = rows_of(out)
    assert [row["source"] for row in rows] == [f"music21:{piece} + fluid-soundfont-gm" for piece in PIECES]
    held_out = [row for row in rows if row["split"] != "train"]
    seconds = {split: sum(row["seconds"] for row in rows if row["split"] == split) for split in ("dev", "test")}
    assert 2 <= len(held_out) <= 3 and min(seconds.values()) > 0
    assert abs(seconds["dev"] - seconds["test"]) <= max(row["seconds"] for row in held_out)  # they grow alike
    notes = [json.loads(line) for line in (out / "notes.jsonl").read_text().splitlines()]
    assert [n["path"] for n in notes] == [row["path"] for row in rows] and len(notes[0]["notes"]) == 40
    audio, _ = soundfile.read(out / rows[0]["path"])
    assert 0.5 <= np.abs(audio).max() <= 0.9
    again = built(tmp_path, cache, recipe, name="again", parts=("piano",))
    for path in sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file()):
        assert (again / path).read_bytes() == (out / path).read_bytes(), path


def test_data_takes_the_splits(tmp_path, cache, recipe, fluidsynth):
    out = built(tmp_path, cache, recipe)
    groups = {s: {r.group for r in Recordings.load(out, sample_rate=RATE, split=s)} for s in ("train", "dev", "test")}
    assert all(groups.values())
    assert not (groups["train"] & groups["dev"] or groups["train"] & groups["test"] or groups["dev"] & groups["test"])


def test_labels_are_read_from_file_names():
    for name, domain, want in (
        ("FootStepGrass1.ogg", "fx", ["Footsteps"]),
        ("wolf-hit.wav", "fx", ["Canidae"]),  # a voice, not a thud
        ("Door_Glass.ogg", "fx", ["Door"]),
        ("hairdryer.wav", "fx", []),  # no hair in it is "air", no "hen" in "when"
        ("footsteps/gravel3.ogg", "fx", ["Footsteps"]),
        ("Ride-bell-soft.wav", "drum", ["Ride_cymbal"]),
        ("bd_808.flac", "drum", ["Bass_drum"]),
        ("kitchen.wav", "drum", []),
        ("HiHat_open2.flac", "drum", ["Hi-hat"]),
    ):
        assert labels.labels_of(f"package:a/{name}", domain) == want, name
    assert labels.broader("Crow") == {"Bird", "Animal"} and not labels.broader("Alarm")
    known = {label for rules in labels.DOMAINS.values() for label, _ in rules} | {f[2] for f in labels.FAMILIES}
    for parent, children in labels.BROADER.items():
        assert set(children.split()) <= known | set(labels.BROADER) | {"Speech"}, parent


def test_the_free_recipe_has_nothing_under_the_gpl():
    """Every source names its licences; those that are GPL alone are not even downloaded."""
    for source in FREE["tags"]["effects"]:
        kept = {source["license"], *source.get("licenses", {}).values()}
        assert any("GPL" not in license_ for license_ in kept), source["package"]
    assert FREE["tags"]["without"] == ["GPL"] and not any("GPL" in source["license"] for source in FREE["speech"])
    packages = {source["package"] for source in FREE["tags"]["effects"]}
    assert packages.isdisjoint({"qabcs-data", "tuxpaint-stamps-default", "wesnoth-1.16-data", "supertux-data"})
    drums = next(source for source in FREE["tags"]["effects"] if source["package"] == "hydrogen-drumkits")
    of = {kit: tags.license_of(drums, f"x:usr/share/hydrogen/data/drumkits/{kit}/a.wav") for kit in ("Audiophob", "Z")}
    assert of == {"Audiophob": "CC0-1.0", "Z": "GPL-2.0-only"}  # a kit that is not named counts as GPL


def test_tags(tmp_path, cache, recipe, sounds):
    recipe.write_text(json.dumps({"name": "tiny", "valid_fraction": 0.4, "tags": sounds}))
    out = built(tmp_path, cache, recipe, parts=("tags",))
    rows = {part: [row for row in rows_of(out) if row["part"] == part] for part in ("tags", "tags_src")}
    groups = {split: {g for row in rows["tags"] if row["split"] == split for g in groups_of(row)}
              for split in ("train", "valid")}  # fmt: skip
    assert not groups["train"] & groups["valid"] and len(groups["valid"]) == 2  # a dog and an engine
    assert len({g for g in groups["train"] | groups["valid"] if "dog" in g}) == 3  # takes are one group
    sizes = [row["detail"]["events"] for row in rows["tags"]]
    assert len(sizes) == 100 and 30 <= sizes.count(1) <= 65 and 3 <= sizes.count(3) <= 30
    for row in rows["tags"]:
        keys = row["source"].split(" | ")
        want = set().union(*(SOUNDS[key.removeprefix("sounds:s/")] for key in keys))
        assert set(row["labels"]) == want and row["seconds"] == 2.0 and len(keys) == row["detail"]["events"]
        assert row["license"] == " AND ".join(sorted({"MIT" if "old-" in key else "CC0-1.0" for key in keys}))
        audio, _ = soundfile.read(out / row["path"])
        assert 10 ** (-15.1 / 20) < np.abs(audio).max() < 10 ** (-0.9 / 20)
        sounding = np.abs(audio) > 1e-3
        assert ("crow" in row["source"]) or sounding.mean() < 0.55 * len(keys)  # a second of each
    assert {row["split"] for row in rows["tags_src"]} == {"train"}
    assert {groups_of(row)[0] for row in rows["tags_src"]} == groups["train"]
    assert "nothing" not in str(rows) and "copyleft" not in str(rows)
    assert all(row["seconds"] <= 4.0 for row in rows["tags_src"])
    assert json.loads((out / "labels.json").read_text()) == {"tags": sorted(set().union(*SOUNDS.values()))}
    halves = [TagClips.load(out, split=split, sample_rate=RATE) for split in ("train", "dev", "test")]
    assert len(halves[0]) == 60 and 0 < len(halves[1]) + len(halves[2]) <= 40
    again = built(tmp_path, cache, recipe, name="again", parts=("tags",))
    assert (again / "manifest.jsonl").read_bytes() == (out / "manifest.jsonl").read_bytes()
    assert all((again / row["path"]).read_bytes() == (out / row["path"]).read_bytes() for row in rows["tags"])


def test_voices_among_the_sounds_stay_on_their_side(tmp_path, cache, recipe, sounds):
    speech = json.loads(recipe.read_text())["speech"]
    recipe.write_text(
        json.dumps({"name": "x", "valid_fraction": 0.4, "speech": speech, "tags": {**sounds, "speech_clips": 9}})
    )
    out = built(tmp_path, cache, recipe, parts=("speech", "tags"))
    side = voice_sides({f"voice:{v}" for v in VOICES})
    spoken = [row for row in rows_of(out) if row["part"] in ("tags", "tags_src") and "voice:" in row["source"]]
    assert len(spoken) > 20
    for row in spoken:
        assert {"Speech", "Human_sound"} <= set(row["labels"])
        for group in groups_of(row):
            if group.startswith("voice:"):
                assert (side[group] == "train") == (row["split"] == "train")
    mixed = [key for row in spoken for key in row["source"].split(" | ") if key.startswith("voice:")]
    clips = {row["path"].split("/", 2)[2] for row in rows_of(out) if row["part"] == "speech"}
    assert {key.removeprefix("voice:") + ".flac" for key in mixed} <= clips


def test_phrases_have_the_label_of_their_instrument(tmp_path, cache, recipe, sounds, monkeypatch):
    """Each program plays in its own time: the sheet's sound is a ramp, so a clip tells where it was cut."""
    midi = {}
    monkeypatch.setattr(tags, "write_midi", lambda path, notes, programs: midi.update(notes=notes, programs=programs))
    monkeypatch.setattr(tags, "synthesize", lambda *args, **options: 0.1 + np.arange(2000 * RATE) / 1e8)
    sounds |= {"effects": [], "instruments": {"soundfont": "fluid-soundfont-gm", "phrases": 2}}
    recipe.write_text(json.dumps({"name": "x", "valid_fraction": 0.4, "tags": sounds}))
    out = builder.Build(
        CorpusConfig(out=tmp_path / "x", cache=cache, jobs=1, rate=RATE), json.loads(recipe.read_text())
    )
    found = tags.phrases(out, sounds["instruments"], random.Random(0))
    out.close()
    assert len(found) == len(midi["programs"]) == 2 * sum(last - first + 1 for first, last, _ in labels.FAMILIES)
    for sound, (change, _, program) in zip(found, midi["programs"], strict=True):
        assert sound.key.startswith(f"fluid-soundfont-gm:program {program} phrase")
        assert [name for first, last, name in labels.FAMILIES if first <= program <= last] == sound.labels
        start = (sound.audio[0] - 0.1) * 1e8 / RATE
        notes = [note for note in midi["notes"] if start <= note[0] < start + 2.4]
        assert change < start < notes[0][0] and notes[-1][1] < start + 2.4 and len(notes) >= 2
        assert all((28 if "Bass_guitar" in sound.labels else 48) <= note[2] <= 96 for note in notes)


def test_pitch(tmp_path, cache, recipe, monkeypatch):
    """Every note becomes a sine: a clip sounds where its labels say, and nowhere else."""
    sheets = {}

    def sines(path, soundfont, rate, **options):
        audio, time = np.zeros(20 * rate), np.arange(20 * rate) / rate
        for onset, offset, note, _, _ in sheets[path]:
            audio += np.sin(2 * np.pi * 440 * 2 ** ((note - 69) / 12) * time) * ((time >= onset) & (time < offset))
        return 0.1 * audio

    def remember(path, notes, controls, programs):
        sheets[path] = notes
        path.touch()
        assert len(controls) == len(programs)  # every channel is silenced before its instrument changes

    monkeypatch.setattr(pitch, "write_midi", remember)
    monkeypatch.setattr(pitch, "synthesize", sines)
    monkeypatch.setattr(pitch, "SHEET", 8)
    block = {"soundfont": "fluid-soundfont-gm", "clips": {"train": 12, "valid": 30}, "programs": [0, 16, 73]}
    recipe.write_text(json.dumps({"name": "x", "valid_fraction": 0.4, "pitch": [block]}))
    out = built(tmp_path, cache, recipe, parts=("pitch",))
    rows = rows_of(out)
    assert [row["split"] for row in rows] == ["train"] * 12 + ["valid"] * 30
    assert len({len(row["labels"]) for row in rows}) >= 4
    for row in rows:
        audio, _ = soundfile.read(out / row["path"])
        assert len(audio) == RATE and 10 ** (-15.1 / 20) < np.abs(audio).max() < 10 ** (-0.9 / 20)
        power = np.abs(np.fft.rfft(audio * np.hanning(RATE))) ** 2  # a bin is one Hz
        near = np.zeros(len(power), bool)
        for note in row["labels"]:
            hz = round(440 * 2 ** ((note - 69) / 12))
            assert power[hz - 1 : hz + 2].max() > 0.02 * power.max(), (row["labels"], note)
            near[max(0, hz - 6) : hz + 7] = True
        assert power[~near].sum() < 0.05 * power.sum()
    assert json.loads((out / "labels.json").read_text())["pitch"] == list(range(28, 101))
    unseen = TagClips.load(out, split="unseen", part="pitch", sample_rate=RATE)
    assert len(unseen) == sum(row["source"].endswith("[73]") for row in rows) and 73 in HELD_OUT_PROGRAMS


def test_midi_bytes(tmp_path):
    """One note of a quarter second: the file by the book."""
    write_midi(tmp_path / "x.mid", [(0.0, 0.25, 60, 100, 0)], [(0.0, 0, 64, 127)], [(0.0, 0, 4)], tail=0.5)
    track = bytes([0, 0xFF, 0x51, 3, 0x07, 0xA1, 0x20])  # 500,000 microseconds a quarter note
    track += bytes([0, 0xC0, 4, 0, 0xB0, 64, 127, 0, 0x90, 60, 100])
    track += bytes([0x83, 0x60, 0x80, 60, 0])  # 480 ticks later
    track += bytes([0x87, 0x40, 0xFF, 0x2F, 0])  # 960 ticks later
    head = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 960) + b"MTrk" + struct.pack(">I", len(track))
    assert (tmp_path / "x.mid").read_bytes() == head + track


def test_a_performance_can_be_played():
    """Within its time, one note of a key at a time, louder on top, the same from the same seed."""
    score = [(i / 4, i / 4 + 1.0, 48 + 12 * (i % 3)) for i in range(200)] + [(0.0, 2.0, 90)]
    played, controls = piano.perform(sorted(score), random.Random(3), 20.0)
    assert played == piano.perform(sorted(score), random.Random(3), 20.0)[0]
    assert played == sorted(played) and 20 < len(played) < 201
    for onset, offset, _, velocity, _ in played:
        assert 0 <= onset < offset <= 20.0 and 20 <= velocity <= 118
    for key in {note[2] for note in played}:
        mine = [note for note in played if note[2] == key]
        for first, second in zip(mine, mine[1:], strict=False):
            assert first[1] <= second[0] or first[1] - first[0] == pytest.approx(0.03)
    assert all(0 <= time <= 20.0 for time, *_ in controls)


def test_trim_and_rate():
    audio = np.concatenate([np.zeros(RATE), 0.5 * np.ones(RATE), np.zeros(RATE)]).astype(np.float32)
    assert len(tools.trim(audio, RATE, pad=0.05)) == RATE + 2 * int(0.05 * RATE)
    assert len(tools.trim(np.zeros(RATE), RATE)) == 0
    stereo = np.stack([audio, -audio], 1)
    assert not tools.to_rate(stereo, RATE, RATE).any()
    tone = np.sin(np.arange(16000) * 0.05)
    down = tools.to_rate(tone, 16000, 8000)
    assert len(down) == 8000 and np.abs(down[100:-100] - tone[200:-200:2]).max() < 0.01


def test_what_is_missing_is_named(tmp_path, cache, recipe, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match="apt-get is missing: apt-get install -y --no-install-recommends apt"):
        built(tmp_path, tmp_path / "empty", recipe, parts=("speech",))
    monkeypatch.setattr(piano, "candidates", lambda block: [("music21:a/b.mxl", "")])
    monkeypatch.setattr(piano, "score_notes", lambda path: [(i, i + 1, 60) for i in range(40)])
    with pytest.raises(CorpusError, match="fluidsynth is missing: apt-get install"):
        built(tmp_path, cache, recipe, name="b", parts=("piano",))
    (cache / "voice-ann/sounds/x.g722").write_bytes(bytes(16000))
    text = recipe.read_text().replace("sounds/*.wav", "sounds/*.g722")
    recipe.write_text(text)
    with pytest.raises(CorpusError, match="ffmpeg is missing"):
        built(tmp_path, cache, recipe, name="c", parts=("speech",))
    assert not list(tmp_path.glob("*/.work"))


def test_wrong_options(tmp_path, cache, recipe):
    with pytest.raises(ValueError, match="parts must be among piano, speech, tags, pitch, got drums"):
        CorpusConfig(out=tmp_path, parts=("drums",))
    with pytest.raises(ValueError, match="quick, free and recipe exclude each other"):
        CorpusConfig(out=tmp_path, quick=True, free=True)
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        CorpusConfig(out=tmp_path, jobs=0)
    (tmp_path / "manifest.jsonl").touch()
    with pytest.raises(CorpusError, match="holds a corpus already"):
        builder.build(CorpusConfig(out=tmp_path, cache=cache))

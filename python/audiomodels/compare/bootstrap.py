"""Intervals of bits and accuracies over pieces, paired between models.

A score is a ratio of sums over units (pieces, utterances): nats / targets. The units are drawn again with replacement,
the same draws for every model, so that the interval of a difference is that of the paired difference (Efron &
Tibshirani, "An introduction to the bootstrap", 1993, chapter 13: the percentile interval).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
NATS, TOP1, TOP5, COUNT = range(4)  # columns of a unit's sums
Units = Mapping[str, list[float | None]]  # unit -> sums of nats (None: no distribution), hits, hits of five, targets


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """The smallest distance from 0 that the interval of a difference could have told from 0."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@lru_cache(maxsize=8)
def draws(n_unit: int) -> np.ndarray:
    """(RESAMPLES, n_unit): how often each unit is in each resample."""
    return np.random.default_rng(SEED).multinomial(n_unit, np.full(n_unit, 1 / n_unit), RESAMPLES).astype(np.float64)


def bits(units: Units) -> Estimate:
    """Bits per sample."""
    table = _table(units)
    return _estimate(_ratio(table, NATS) / math.log(2))


def accuracy(units: Units, column: int) -> Estimate:
    """Share of targets hit; column TOP1 or TOP5."""
    return _estimate(_ratio(_table(units), column))


def difference(a: Units, b: Units) -> Estimate:
    """Bits of a minus bits of b, over the units of both, which must be the same with the same targets."""
    if sorted(a) != sorted(b) or any(a[name][COUNT] != b[name][COUNT] for name in a):
        raise ValueError("a and b must have scored the same targets of the same units")
    return _estimate((_ratio(_table(a), NATS) - _ratio(_table(b), NATS)) / math.log(2))


def mean(runs: list[Units]) -> Units:
    """The mean over runs (seeds) of each unit's sums."""
    if any(sorted(run) != sorted(runs[0]) for run in runs):
        raise ValueError("runs must have scored the same units")
    return {name: np.mean([run[name] for run in runs], axis=0).tolist() for name in runs[0]}


def _table(units: Units) -> np.ndarray:
    """(n_unit, 4), sorted by name, so that equal units meet equal draws."""
    if not units:
        raise ValueError("units must hold at least one, got none")
    return np.array([units[name] for name in sorted(units)], np.float64)


def _ratio(table: np.ndarray, column: int) -> np.ndarray:
    """(1 + RESAMPLES,): the ratio to the targets of all units, and of each resample."""
    weights = np.vstack([np.ones(len(table)), draws(len(table))])
    return (weights @ table[:, column]) / (weights @ table[:, COUNT])


def _estimate(values: np.ndarray) -> Estimate:
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values[0]), float(low), float(high))

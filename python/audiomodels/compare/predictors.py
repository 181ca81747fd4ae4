"""The trivial rows of every table: what a next-sample model must beat before its figures mean anything.

    unigram     P(code), counted on train
    bigram      P(code | last code), counted on train
    repeat      the last code, and its neighbours +-1, +-2: a guess of five, no distribution
    linear      2 x[t-1] - x[t-2] in codes, and its neighbours: a guess of five, no distribution
    lpc         linear prediction of order 64 in the decoded amplitude, fitted on train (covariance method, float64);
                the code's distance from the predicted code has a histogram for each level of recent residual

Counts are smoothed by adding a constant. The residual histogram of lpc adapts backward, as in lossless audio coders:
which one applies is told by the mean size of the residuals of the samples before, so the decoder of a stream could
follow. Each distribution is over the codes 0 .. n_class - 1, sums to 1 and uses the past alone. All rows score the
positions of train.target_blocks, as train.evaluate does. Cost: a table look-up per target, and one filter for lpc.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from audiomodels import quantize
from audiomodels.train import Scores, Tally, target_blocks

__all__ = ["LPC", "all_rows", "bigram", "fitted", "linear", "lpc", "repeat", "total", "unigram"]

ORDER = 64
SMOOTHING = 0.5  # added to every count
MAX_CLASSES = 1024  # tables are n_class x n_class and more
MEMORY = 64  # samples that tell the recent residual, weighted 0.9 ** age
ZONES, LEAN = 16, 256  # zones of distance from silence; counts' worth of trust in the coarser histogram
PER_OCTAVE, LOWEST, LEVELS = 2, -4, 26  # levels of recent residual: half octaves from 1/4 of a quantisation step


def unigram(train: Any, test: Any, *, max_targets: int | None = None) -> Scores:
    """Scores on `test` of the code frequencies of `train` (data.Recordings)."""
    return total(_unigram(train, test), test, max_targets)


def bigram(train: Any, test: Any, *, max_targets: int | None = None) -> Scores:
    """Scores on `test` of the frequencies of codes after each code in `train`."""
    return total(_bigram(train, test), test, max_targets)


def repeat(test: Any, *, max_targets: int | None = None) -> Scores:
    """Top-1 of the last code and top-5 of those within 2 of it; bits are NaN."""
    return total(_repeat(test), test, max_targets)


def linear(test: Any, *, max_targets: int | None = None) -> Scores:
    """Top-1 of the line through the last two codes (clipped), and top-5 of those within 2 of it; bits are NaN."""
    return total(_linear(test), test, max_targets)


def lpc(train: Any, test: Any, *, max_targets: int | None = None, order: int = ORDER) -> Scores:
    """Scores on `test` of linear prediction fitted on `train`; see LPC."""
    return total(_lpc(train, test, order), test, max_targets)


def all_rows(train: Any, test: Any, *, max_targets: int | None = None) -> dict[str, Scores]:
    """The scores on `test` of every predictor of this file, by name."""
    return {name: total(row, test, max_targets) for name, row in fitted(train, test).items()}


# A predictor that was counted on train and is asked about test: (recording, start, stop) -> the log-probabilities
# (NaN: it has none) and ranks of that block of targets.
Fitted = Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor]]


def fitted(train: Any, test: Any) -> dict[str, Fitted]:
    """Every predictor of this file, by name, for blocks of `test`."""
    return {
        "unigram": _unigram(train, test),
        "bigram": _bigram(train, test),
        "repeat": _repeat(test),
        "linear": _linear(test),
        f"lpc{ORDER}": _lpc(train, test, ORDER),
    }


def total(row: Fitted, test: Any, max_targets: int | None = None) -> Scores:
    """Scores of a predictor on the target positions of `test`."""
    tally = Tally()
    for block in target_blocks(test, max_targets):
        tally.add(*row(*block))
    return tally.scores()


def _unigram(train: Any, test: Any) -> Fitted:
    return _by_table(unigram_table(train), test, lambda codes: np.zeros(len(codes), np.int64))


def _bigram(train: Any, test: Any) -> Fitted:
    return _by_table(bigram_table(train), test, lambda codes: _shifted(codes, 1, test.n_class))


def _repeat(test: Any) -> Fitted:
    return _around(test, lambda codes: _shifted(codes, 1, test.n_class))


def _linear(test: Any) -> Fitted:
    def line(codes: torch.Tensor) -> np.ndarray:
        return (2 * _shifted(codes, 1, test.n_class) - _shifted(codes, 2, test.n_class)).clip(0, test.n_class - 1)

    return _around(test, line)


def _lpc(train: Any, test: Any, order: int) -> Fitted:
    model = LPC(train, order=order)
    return _by_table(model.table, test, model.contexts)


def unigram_table(train: Any) -> np.ndarray:
    """(1, n_class) float64 probabilities."""
    _check(train)
    counts = sum(np.bincount(recording.codes.numpy(), minlength=train.n_class) for recording in train)
    return _normalised(counts[None] + SMOOTHING)


def bigram_table(train: Any) -> np.ndarray:
    """(n_class, n_class) float64: [last code, code]."""
    n_class = _check(train)
    pairs = sum(
        np.bincount(_shifted(r.codes, 1, n_class) * n_class + r.codes.numpy(), minlength=n_class**2) for r in train
    )
    return _normalised(pairs.reshape(n_class, n_class) + SMOOTHING)


class LPC:
    """Linear prediction with an adaptive residual histogram.

    p[t] = sum_k coefficients[k] s[t-1-k], s the decoded amplitude; q[t] its code. The histogram of c - q, counted on
    train, is that of the level of recent residual (mean |s - p| of the MEMORY samples before, in quantisation steps at
    p, in half octaves) and of q's distance from silence, in which mu-law's steps grow; left and right of silence are
    mirror images. The probability of code c is its count over the sum for the codes that exist: row level * n_class + q
    of `table`, (LEVELS * n_class, n_class) float64.
    """

    def __init__(self, train: Any, *, order: int = ORDER):
        self.n_class, self.companding, self.order = _check(train), train.companding, order
        codes = torch.arange(self.n_class, dtype=torch.int32)
        self.levels = quantize.decode(codes, self.companding, self.n_class).double().numpy()
        self.steps = np.gradient(self.levels)
        self.coefficients = self._fit(train)
        self.table = _normalised(self._histograms(train).reshape(LEVELS * self.n_class, self.n_class))

    def _histograms(self, train: Any) -> np.ndarray:
        """(LEVELS, n_class, n_class) smoothed counts: [level, q, code]."""
        last = self.n_class - 1
        q = np.arange(self.n_class)
        mirror = np.where(q < self.n_class // 2, -1, 1)
        zone = np.abs(q - self.n_class // 2) * ZONES // (self.n_class // 2 + 1)
        counts = np.zeros((LEVELS, ZONES, 2 * self.n_class - 1))
        for recording in train:
            level, predicted = np.divmod(self.contexts(recording.codes), self.n_class)
            distance = (recording.codes.numpy() - predicted) * mirror[predicted]
            np.add.at(counts, (level, zone[predicted], distance + last), 1)
        # what train hardly visits leans on the histogram of the whole level, and that on all of them together
        everywhere = _normalised(counts.sum((0, 1), keepdims=True) + SMOOTHING)
        whole_level = _normalised(counts.sum(1, keepdims=True) + LEAN * everywhere)
        counts += LEAN * whole_level
        return np.stack([counts[:, zone[i], (q - i) * mirror[i] + last] for i in q], axis=1)

    def _fit(self, train: Any) -> np.ndarray:
        """Least squares over all of train, silence before each recording; (order,) float64, the last sample first."""
        order = self.order
        gram = np.zeros((order + 1, order + 1))
        for recording in train:
            x, n = self._padded(recording.codes), len(recording.codes)
            if not n:
                continue
            row = np.correlate(x, x[:n])  # sum_t x[t] x[t + b]
            for a in range(order + 1):
                gram[a] += row
                if a < order:  # sum_t x[t + a + 1] x[t + b + 1]: one term less, one more
                    row = np.append(0.0, row[:-1] - x[a] * x[:order] + x[n + a] * x[n : n + order])
        gram = np.triu(gram) + np.triu(gram, 1).T
        # silence makes the system singular; 1e-9 of the power is below the quantisation noise
        ridge = 1e-9 * np.trace(gram) / (order + 1) + np.finfo(float).tiny
        past = gram[:-1, :-1] + ridge * np.eye(order)
        return np.linalg.solve(past, gram[:-1, -1])[::-1]

    def _padded(self, codes: torch.Tensor) -> np.ndarray:
        """The amplitudes, float64, with `order` samples of silence before them."""
        return np.concatenate([np.full(self.order, self.levels[self.n_class // 2]), self.levels[codes.numpy()]])

    def contexts(self, codes: torch.Tensor) -> np.ndarray:
        """codes (time,) -> (time,) rows of `table`; that of sample t depends on the samples before t alone."""
        padded = self._padded(codes)
        predicted = np.convolve(padded, self.coefficients)[self.order - 1 : self.order - 1 + len(codes)]
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        nearest = np.searchsorted(middles, predicted)
        residual = np.abs(padded[self.order :] - predicted)
        weights = 0.9 ** np.arange(MEMORY)
        recent = np.convolve(residual, weights / weights.sum())[: len(codes)]
        recent = np.concatenate([[0.0], recent[:-1]])[: len(codes)]
        octaves = np.log2(np.maximum(recent / self.steps[nearest], 2.0**-40))
        level = np.clip(np.floor(PER_OCTAVE * octaves).astype(np.int64) - LOWEST, 0, LEVELS - 1)
        return level * self.n_class + nearest


def _check(recordings: Any) -> int:
    if recordings.n_class > MAX_CLASSES:
        raise ValueError(f"predictors take at most {MAX_CLASSES} classes, got {recordings.n_class}")
    return recordings.n_class


def _shifted(codes: torch.Tensor, by: int, n_class: int) -> np.ndarray:
    """The code `by` samples earlier, int64; silence before the recording."""
    codes = codes.numpy().astype(np.int64)
    return np.concatenate([np.full(min(by, len(codes)), n_class // 2), codes[: max(0, len(codes) - by)]])


def _normalised(table: np.ndarray) -> np.ndarray:
    return table / table.sum(-1, keepdims=True)


def _by_table(table: np.ndarray, test: Any, contexts: Callable[[torch.Tensor], np.ndarray]) -> Fitted:
    """The distributions table[contexts(codes of a recording)]."""
    n_class = _check(test)
    if table.shape[1] != n_class:
        raise ValueError(f"train and test must have the same number of classes, got {table.shape[1]} and {n_class}")
    log_table, rank_table = torch.from_numpy(np.log(table)), torch.from_numpy(_ranks(table))
    rows = _remembered(test, contexts)

    def block(index: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        row, targets = torch.from_numpy(rows(index)[start:stop]), test[index].codes[start:stop].long()
        return log_table[row, targets], rank_table[row, targets]

    return block


def _around(test: Any, centres: Callable[[torch.Tensor], np.ndarray]) -> Fitted:
    """A guess of the five codes around centres(codes of a recording): the centre ranks first, the others after it."""
    _check(test)
    rows = _remembered(test, centres)

    def block(index: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        away = torch.from_numpy(
            np.abs(test[index].codes[start:stop].numpy().astype(np.int64) - rows(index)[start:stop])
        )
        return torch.full(away.shape, math.nan), torch.where(away <= 2, 2 * away, test.n_class)

    return block


def _remembered(test: Any, function: Callable[[torch.Tensor], np.ndarray]) -> Callable[[int], np.ndarray]:
    """function(codes of recording `index`), computed once for all blocks of a recording that follow each other."""
    return lru_cache(maxsize=1)(lambda index: function(test[index].codes))


def _ranks(table: np.ndarray) -> np.ndarray:
    """The rank of each class in its row, 0 = most probable; of equals the lower class first, as in train.ranks."""
    ranks = np.empty(table.shape, np.int32)
    order = np.argsort(-table, axis=-1, kind="stable").astype(np.int32)
    np.put_along_axis(ranks, order, np.arange(table.shape[1], dtype=np.int32)[None], -1)
    return ranks

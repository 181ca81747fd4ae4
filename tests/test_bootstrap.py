"""Intervals against closed forms."""

import math

import numpy as np
import pytest
from audiomodels.compare import bootstrap
from audiomodels.compare.bootstrap import TOP1, TOP5, Estimate


def units(nats, counts=None):
    """Units u000, u001, ... of these sums of nats; a fifth of the targets hit, half of them among five."""
    counts = [100] * len(nats) if counts is None else counts
    return {f"u{i:03d}": [float(v), c / 5, c / 2, c] for i, (v, c) in enumerate(zip(nats, counts, strict=True))}


def test_bits_are_nats_over_targets():
    e = bootstrap.bits(units([100, 300], [100, 300]))
    assert e.value == pytest.approx(1 / math.log(2)) and e.low == e.high == pytest.approx(e.value)
    e = bootstrap.bits(units([100, 900], [100, 300]))  # pooled over targets, not the mean of the pieces
    assert e.value == pytest.approx(1000 / 400 / math.log(2))
    assert (e.low, e.high) == (pytest.approx(1 / math.log(2)), pytest.approx(3 / math.log(2)))


def test_accuracy():
    for column, value in ((TOP1, 0.2), (TOP5, 0.5)):
        e = bootstrap.accuracy(units([1, 2, 3]), column)
        assert e.value == pytest.approx(value) and e.low == pytest.approx(e.high)


def test_width_is_that_of_the_mean():
    """With many equal units the interval is mean +- 1.96 standard errors."""
    rng = np.random.default_rng(1)
    nats = rng.normal(400, 40, 400)
    e = bootstrap.bits(units(nats))
    error = nats.std() / 20 / 100 / math.log(2)
    assert e.half_width == pytest.approx(1.96 * error, rel=0.05)
    assert (e.low + e.high) / 2 == pytest.approx(e.value, abs=0.1 * error)


def test_coverage():
    """About 95 of 100 intervals of 40 units hold the truth (binomial: 85 .. 100)."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        e = bootstrap.bits(units(rng.normal(400, 40, 40)))
        held += e.low <= 4 / math.log(2) <= e.high
    assert 85 <= held <= 100


def test_pairing():
    """A constant difference has no width, however much the pieces differ; unpaired it would."""
    rng = np.random.default_rng(3)
    nats = rng.normal(400, 40, 20)
    a, b = units(nats - 7), units(nats)
    e = bootstrap.difference(a, b)
    assert (e.value, e.low, e.high) == (pytest.approx(-0.07 / math.log(2)),) * 3
    assert e.excludes_zero and bootstrap.bits(a).half_width > 0.1
    shuffled = dict(reversed(b.items()))  # the order of the units does not matter
    assert bootstrap.difference(a, shuffled) == e
    e = bootstrap.difference(b, a)
    assert e.low > 0


def test_noise_does_not_exclude_zero():
    rng = np.random.default_rng(4)
    nats = rng.normal(400, 40, 20)
    e = bootstrap.difference(units(nats + rng.normal(0, 5, 20)), units(nats + rng.normal(0, 5, 20)))
    assert not e.excludes_zero
    assert Estimate(0.1, 0.0, 0.2).excludes_zero is False and Estimate(-0.1, -0.2, -0.01).excludes_zero


def test_mean_over_seeds():
    mean = bootstrap.mean([units([100, 200]), units([300, 400])])
    assert mean == units([200, 300])
    with pytest.raises(ValueError, match="same units"):
        bootstrap.mean([units([1]), units([1, 2])])


def test_wrong_units():
    with pytest.raises(ValueError, match="same targets of the same units"):
        bootstrap.difference(units([1, 2]), units([1]))
    with pytest.raises(ValueError, match="same targets of the same units"):
        bootstrap.difference(units([1], [100]), units([1], [101]))
    with pytest.raises(ValueError, match="at least one"):
        bootstrap.bits({})

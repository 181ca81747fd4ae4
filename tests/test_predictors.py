"""The trivial predictors against closed forms, hand-computed cases and the rules of shared positions."""

import math
import time

import numpy as np
import pytest
import torch
from audiomodels import quantize
from audiomodels.compare import predictors
from audiomodels.compare.predictors import LPC, bigram, linear, lpc, repeat, unigram
from audiomodels.data import Recording, Recordings
from audiomodels.train import target_blocks


def recordings(*codes, n_class=256, companding="linear"):
    dtype = quantize.code_dtype(n_class)
    rows = [Recording(str(i), torch.as_tensor(np.asarray(c)).to(dtype), str(i)) for i, c in enumerate(codes)]
    return Recordings(rows, sample_rate=16000, companding=companding, n_class=n_class)


def ar2(n, sigma, seed, a=(1.6, -0.8)):
    noise = np.random.default_rng(seed).normal(0, sigma, n)
    x = np.zeros(n)
    for t in range(2, n):
        x[t] = a[0] * x[t - 1] + a[1] * x[t - 2] + noise[t]
    return x


def test_unigram_bits_are_the_entropy_of_an_iid_source():
    p = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    draw = [np.random.default_rng(seed).choice(5, 200_000, p=p) for seed in (0, 1)]
    scores = unigram(recordings(draw[0], n_class=5), recordings(draw[1], n_class=5))
    assert scores.bits == pytest.approx(-(p * np.log2(p)).sum(), abs=0.01)
    assert scores.top1 == pytest.approx(0.5, abs=0.005)
    assert scores.top5 == 1 and scores.n_target == 200_000


def test_bigram_bits_are_the_conditional_entropy_of_a_markov_source():
    n_class, rng = 8, np.random.default_rng(0)
    matrix = rng.dirichlet(np.full(n_class, 0.4), n_class)
    cumulative = matrix.cumsum(1)
    chains = []
    for uniforms in rng.random((2, 60_000)):
        chain, state = np.empty(len(uniforms), np.int64), 0
        for t, u in enumerate(uniforms):
            state = chain[t] = min(np.searchsorted(cumulative[state], u), n_class - 1)
        chains.append(chain)
    values, vectors = np.linalg.eig(matrix.T)
    stationary = np.abs(vectors[:, np.argmax(values.real)].real)
    stationary /= stationary.sum()
    conditional = -(stationary[:, None] * matrix * np.log2(np.maximum(matrix, 1e-300))).sum()
    marginal = -(stationary * np.log2(stationary)).sum()
    train, test = (recordings(chain, n_class=n_class) for chain in chains)
    assert bigram(train, test).bits == pytest.approx(conditional, abs=0.02)
    assert unigram(train, test).bits == pytest.approx(marginal, abs=0.02)
    assert marginal - conditional > 0.2  # so the two cannot be mixed up


def test_counts_are_smoothed_by_hand():
    train = recordings([0, 0, 1, 2], n_class=4)  # silence, code 2, stands before the first code
    assert predictors.unigram_table(train).tolist() == [[2.5 / 6, 1.5 / 6, 1.5 / 6, 0.5 / 6]]
    expected = [[1.5, 1.5, 0.5, 0.5], [0.5, 0.5, 1.5, 0.5], [1.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
    expected = np.array(expected)
    assert predictors.bigram_table(train).tolist() == (expected / expected.sum(1, keepdims=True)).tolist()
    test = recordings([1, 3], n_class=4)
    assert unigram(train, test).bits == pytest.approx(-(math.log2(1.5 / 6) + math.log2(0.5 / 6)) / 2)
    # rows 2 -> 1 and 1 -> 3
    assert bigram(train, test).bits == pytest.approx(-(math.log2(0.5 / 3) + math.log2(0.5 / 3)) / 2)


def test_ranks_by_hand():
    train = recordings([3] * 5 + [1] * 3 + [0] * 2 + [2] * 2, n_class=8)  # order 3, 1, then 0 = 2, then 4 .. 7
    for code, top1, top5 in ((3, 1, 1), (1, 0, 1), (0, 0, 1), (2, 0, 1), (4, 0, 1), (5, 0, 0), (7, 0, 0)):
        scores = unigram(train, recordings([code], n_class=8))
        assert (scores.top1, scores.top5) == (top1, top5), code


def test_repeat_and_linear_by_hand():
    test = recordings([128, 130, 133, 136, 139, 10])
    # distances from the last code (silence is 128): 0, 2, 3, 3, 3, 129
    assert repeat(test).top1 == pytest.approx(1 / 6) and repeat(test).top5 == pytest.approx(2 / 6)
    # from the line 128, 128, 132, 136, 139, 142: 0, 2, 1, 0, 0, 132
    assert linear(test).top1 == pytest.approx(3 / 6) and linear(test).top5 == pytest.approx(5 / 6)
    assert math.isnan(repeat(test).bits) and math.isnan(linear(test).bits)
    # the line 128, 128 | 128 -> 250: 372 is cut to 255
    assert linear(recordings([128, 128, 250, 255])).top1 == pytest.approx(3 / 4)


@pytest.mark.parametrize("order", [2, 64])
def test_lpc_reaches_the_entropy_of_an_ar2_process(order):
    sigma = 0.03
    train, test = (quantize.encode(torch.from_numpy(ar2(100_000, sigma, seed)), "linear") for seed in (0, 1))
    train, test = recordings(train), recordings(test)
    model = LPC(train, order=order)
    assert model.coefficients[:2] == pytest.approx([1.6, -0.8], abs=0.05)
    theory = 0.5 * math.log2(2 * math.pi * math.e * sigma**2) - math.log2(2 / 255)
    scores = lpc(train, test, order=order)
    assert theory - 0.02 < scores.bits < theory + 0.06
    assert bigram(train, test).bits > theory + 0.3  # one code does not tell the next
    # the mean of five best codes of a normal with this spread
    spread = sigma * 255 / 2
    assert scores.top5 == pytest.approx(math.erf(2.5 / spread / math.sqrt(2)), abs=0.02)


def test_lpc_adapts_to_the_size_of_the_residual():
    """Loud and soft halves: one histogram for both would cost bits on both."""
    loud, soft = (ar2(50_000, sigma, seed) for sigma, seed in ((0.05, 0), (0.005, 1)))
    codes = quantize.encode(torch.from_numpy(np.concatenate([loud, soft])), "linear")
    scores = lpc(recordings(codes), recordings(codes))
    entropies = [0.5 * math.log2(2 * math.pi * math.e * s**2) - math.log2(2 / 255) for s in (0.05, 0.005)]
    assert scores.bits < np.mean(entropies) + 0.35  # quantisation noise is as large as the soft half's innovation


def test_lpc_in_mulaw():
    """Entropy of the innovation, less the mean log of the quantisation steps, which are fine near silence."""
    sigma = 0.02
    train, test = (quantize.encode(torch.from_numpy(ar2(200_000, sigma, seed)), "mulaw") for seed in (0, 1))
    steps = np.gradient(quantize.decode(torch.arange(256), "mulaw").double().numpy())
    theory = 0.5 * math.log2(2 * math.pi * math.e * sigma**2) - np.log2(steps[test.numpy()]).mean()
    train, test = recordings(train, companding="mulaw"), recordings(test, companding="mulaw")
    scores = lpc(train, test)
    assert theory - 0.02 < scores.bits < theory + 0.15
    assert scores.bits < bigram(train, test).bits - 0.5


@pytest.mark.parametrize("companding", ["mulaw", "linear"])
def test_every_distribution_sums_to_one(companding):
    codes = quantize.encode(torch.from_numpy(ar2(5_000, 0.02, 3)), companding)
    train = recordings(codes, companding=companding)
    for table in (predictors.unigram_table(train), predictors.bigram_table(train), LPC(train).table):
        assert table.min() > 0
        assert np.abs(table.sum(1) - 1).max() < 1e-12


def test_lpc_table_rows_follow_the_definition():
    """Two rows, left and right of silence, recomputed by loops over the samples."""
    codes = quantize.encode(torch.from_numpy(ar2(20_000, 0.02, 3)), "linear")
    model = LPC(recordings(codes))
    contexts = model.contexts(codes)
    rows = np.bincount(contexts, minlength=26 * 256).reshape(26, 256)
    for half in (slice(0, 120), slice(136, 256)):
        level, q = np.unravel_index(
            np.where(np.isin(np.arange(256), np.arange(256)[half]), rows, 0).argmax(), rows.shape
        )
        zone = abs(int(q) - 128) * 16 // 129
        same_zone, same_level, all_levels = (np.zeros(511) for _ in range(3))
        for context, code in zip(contexts.tolist(), codes.tolist(), strict=True):
            its_level, p = divmod(context, 256)
            outward = code - p if p >= 128 else p - code
            all_levels[outward + 255] += 1
            if its_level == level:
                same_level[outward + 255] += 1
                if abs(p - 128) * 16 // 129 == zone:
                    same_zone[outward + 255] += 1
        everywhere = (all_levels + 0.5) / (all_levels + 0.5).sum()
        whole_level = (same_level + 256 * everywhere) / (same_level + 256 * everywhere).sum()
        histogram = same_zone + 256 * whole_level
        expected = np.array([histogram[(c - q if q >= 128 else q - c) + 255] for c in range(256)])
        assert same_zone.sum() > 100
        assert np.allclose(model.table[level * 256 + q], expected / expected.sum(), rtol=1e-12, atol=0)


def test_predictions_use_the_past_alone():
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 3000)).to(torch.uint8)
    changed = codes.clone()
    changed[1500:] = 255 - changed[1500:]
    model = LPC(recordings(codes))
    before, after = model.contexts(codes), model.contexts(changed)
    assert (before[:1501] == after[:1501]).all()  # row 1500 is the first whose target changes, not its context
    assert (before[1501:] != after[1501:]).mean() > 0.5
    for by in (1, 2):
        shifted = predictors._shifted(codes, by, 256)
        assert shifted[:by].tolist() == [128] * by and (shifted[by:] == codes[:-by].numpy()).all()


def test_contexts_by_plain_loops():
    """The filter and the memory of residuals against loops over single samples."""
    codes = quantize.encode(torch.from_numpy(ar2(400, 0.05, 5)), "mulaw")
    model = LPC(recordings(codes, companding="mulaw"))
    s = quantize.decode(codes, "mulaw").double().numpy()
    silence = float(quantize.decode(torch.tensor([128], dtype=torch.uint8), "mulaw"))
    residuals, rows = [], []
    for t in range(len(s)):
        past = [s[t - 1 - k] if t - 1 - k >= 0 else silence for k in range(64)]
        p = float(np.dot(model.coefficients, past))
        q = int(np.abs(model.levels - p).argmin())
        weights = 0.9 ** np.arange(64)
        recent = sum(w * r for w, r in zip(weights, residuals[::-1], strict=False)) / weights.sum()
        octaves = math.log2(max(recent / model.steps[q], 2.0**-40))
        rows.append(min(max(math.floor(2 * octaves) + 4, 0), 25) * 256 + q)
        residuals.append(abs(s[t] - p))
    assert (model.contexts(codes) == np.array(rows)).all()


def test_coefficients_are_the_least_squares_solution():
    codes = [quantize.encode(torch.from_numpy(ar2(n, 0.05, n)), "linear") for n in (700, 30, 1000)]
    windows, targets = [], []
    for part in codes:
        x = np.concatenate([np.full(64, 1 / 255), quantize.decode(part, "linear").double().numpy()])
        windows += [x[t : t + 64][::-1] for t in range(len(part))]
        targets += list(x[64:])
    expected = np.linalg.lstsq(np.array(windows), np.array(targets), rcond=None)[0]
    assert np.abs(LPC(recordings(*codes)).coefficients - expected).max() < 1e-5


def test_all_rows_score_the_same_positions():
    rng = np.random.default_rng(0)
    train = recordings(rng.integers(0, 256, 9000))
    test = recordings(rng.integers(0, 256, 9000), rng.integers(0, 256, 70), rng.integers(0, 256, 5000))
    blocks = target_blocks(test, 6000)
    assert sum(stop - start for _, start, stop in blocks) <= 6000
    rows = predictors.all_rows(train, test, max_targets=6000)
    assert list(rows) == ["unigram", "bigram", "repeat", "linear", "lpc64"]
    assert len({scores.n_target for scores in rows.values()}) == 1
    whole = predictors.all_rows(train, test)
    assert {scores.n_target for scores in whole.values()} == {14070}
    # the positions are those of target_blocks, not merely as many
    hits = sum(
        int((test[i].codes[a:b] == (test[i].codes[a - 1 : b - 1] if a else 128)).sum()) for i, a, b in blocks if a
    )
    hits += sum(
        int((predictors._shifted(test[i].codes, 1, 256)[:b] == test[i].codes[:b].numpy()).sum())
        for i, a, b in blocks
        if not a
    )
    assert rows["repeat"].top1 == hits / rows["repeat"].n_target


def test_silence_and_tiny_recordings():
    for codes in ([128] * 300, [5], [128, 3]):
        for scores in predictors.all_rows(recordings(codes), recordings(codes)).values():
            assert scores.n_target == len(codes)
    silent = lpc(recordings([128] * 5000), recordings([128] * 5000))
    assert silent.bits < 0.1 and silent.top1 == 1


def test_wrong_calls():
    few, many = recordings([1, 2, 3], n_class=4), recordings([1, 2, 3])
    with pytest.raises(ValueError, match="same number of classes"):
        unigram(few, many)
    with pytest.raises(ValueError, match="at most 1024 classes, got 65536"):
        bigram(recordings([1, 2], n_class=65536), recordings([1, 2], n_class=65536))
    with pytest.raises(ValueError, match="at least one sample"):
        repeat(recordings())


def test_a_minute_takes_seconds():
    codes = quantize.encode(torch.from_numpy(ar2(960_000, 0.02, 0)), "mulaw")
    minute = recordings(codes, companding="mulaw")
    began = time.process_time()
    predictors.all_rows(minute, minute)
    assert time.process_time() - began < 15

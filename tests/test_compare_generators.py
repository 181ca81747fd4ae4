"""The comparison of generators: its scores against closed forms, what it dares to say, runs that stop and go on."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("soundfile")
pytest.importorskip("matplotlib")
import torch
from audiomodels.audio import AudioError, write_audio
from audiomodels.compare import generator_data, generator_report, generator_rows, generators, predictors, score
from audiomodels.compare.generator_report import Line, verdict
from audiomodels.compare.generator_rows import PROTOCOLS
from audiomodels.compare.generators import CompareConfig, Comparison
from audiomodels.compare.runs import LEARNING_RATES
from audiomodels.data import Recording, Recordings, voice_sides
from audiomodels.train import TrainingError, evaluate
from audiomodels.wavenet import WaveNet, WaveNetConfig
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

N_CLASS, LAG = 16, 10


class Echo(nn.Module):
    """Gives the code LAG before it, and 0 before the first LAG, 99 % of the probability of the next."""

    def __init__(self, ahead=0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.ahead = ahead

    def forward(self, codes):
        past = torch.cat([torch.zeros_like(codes[:, : LAG - 1]), codes], 1)[:, : codes.shape[1]]
        if self.ahead:
            past = torch.cat([codes[:, self.ahead :], codes[:, : self.ahead]], 1)
        p = torch.full((*codes.shape, N_CLASS), 0.01 / (N_CLASS - 1))
        return p.scatter(2, past[..., None].long(), 0.99).log() + 0 * self.weight


HIT, MISS = -math.log2(0.99), -math.log2(0.01 / (N_CLASS - 1))


def echoing(*lengths, groups=None):
    """Recordings in which every code is that of LAG samples before, none of them 0."""
    torch.manual_seed(1)
    rows = []
    for i, length in enumerate(lengths):
        codes = torch.randint(1, N_CLASS, (LAG,)).repeat(length // LAG + 1)[:length].to(torch.uint8)
        rows.append(Recording(f"r{i}", codes, groups[i] if groups else f"g{i}"))
    return Recordings(rows, sample_rate=1000, n_class=N_CLASS)


# --- scores -------------------------------------------------------------------------------------------------------


def test_only_targets_with_enough_before_them_are_scored():
    recordings = echoing(300, 120, 500)
    blocks = score.seen_blocks(recordings, 200, 10_000)
    assert blocks == [(0, 200, 300), (2, 200, 500)]
    units = score.model_units(Echo(), recordings, sight=200, max_targets=10_000)
    assert sorted(units) == ["g0", "g2"] and [units[name][3] for name in ("g0", "g2")] == [100, 300]
    for nats, top1, top5, count in units.values():
        assert nats / count / math.log(2) == pytest.approx(HIT, abs=1e-6) and top1 == top5 == count
    assert score.total(units).bits == pytest.approx(HIT, abs=1e-6)
    with pytest.raises(ValueError, match="targets after their first 500 samples"):
        score.seen_blocks(recordings, 500, 100)


def test_units_are_groups_or_else_recordings():
    several = echoing(300, 300, 300, groups=["a", "a", "b"])
    assert sorted(score.model_units(Echo(), several, sight=50, max_targets=10_000)) == ["a", "b"]
    voice = echoing(300, 300, groups=["v", "v"])
    assert sorted(score.model_units(Echo(), voice, sight=50, max_targets=10_000)) == ["r0", "r1"]


def test_bits_by_position_are_of_the_same_targets():
    """A model that looks LAG back misses the first LAG targets where it sees nothing before them."""
    bits = score.position_bits(Echo(), echoing(300, 280), (0, 50, 150), length=50, windows=5)
    assert bits[0] == pytest.approx((LAG * MISS + (50 - LAG) * HIT) / 50, abs=1e-5)
    assert bits[1:] == pytest.approx([HIT, HIT], abs=1e-5)
    assert score.position_bits(Echo(), echoing(100), (0, 100), length=50, windows=5) == [None, None]


def test_trivial_rows_are_those_of_predictors():
    torch.manual_seed(0)
    rows = [Recording(f"r{i}", torch.randint(0, N_CLASS, (700,), dtype=torch.uint8), f"g{i}") for i in range(4)]
    train, test = (Recordings(part, sample_rate=1000, n_class=N_CLASS) for part in (rows[:2], rows[2:]))
    found = score.trivial_units(train, test, sight=0, max_targets=10_000)
    for name, scores in predictors.all_rows(train, test).items():
        total = score.total(found[name])
        assert (total.top1, total.top5, total.n_target) == (scores.top1, scores.top5, scores.n_target)
        assert total.bits == pytest.approx(scores.bits, nan_ok=True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_model_units_equal_evaluate():
    torch.manual_seed(0)
    model = WaveNet(WaveNetConfig(n_layer=4, residual_channels=8, skip_channels=8, head_channels=8, n_class=N_CLASS))
    recordings = echoing(5000, 300)
    units = score.model_units(model, recordings, sight=0, max_targets=10_000)
    whole = evaluate(model, recordings, context=model.receptive_field)
    part = evaluate(model, recordings[:1], context=0)
    assert score.total(units).n_target == whole.n_target
    sight = score.model_units(model, recordings, sight=model.receptive_field, max_targets=10_000)
    assert score.total(sight).n_target < whole.n_target and part.n_target == 5000


@pytest.mark.parametrize("ahead", [0, 1, 30])
def test_causality(ahead):
    assert score.causal(Echo(ahead), N_CLASS, length=300) is (ahead == 0)


def test_no_batch_of_one():
    for n in range(1, 200):
        size = score.even_batch(n)
        assert 1 <= size <= 8 and (n == 1 or n % size != 1), n


def test_bytes_kept_for_the_backward_pass():
    x = torch.ones(1000, 10)
    model = nn.Linear(10, 20)
    # Linear keeps its input (its weight is no activation), exp its output, sum nothing
    assert score.measured(model, lambda: model(x).exp().sum()) == 4 * (1000 * 10 + 1000 * 20)


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_rows(name):
    protocol = PROTOCOLS[name]
    table = generator_rows.rows(protocol, "linear")
    sweeps = {**generator_rows.data_sweep(table), **generator_rows.size_sweep(table)}
    assert len(table) == 11 and len(sweeps) == 10 and not set(table) & set(sweeps)
    for row in (table | sweeps).values():
        assert (row.config.companding, row.config.sample_rate) == ("linear", protocol.sample_rate)
        assert generators.described(row) == json.loads(json.dumps(generators.described(row)))
    assert {r.share for r in sweeps.values()} == {1, 1 / 2, 1 / 4, 1 / 8}
    count = {name: row.config.n_parameter for name, row in table.items()}
    for control, like in (("transformer-wide", "transformer-context"), ("wavenet30-matched", "transformer-large")):
        assert abs(count[control] / count[like] - 1) < 0.12, control
    assert count["transformer-long"] == count["transformer-small"]
    assert count["transformer-shuffled"] == count["transformer-context"]


def test_paper_sizes():
    """reference: WaveNet of 10 and 30 layers with 128 channels, 1.12 and 3.10 million parameters."""
    table = generator_rows.rows(PROTOCOLS["h100"], "mulaw")
    assert table["wavenet10"].config.n_parameter == pytest.approx(1.12e6, rel=0.02)
    assert table["wavenet30"].config.n_parameter == pytest.approx(3.10e6, rel=0.01)
    assert table["transformer-context"].config.context == 4000
    layers = [table[f"transformer-{size}"].config.n_layer for size in ("small", "medium", "large")]
    heads = [table[f"transformer-{size}"].config.n_head for size in ("small", "medium", "large")]
    assert (layers, heads) == ([3, 6, 8], [4, 8, 8])


def test_matched_is_the_nearest():
    table = generator_rows.rows(PROTOCOLS["compact"], "mulaw")
    small, like = table["transformer-small"].config, table["transformer-context"].config
    for start in (small, replace(small, n_embd=256)):
        found = generator_rows.matched(start, "n_embd", 8, like)
        gaps = [abs(replace(small, n_embd=found.n_embd + d).n_parameter - like.n_parameter) for d in (-8, 0, 8)]
        assert min(gaps) == gaps[1]


def test_a_shuffled_context_is_the_neighbours():
    table = generator_rows.rows(PROTOCOLS["smoke"], "mulaw")
    torch.manual_seed(0)
    plain = table["transformer-context"].build().eval()
    torch.manual_seed(0)
    shuffled = table["transformer-shuffled"].build().eval()
    codes = torch.randint(0, 256, (3, 90))
    with torch.no_grad():
        code = plain.context(codes, 90)
        assert torch.equal(shuffled.context(codes, 90), code.roll(1, 0)) and not torch.equal(code, code.roll(1, 0))
        assert not torch.allclose(plain(codes), shuffled(codes))
        with pytest.raises(ValueError, match="at least 2 rows"):
            shuffled(codes[:1])


# --- what may be said ---------------------------------------------------------------------------------------------

COMPACT = PROTOCOLS["compact"]


def line(name, nats, *, seeds=(0, 1, 2), dev=(3.0, 3.0), floor=10.0, targets=100, spread=0.0):
    """A row of ten pieces with `nats` a target, dev bits at the last two checkpoints."""
    runs = []
    for seed in seeds:
        test = {f"u{i}": [100 * (nats + spread * (-1) ** i * i), 10, 50, 100] for i in range(10)}
        curve = [{"bits": bits} for bits in (9.0, *dev)]
        runs.append({"seed": seed, "targets": targets, "test": test, "curve": curve, "title": name})
    test = generator_report.bootstrap.mean([run["test"] for run in runs])
    bits = generator_report.bootstrap.bits(test)
    return Line(name, name, runs, test, bits, not bits.value < floor)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (line("A", 2.0, dev=(2.9, 2.8)), line("B", 2.1, dev=(3.0, 3.0)), "A is better than B"),
        (line("A", 2.2, dev=(3.2, 3.1)), line("B", 2.1, dev=(3.0, 3.0)), "B is better than A"),
        (line("A", 2.0, dev=(3.1, 2.8)), line("B", 2.1), "no order yet: the last two checkpoints disagree"),
        (line("A", 2.0, dev=(2.8, 3.1)), line("B", 2.1), "no order yet: the last two checkpoints disagree"),
        (line("A", 2.0, dev=(2.8, 2.8), spread=0.1), line("B", 2.01), "not separated; a difference below 0."),
        (line("A", 2.0, seeds=(0, 1)), line("B", 2.1), "no order yet: 2 of 3 seeds"),
        (line("A", 2.0, seeds=(0, 1, 3)), line("B", 2.1), "no order yet: 2 of 3 seeds"),
        (line("A", 2.0, floor=2.5), line("B", 2.1), "no order: undertrained (A)"),
        (line("A", 2.0, targets=200), line("B", 2.1), "no order: their targets are not equal"),
    ],
)
def test_verdicts(a, b, says):
    found = verdict(a, b, "")
    assert found.says.startswith(says)
    reverse = verdict(b, a, "").says
    assert reverse == found.says  # the order of asking does not matter
    if found.difference is not None:
        assert found.difference.value == pytest.approx((a.bits.value - b.bits.value), abs=1e-9)


def test_undertrained_is_not_better_than_lpc():
    kind = {"part": "piano", "companding": "mulaw"}
    runs = [{**run, **kind, "row": name} for name, nats in (("a", 2.0), ("b", 2.2)) for run in line(name, nats).runs]
    floor = {"lpc64": {"u": [100 * 2.1, 0, 0, 100]}, "unigram": {"u": [100 * 1.0, 0, 0, 100]}}
    found = {"rows": runs, "trivial": [{**kind, "test": floor}]}
    assert {row.name: row.undertrained for row in generator_report.lines_of(found, "piano", "mulaw")} == {
        "a": False,
        "b": True,
    }
    found["trivial"] = []  # nothing to be measured against
    assert all(row.undertrained for row in generator_report.lines_of(found, "piano", "mulaw"))


def test_smoke_says_nothing():
    lines = [line("wavenet10", 2.0), line("wavenet30", 1.9)]
    assert len(list(generator_report.orders(lines, COMPACT))) == 1
    assert not list(generator_report.orders(lines, PROTOCOLS["smoke"]))


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten "pieces" and three "voices" of a second each, with a manifest."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    rows = []

    def add(path, hertz, **row):
        tone = 0.4 * torch.sin(torch.arange(6000) * (2 * math.pi * hertz / 8000))
        (folder / path).parent.mkdir(exist_ok=True)
        write_audio(folder / path, tone + 0.02 * torch.randn(6000, generator=generator), 8000)
        rows.append({"path": path, "labels": [], "source": "", **row})

    for i in range(8):
        split = "train" if i < 3 else ("dev", "test")[i % 2]
        add(f"piano/{i}.wav", 200 + 40 * i, part="piano", split=split, group=f"piece {i}")
    for voice in range(3):
        for i in range(2):
            path = f"speech/{voice}_{i}.wav"
            add(path, 100 + 60 * voice, part="speech", split="train", labels=["en", f"v{voice}"])
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_speech_is_split_by_voice(corpus, tmp_path):
    data = generator_data.load(corpus, "speech", "linear", 8000, tmp_path)
    sides = [{r.group for r in split} for split in (data.train, data.dev, data.test)]
    assert [len(side) for side in sides] == [1, 1, 1] and len(set.union(*sides)) == 3
    assert {r.group: "test" for r in data.test}.items() <= voice_sides({f"voice:v{i}" for i in range(3)}).items()
    with pytest.raises(ValueError, match="at least three"):
        voice_sides(["a", "b"])


def test_data_is_kept_as_codes(corpus, tmp_path):
    data = generator_data.load(corpus, "piano", "mulaw", 8000, tmp_path)
    again = generator_data.load(None, "piano", "mulaw", 8000, tmp_path)  # without the corpus
    assert again.digest == data.digest and [len(s) for s in (again.train, again.dev, again.test)] == [3, 2, 3]
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(data.train, again.train, strict=True))
    assert generator_data.load(corpus, "piano", "linear", 8000, tmp_path).digest != data.digest
    assert data.facts["rendered"] and data.facts["test_groups"] == ["piece 3", "piece 5", "piece 7"]
    with pytest.raises(AudioError, match="no such file, and no --data"):
        generator_data.load(None, "speech", "mulaw", 8000, tmp_path)
    (tmp_path / "piano-mulaw-8000.npz").write_bytes(b"PK")
    with pytest.raises(AudioError, match="not the data of a comparison"):
        generator_data.load(corpus, "piano", "mulaw", 8000, tmp_path)


def test_shares_of_the_data(corpus, tmp_path):
    data = generator_data.load(corpus, "piano", "mulaw", 8000, tmp_path)
    sizes = [data.fraction(share).n_sample for share in (1 / 8, 1 / 4, 1 / 2, 1)]
    assert sizes == [round(data.train.n_sample * share) for share in (1 / 8, 1 / 4, 1 / 2, 1)]
    less, more = data.fraction(1 / 4)[0], data.fraction(1 / 2)[0]
    assert less.name == more.name and torch.equal(more.codes[: len(less.codes)], less.codes)  # nested


# --- runs ---------------------------------------------------------------------------------------------------------


def smoke(corpus, out, **options):
    kind = {"protocol": "smoke", "parts": ("piano",), "compandings": ("mulaw",), "seeds": (0,), "device": "cpu"}
    kind |= {"rows": ("wavenet10", "samplernn"), "targets": 2560, "progress": False}
    return Comparison(CompareConfig(data=corpus, out=out, **{**kind, **options}))


def results(out) -> dict[str, dict]:
    return {run["row"]: run for run in json.loads((Path(out) / "generators.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    smoke(corpus, out).run()
    return out


def test_results_hold_what_a_claim_needs(done):
    runs = results(done)
    assert sorted(runs) == ["samplernn", "wavenet10"]
    run = runs["wavenet10"]
    assert run["targets"] == 2560 and run["steps"] == 10 and run["lr"] in LEARNING_RATES
    assert [point["targets"] for point in run["curve"]] == [256 * (i + 1) for i in range(10)]
    assert 0 < run["curve"][0]["seconds"] < run["curve"][-1]["seconds"] == run["training_seconds"]
    assert run["bits"]["low"] <= run["bits"]["value"] <= run["bits"]["high"]
    assert {"commit", "config", "data", "seed", "device", "torch", "positions"} <= set(run)
    assert run["test"].keys() == runs["samplernn"]["test"].keys()
    assert all(a[3] == b[3] for a, b in zip(run["test"].values(), runs["samplernn"]["test"].values(), strict=True))
    rates = json.loads((done / "runs/smoke-piano-mulaw/learning_rates.json").read_text())
    assert {len(tried) for tried in rates.values()} == {3}
    text = (done / "generators.md").read_text()
    assert "tests the plumbing" in text and "piano (rendered), mu-law 8 bit" in text and "better than" not in text
    assert "LPC-64" in text and "| WaveNet, 10 layers |" in text and "ms a step" in text
    assert (done / "generators.png").read_bytes()[:4] == b"\x89PNG"


def test_again_does_nothing(done, corpus):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("result.json")}
    smoke(corpus, done, results=done / "elsewhere").run()
    assert (done / "elsewhere/generators.json").read_text() == (done / "generators.json").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("result.json")} and len(before) == 2
    with pytest.raises(ValueError, match="run of other settings"):
        smoke(corpus, done, targets=5120).run()


def test_stopped_runs_end_in_the_same_bits(done, corpus, tmp_path, monkeypatch, capsys):
    """The clock, which ticks at each look, runs out again and again."""
    for path in ("data", "runs/smoke-speed"):
        shutil.copytree(done / path, tmp_path / path)
    stops = 0
    for _ in range(40):
        comparison = smoke(corpus, tmp_path, rows=("wavenet10",))
        comparison.deadline, clock = 4, itertools.count()
        with monkeypatch.context() as patch:
            patch.setattr(generators.time, "monotonic", clock.__next__)
            comparison.run()
        if "the time is up" not in capsys.readouterr().out:
            break
        stops += 1
    assert 2 <= stops < 40
    stopped, straight = results(tmp_path)["wavenet10"], results(done)["wavenet10"]
    assert stopped["test"] == straight["test"] and stopped["lr"] == straight["lr"]
    assert [p["dev"] for p in stopped["curve"]] == [p["dev"] for p in straight["curve"]]


def test_reproduce(done, corpus, tmp_path):
    options = {"data": corpus, "out": tmp_path, "device": "cpu"}
    before, again = generators.reproduce(done / "generators.json", "wavenet10", 0, "piano", "mulaw", **options)
    assert before == again
    with pytest.raises(ValueError, match=r"must be one of .*samplernn 0 piano mulaw.*, got wavenet30 0 piano mulaw"):
        generators.reproduce(done / "generators.json", "wavenet30", 0, "piano", "mulaw", **options)
    text = (done / "generators.json").read_text()
    digest = results(done)["wavenet10"]["data"]["hash"]
    (tmp_path / "other.json").write_text(text.replace(digest, "0" * 64))
    with pytest.raises(ValueError, match="data must be that of the recorded run, 0000"):
        generators.reproduce(tmp_path / "other.json", "wavenet10", 0, "piano", "mulaw", **options)


def test_calibration_fits_the_budget(corpus, tmp_path, monkeypatch):
    comparison = smoke(corpus, tmp_path, budget_hours=0.01, calibrate=True, targets=None)
    monkeypatch.setattr(Comparison, "seconds_per_target", lambda self, row: 1e-3)
    comparison.calibrate([("piano", "mulaw")])
    assert comparison.protocol.targets == int(0.85 * 36 / 2.6e-3)  # two rows, each the first of its family
    monkeypatch.setattr(Comparison, "seconds_per_target", lambda self, row: 1.0)
    again = smoke(corpus, tmp_path, budget_hours=0.01, calibrate=True, targets=None)
    again.calibrate([("piano", "mulaw")])
    assert again.protocol.targets == comparison.protocol.targets  # the plan is kept


def test_a_learning_rate_that_diverges_is_not_chosen(done, corpus, tmp_path, monkeypatch):
    shutil.copytree(done / "data", tmp_path / "data")
    comparison = smoke(corpus, tmp_path)

    def train(self, row, data, out, seed, lr, steps):
        out.mkdir(parents=True)
        if lr > diverging:
            raise TrainingError("not finite")
        return None, None, [{"bits": 9 - lr}], 1.0

    monkeypatch.setattr(Comparison, "train", train)
    diverging = 2e-3
    assert comparison.learning_rate("wavenet", "piano", "mulaw") == 1e-3
    diverging = 0.0
    assert comparison.learning_rate("wavenet", "piano", "mulaw") == 1e-3  # what was tried is kept
    with pytest.raises(TrainingError, match="samplernn diverges at every learning rate"):
        comparison.learning_rate("samplernn", "piano", "mulaw")


def test_wrong_options(corpus, tmp_path):
    with pytest.raises(ValueError, match="rows must be among wavenet10, .*; got 'wavenet11'"):
        smoke(corpus, tmp_path, rows=("wavenet11",)).run()
    with pytest.raises(ValueError, match="targets must be at least 1, got 0"):
        CompareConfig(targets=0)
    with pytest.raises(ValueError, match="calibrate needs a budget"):
        CompareConfig(calibrate=True)
    with pytest.raises(ValueError, match="must name at least one"):
        CompareConfig(seeds=())

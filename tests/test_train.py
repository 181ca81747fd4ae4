"""The training loop: what it computes, how it resumes, what it does about bad steps. Kills: test_train_kills.py."""

import contextlib
import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from audiomodels import checkpoint, train
from audiomodels.checkpoint import CheckpointError
from audiomodels.train import Objective, Scores, TrainConfig, TrainingError, evaluate, fit, target_blocks
from torch import nn

N_CLASS = 16


class Tiny(nn.Module):
    """A causal convolution of width 3 over embedded codes; sees 3 codes."""

    def __init__(self, dropout=0.0, channels=8):
        super().__init__()
        self.embedding = nn.Embedding(N_CLASS, channels)
        self.conv = nn.Conv1d(channels, channels, 3)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(channels, N_CLASS)

    def forward(self, codes):
        x = nn.functional.pad(self.embedding(codes).transpose(1, 2), (2, 0))
        return self.out(self.dropout(torch.relu(self.conv(x)).transpose(1, 2)))


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return Tiny(**options)


class Recording:
    def __init__(self, codes):
        self.codes = torch.as_tensor(np.asarray(codes)).to(torch.uint8)


class Recordings(list):
    """The part of data.Recordings that evaluate() reads."""

    n_class, labels = N_CLASS, None

    def __init__(self, *codes):
        super().__init__(map(Recording, codes))


def crops(step, batch=4, width=17):
    """A noisy ramp, drawn from the step alone."""
    rng = np.random.default_rng(step)
    ramp = rng.integers(0, N_CLASS, (batch, 1)) + np.arange(width)
    return torch.from_numpy((ramp + (rng.random((batch, width)) < 0.2)) % N_CLASS).to(torch.uint8)


def settings(out, **changes):
    """A run of 12 steps that saves each of them."""
    usual = {"steps": 12, "batch": 4, "length": 8, "context": 8, "lr": 0.01, "warmup": 3, "save_every": 1, "keep": 2}
    return TrainConfig(**{"out": str(out), **usual, "tensorboard": False, "progress": False, **changes})


def contents(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def end(out, model, history):
    """All that a run leaves, but its speed: the last checkpoint's tensors and state, weights, draws, History."""
    path = checkpoint.latest(out)
    files = {name: (path / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors", "state.json")}
    log = (history.step, history.bits, history.lr, history.valid_step, history.valid, history.skipped)
    draws = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    return path.name, files, contents(model), log, draws


# --- evaluate -------------------------------------------------------------------------------------------------------


def brute_force(model, recordings, blocks):
    """Scores by one window per target, as numpy sees them."""
    nats, top1, top5, count = 0.0, 0, 0, 0
    for index, start, stop in blocks:
        codes = recordings[index].codes.long()
        for t in range(start, stop):
            past = torch.cat([torch.full((4,), N_CLASS // 2), codes[:t]])[-4:]
            logits = model(past[None])[0, -1].double().detach().numpy()
            order = sorted(range(N_CLASS), key=lambda c: (-logits[c], c))
            nats += np.log(np.exp(logits).sum()) - logits[codes[t]]
            rank = order.index(codes[t])
            top1, top5, count = top1 + (rank == 0), top5 + (rank < 5), count + 1
    return Scores(nats / count / math.log(2), top1 / count, top5 / count, count)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_evaluate_equals_one_window_per_target(monkeypatch, batch):
    monkeypatch.setattr(train, "BLOCK", 37)
    rng = np.random.default_rng(0)
    recordings = Recordings(*(rng.integers(0, N_CLASS, n) for n in (100, 1, 37, 60)))
    model = tiny(dropout=0.5).train()
    for context in (3, 4, 50):  # three codes are all that Tiny sees
        before = torch.get_rng_state()
        ours = evaluate(model, recordings, context=context, batch=batch)
        assert model.training and torch.equal(torch.get_rng_state(), before)
        theirs = brute_force(model.eval(), recordings, target_blocks(recordings))
        assert ours.bits == pytest.approx(theirs.bits, rel=1e-6)
        assert (ours.top1, ours.top5, ours.n_target) == (theirs.top1, theirs.top5, 198)
        model.train()
    blind = evaluate(model, recordings, context=0, batch=batch)  # only the first target of a block lacks context
    assert blind.n_target == 198 and blind.bits != ours.bits
    few = evaluate(model, recordings, context=3, batch=batch, max_targets=90)
    theirs = brute_force(model.eval(), recordings, target_blocks(recordings, 90))
    assert few.bits == pytest.approx(theirs.bits, rel=1e-6) and few.n_target == theirs.n_target <= 90


def test_evaluated_positions():
    recordings = Recordings(np.zeros(10_000), np.zeros(3), [], np.zeros(4096))
    assert target_blocks(recordings) == [(0, 0, 4096), (0, 4096, 8192), (0, 8192, 10_000), (1, 0, 3), (3, 0, 4096)]
    assert target_blocks(recordings, 14_099) == target_blocks(recordings)
    for most in (1, 100, 4096, 5000, 9000, 14_098):
        blocks = target_blocks(recordings, most)
        assert 0 < sum(stop - start for _, start, stop in blocks) <= most
        assert len(set(blocks)) == len(blocks) and blocks == sorted(blocks)
        assert blocks == target_blocks(recordings, most)
    assert target_blocks(Recordings(np.zeros(40 * 4096)), 4 * 4096) == [
        (0, i * 4096, (i + 1) * 4096) for i in (5, 15, 25, 35)
    ]


def test_a_constant_or_broken_model_is_not_perfect():
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = nn.Parameter(torch.full((N_CLASS,), value))

        def forward(self, codes):
            return self.value.expand(*codes.shape, N_CLASS)

    recordings = Recordings(np.arange(16 * 50) % 16)
    scores = evaluate(Constant(1.0), recordings, context=2)
    assert (scores.bits, scores.top1, scores.top5) == (pytest.approx(4), 1 / 16, 5 / 16)
    scores = evaluate(Constant(math.nan), recordings, context=2)
    assert math.isnan(scores.bits) and scores.top1 == scores.top5 == 0
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate(Constant(1.0), Recordings(), context=2)
    with pytest.raises(ValueError, match="context must be at least 0 and batch at least 1, got -1 and 1"):
        evaluate(Constant(1.0), recordings, context=-1, batch=1)


def test_forward_may_take_length_and_labels():
    class Labelled(Tiny):
        config = type("Config", (), {"n_label": 3})

        def forward(self, codes, label, *, length):
            self.seen.append((length, label.tolist()))
            return super().forward(codes)[:, -length:] + label[:, None, None]

    model, plain = Labelled(), Tiny()
    plain.load_state_dict(model.state_dict())
    model.seen = []
    recordings = Recordings(np.arange(20) % 16, np.arange(30) % 16)
    recordings.labels = torch.tensor([2, 1])
    ours, theirs = (evaluate(m, recordings, context=4) for m in (model, plain))
    assert model.seen == [(30, [2, 1])] and ours.bits == pytest.approx(theirs.bits, rel=1e-6)


# --- one step, by hand ----------------------------------------------------------------------------------------------


def test_the_first_steps_by_hand(tmp_path):
    """Loss over the last `length` targets, clipped gradient, warm-up, decay of matrices alone: against plain torch."""
    config = settings(tmp_path, steps=4, grad_clip=0.1, weight_decay=0.3, warmup=2, schedule="constant")
    model, other = tiny(), tiny()
    history = fit(model, crops, config)
    matrices = [p for p in other.parameters() if p.dim() > 1]
    vectors = [p for p in other.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}])
    for step, lr in enumerate((0.005, 0.01, 0.01, 0.01)):
        codes = crops(step).long()
        loss = nn.functional.cross_entropy(other(codes[:, :-1])[:, 8:].reshape(-1, N_CLASS), codes[:, 9:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in other.parameters()]).norm()
        assert norm > 0.1
        for p in other.parameters():
            p.grad *= 0.1 / norm
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert history.bits[step] == pytest.approx(loss.item() / math.log(2), rel=1e-6)
        assert history.lr[step] == lr
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert history.step == [1, 2, 3, 4] and min(history.samples_per_second) > 0
    assert history.throughput == np.median(history.samples_per_second)


def test_extra_inputs_reach_the_model(tmp_path):
    class Conditioned(Tiny):
        def forward(self, codes, condition):
            self.seen.append(condition.clone())
            return super().forward(codes) + condition[:, :, None]

    model = Conditioned()
    model.seen = []
    fit(model, lambda step: (crops(step), {"condition": torch.full((4, 16), float(step))}), settings(tmp_path, steps=2))
    assert [(c.shape, c[0, 0].item()) for c in model.seen] == [((4, 16), 0.0), ((4, 16), 1.0)]


def test_an_objective(tmp_path):
    """Least squares over pairs: stopped in the middle or not, the same weights."""

    def pairs(step):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return x, x.sum(1, keepdim=True)

    def squares(model, x, y):
        return nn.functional.mse_loss(model(x), y)

    def run(out, *steps):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        for count in steps:
            config = settings(tmp_path / out, steps=count, lr=0.1, schedule="constant", save_every=20)
            history = fit(model, pairs, config, task=Objective(squares))
        return contents(model), history.bits

    whole, losses = run("whole", 120)
    assert losses[-1] < 0.01 * losses[0] and run("halved", 60, 120)[0] == whole
    torch.manual_seed(0)
    assert losses[0] == pytest.approx(squares(nn.Linear(3, 1), *pairs(0)).item() / math.log(2))
    with pytest.raises(ValueError, match="crops must give 4 rows, got 3 and 3"):
        fit(nn.Linear(3, 1), lambda step: torch.zeros(3, 3), settings(tmp_path / "wrong"), task=Objective(squares))


def test_it_learns_what_can_be_learned(tmp_path):
    """A ramp with a fifth of the codes one too high: a code tells the next as far as its own bump is known."""
    config = settings(tmp_path, steps=200, save_every=0, eval_every=100, lr=0.02)
    heldout = Recordings(*crops(10**6, batch=20, width=400))
    model = tiny(channels=32)
    before = evaluate(model, heldout, context=8)
    history = fit(model, crops, config, valid=heldout)
    after = history.valid[-1]
    assert history.valid_step == [100, 200] and len(history.bits) == 200
    assert before.bits > 3.9 and 0.7 < after.bits < 1.6  # 0.72 is the entropy of the bump alone
    assert after.top1 > 0.6 and after.top5 > 0.95 and after.n_target == 8000
    assert after == evaluate(model, heldout, context=8)


def test_schedules(tmp_path, monkeypatch):
    lr = fit(tiny(), crops, settings(tmp_path / "a", steps=10, warmup=4, lr=0.01)).lr
    assert lr[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert lr[4:] == pytest.approx([0.005 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    results = iter([5.0, 4.0, 4.5, 4.4, 4.1, 4.2, 3.0, 3.0, math.nan, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: Scores(next(results), 0.0, 0.0, 1))
    config = settings(tmp_path / "b", steps=10, warmup=2, lr=0.01, schedule="plateau", patience=2, eval_every=1)
    lr = fit(tiny(), crops, config, valid=Recordings([1])).lr
    # worse after steps 3 and 4, and 5 and 6: halved twice; equal after 8 and NaN after 9 are no better: a third time
    assert lr == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025, 0.0025, 0.00125])
    with pytest.raises(ValueError, match="'plateau' needs valid"):
        fit(tiny(), crops, settings(tmp_path / "c", schedule="plateau"))


def test_bf16_is_close_to_fp32(tmp_path):
    seen = []

    class Watched(Tiny):
        def forward(self, codes):
            logits = super().forward(codes)
            seen.append(logits.dtype)
            return logits

    torch.manual_seed(0)
    model = Watched()
    low = fit(model, crops, settings(tmp_path / "a", steps=30, precision="bf16"))
    assert set(seen) == {torch.bfloat16} and next(model.parameters()).dtype == torch.float32
    full = fit(tiny(), crops, settings(tmp_path / "b", steps=30))
    assert low.bits[-1] == pytest.approx(full.bits[-1], abs=0.1) and low.bits != full.bits


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"context": -1}, "context must be at least 0, got -1"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": math.nan}, "lr must be positive, got nan"),
        ({"grad_clip": math.nan}, "grad_clip must be at least 0, got nan"),
        ({"save_every": -1}, "save_every must be at least 0, got -1"),
        ({"keep": 0}, "keep and eval_targets must be at least 1, got 0"),
        ({"schedule": "linear"}, "schedule must be one of .*, got 'linear'"),
        ({"precision": "fp16"}, "precision must be one of .*, got 'fp16'"),
    ],
)
def test_wrong_settings(tmp_path, change, rule):
    with pytest.raises(ValueError, match=rule):
        settings(tmp_path, **change)


def test_wrong_crops(tmp_path):
    with pytest.raises(ValueError, match=r"crops must give codes of shape \(4, 17\), got \(4, 16\)"):
        fit(tiny(), lambda step: crops(step)[:, 1:], settings(tmp_path))


# --- resuming -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for anything that ends a run between two steps."""


def stop_at(last):
    def on_step(step, bits):
        if step == last:
            raise Killed

    return on_step


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_resume_is_exact(tmp_path, every, schedule):
    """Dropout, a schedule with a memory, evaluations: stopped anywhere, the end is the same in every bit."""
    heldout = Recordings(*crops(10**6, batch=2, width=50))

    def run(out, on_step=None):
        model = tiny(dropout=0.3)
        config = settings(out, schedule=schedule, patience=1, lr=0.5, save_every=every, eval_every=2)
        return end(out, model, fit(model, crops, config, valid=heldout, on_step=on_step))

    whole = run(tmp_path / "whole")
    for stop in range(1, 12):
        out = tmp_path / f"stopped {stop}"
        for last in (stop, stop + 4):
            with contextlib.suppress(Killed):
                run(out, stop_at(last))
        assert run(out) == whole
    assert whole[3][3] == [2, 4, 6, 8, 10, 12]
    if schedule == "plateau":
        assert min(whole[3][2]) < 0.4  # the memory was needed


def test_a_run_that_is_done_stays_as_it_is(tmp_path):
    model = tiny(dropout=0.3)
    history = fit(model, crops, settings(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = fit(tiny(seed=7), crops, settings(tmp_path), on_step=stop_at(1))
    assert again == history
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_more_steps_and_other_settings(tmp_path, caplog):
    fit(tiny(), crops, settings(tmp_path, schedule="constant"))
    assert "other settings" not in caplog.text
    history = fit(tiny(), crops, settings(tmp_path, steps=14, lr=0.002, schedule="constant", keep=5))
    assert history.step == list(range(1, 15)) and history.lr[11:] == [0.01, 0.002, 0.002]
    assert "resumed with other settings: {'steps': '12 -> 14', 'lr': '0.01 -> 0.002'}" in caplog.text


def test_foreign_checkpoints(tmp_path):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, step=3, model=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="step-00000003: not written by fit"):
        fit(tiny(), crops, settings(tmp_path))
    fit(tiny(), crops, settings(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="made for another model"):
        fit(tiny(channels=9), crops, settings(tmp_path / "a"))


def test_two_runs_cannot_share_a_folder(tmp_path):
    def second(step, bits):
        with pytest.raises(CheckpointError, match="another process is training"):
            fit(tiny(), crops, settings(tmp_path))

    fit(tiny(), crops, settings(tmp_path, steps=1), on_step=second)


def test_log(tmp_path):
    heldout = Recordings(np.arange(40) % 16)

    def run(on_step=None):
        config = settings(tmp_path, steps=6, save_every=2, eval_every=3)
        return fit(tiny(), crops, config, valid=heldout, on_step=on_step)

    with pytest.raises(Killed):
        run(stop_at(5))
    path = tmp_path / "log.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 3, 4, 5]
    with open(path, "a") as file:  # torn and foreign lines
        file.write('[]\n{"step": 1}\n{"step": "x", "bits": 1}\nnull\n\x00\n{"step": 6, "bi')
    history = run()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert history.step == [1, 2, 3, 4, 5, 6] and history.valid_step == [3, 6]
    assert [r["bits"] for r in records if "bits" in r] == history.bits
    assert [r["samples_per_second"] for r in records if "bits" in r] == history.samples_per_second
    assert [r["valid_bits"] for r in records if "valid_bits" in r] == [scores.bits for scores in history.valid]
    (tmp_path / "other" / "log.jsonl").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for wrong, path in (("other", "other/log.jsonl"), ("file", "file")):
        with pytest.raises(CheckpointError, match=str(tmp_path / path)):
            fit(tiny(), crops, settings(tmp_path / wrong))


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    require = train.require

    def without(module, extra="models"):
        if "tensorboard" in module:
            raise ImportError(module)
        return require(module, extra)

    monkeypatch.setattr(train, "require", without)
    fit(tiny(), crops, settings(tmp_path / "a", tensorboard=True))
    assert not (tmp_path / "a" / "tensorboard").exists()
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Killed):
        fit(tiny(), crops, settings(tmp_path / "b", tensorboard=True, save_every=5), on_step=stop_at(9))
    history = fit(tiny(), crops, settings(tmp_path / "b", tensorboard=True, save_every=5))
    events = EventAccumulator(str(tmp_path / "b" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("bits")] == history.step
    assert [event.value for event in events.Scalars("bits")] == pytest.approx(history.bits)


# --- steps that are not finite --------------------------------------------------------------------------------------


class Fragile(Tiny):
    """Its loss is NaN where the first code of a crop is 15."""

    def forward(self, codes):
        poison = torch.where(codes[:, :1, None] == 15, math.nan, 0.0)
        return super().forward(codes) + poison


def fragile():
    torch.manual_seed(0)
    return Fragile(dropout=0.3)


def poisoned(*steps):
    def draw(step):
        codes = crops(step)
        codes[:, 0] = 0
        codes[0, 0] = 15 if step + 1 in steps else 0
        return codes

    return draw


def test_a_step_that_is_not_finite_is_skipped(tmp_path, caplog):
    seen = {}
    model = fragile()

    def on_step(step, bits):
        seen[step] = contents(model)
        assert math.isnan(bits) == (step in (1, 4, 6, 7))

    history = fit(model, poisoned(1, 4, 6, 7), settings(tmp_path), on_step=on_step)
    assert seen[3] == seen[4] != seen[5] == seen[6] == seen[7] != seen[8] != seen[9]
    assert history.skipped == [1, 4, 6, 7] and history.step == [2, 3, 5, 8, 9, 10, 11, 12]
    assert "step 4: loss or gradient is not finite; step skipped" in caplog.text
    again = fit(fragile(), poisoned(1, 4, 6, 7), settings(tmp_path))
    assert again == history
    for stop in (1, 4, 6, 8):
        out = tmp_path / str(stop)
        with pytest.raises(Killed):
            fit(fragile(), poisoned(1, 4, 6, 7), settings(out, save_every=3), on_step=stop_at(stop))
        resumed = fragile()
        assert fit(resumed, poisoned(1, 4, 6, 7), settings(out, save_every=3)).bits == history.bits
        assert contents(resumed) == contents(model)


def test_it_gives_up_after_several(tmp_path):
    poison = poisoned(*range(6, 99))
    with pytest.raises(
        TrainingError, match="in 5 steps in a row, up to step 10; the last good .*step-00000009; try an lr"
    ):
        fit(fragile(), poison, settings(tmp_path, steps=50))
    with pytest.raises(TrainingError, match="up to step 10"):  # also when the count crosses a restart
        fit(fragile(), poison, settings(tmp_path, steps=50))
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        fit(fragile(), poisoned(*range(99)), settings(tmp_path / "b", steps=50, save_every=40))
    fit(fragile(), poisoned(*range(2, 6), *range(7, 11)), settings(tmp_path / "c"))  # four, and four, are not five


def test_weights_that_are_not_finite_are_restored(tmp_path, caplog):
    model = tiny()

    def on_step(step, bits):
        if step == 7:
            with torch.no_grad():
                model.conv.bias.fill_(math.inf)
        if step == 8:
            saved = tiny(seed=3)
            checkpoint.load(tmp_path / "step-00000005", model=saved)
            assert math.isnan(bits) and contents(saved) == contents(model)

    history = fit(model, crops, settings(tmp_path, save_every=5), on_step=on_step)
    assert history.skipped == [8] and all(map(math.isfinite, history.bits))
    assert "step 8: the weights were not finite; those of" in caplog.text

    def at_once(step, bits):
        with torch.no_grad():
            broken.out.bias.fill_(math.nan)

    broken = tiny()
    with pytest.raises(TrainingError, match="weights are not finite at step 2; there is no checkpoint yet"):
        fit(broken, crops, settings(tmp_path / "b", save_every=5), on_step=at_once)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    model = tiny()

    def breaking(*args, **kwargs):
        if checkpoint.latest(tmp_path):
            with torch.no_grad():
                model.out.weight[0, 0] = math.nan
        return Scores(1.0, 0.0, 0.0, 1)

    monkeypatch.setattr(train, "evaluate", breaking)
    fit(model, crops, settings(tmp_path, steps=10, save_every=5, eval_every=5), valid=Recordings([1]))
    first, second = tiny(1), tiny(1)
    checkpoint.load(tmp_path / "step-00000005", model=first)
    checkpoint.load(tmp_path / "step-00000010", model=second)
    assert contents(first) == contents(second) == contents(model)


# --- signals ----------------------------------------------------------------------------------------------


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def on_step(step, bits):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as caught:
        fit(tiny(), crops, settings(tmp_path, save_every=0), on_step=on_step)
    assert caught.value.code == 130 and checkpoint.latest(tmp_path).name == "step-00000005"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def impatient(step, bits):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), crops, settings(tmp_path, save_every=0), on_step=impatient)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

"""The code language model: the step equals the full pass, the future is unseen, streams that can be learned are."""

import dataclasses

import numpy as np
import pytest
import torch
from audiomodels import code_lm
from audiomodels.code_lm import CodeLM, CodeLMConfig, State, code_recordings, perplexities
from audiomodels.data import Crops, Recording, Recordings
from audiomodels.patch_codes import PatchCodes, PatchCodesConfig
from audiomodels.quantize import decode
from audiomodels.train import TrainConfig, fit
from sounds import note, recordings

TINY = CodeLMConfig(n_class=11, n_layer=2, n_head=2, n_embd=16, window=9)


def tiny(seed=0, **changes):
    """Weights large enough that logits differ."""
    torch.manual_seed(seed)
    model = CodeLM(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def some_codes(time, batch=2, n_class=11, seed=0):
    return torch.randint(n_class, (batch, time), generator=torch.Generator().manual_seed(seed))


def streams(*codes, n_class=11):
    rows = [Recording(f"{i}", torch.as_tensor(c).to(torch.uint8), f"{i}") for i, c in enumerate(codes)]
    return Recordings(rows, sample_rate=31, companding="codes", n_class=n_class)


@pytest.mark.parametrize("changes", [{}, {"haar": True}, {"condition_class": 5, "condition_hop": 4}, {"window": 1}])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_step_equals_the_full_pass(changes, chunk, monkeypatch):
    """Over 20 windows, so that the ring wraps, and with a copy of the state taken in the middle."""
    monkeypatch.setattr(code_lm, "BLOCK", chunk)
    model, codes = tiny(**changes), some_codes(180)
    condition = some_codes(45, n_class=5, seed=1) if "condition_class" in changes else None
    with torch.no_grad():
        full = model.representation(codes, condition)
        embedded = model._condition(condition, *codes.shape)
        state, found = State(model.config, 2, torch.device("cpu")), []
        for at in range(0, 180, chunk):
            part = slice(at, at + chunk)
            found.append(model._layers(codes[:, part], None if embedded is None else embedded[:, part], state))
    assert full.abs().max() > 1 and (torch.cat(found, 1) - full).abs().max() < 1e-5 * full.abs().max()
    assert state.seen.tolist() == [180, 180]


@pytest.mark.parametrize("haar", [False, True])
def test_the_future_is_unseen(haar):
    model, codes = tiny(haar=haar, condition_class=5, condition_hop=4), some_codes(64)
    changed, condition = codes.clone(), some_codes(16, n_class=5)
    changed[:, 40:] = (changed[:, 40:] + 1) % 11
    before, after = model(codes, condition), model(changed, condition)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.isclose(before[:, 40:], after[:, 40:]).all(2).any()
    assert torch.equal(model(codes, condition, length=5), before[:, -5:])


def test_pooling_changes_the_slow_half_alone():
    config = dataclasses.replace(TINY, window=64, haar=True)
    assert config.haar_levels[:8] == (0,) * 8 and max(config.haar_levels) == 5 and min(config.haar_levels[8:]) > 0
    x = torch.randn(1, 50, 16)
    pooled = CodeLM(config)._pool(x, None)
    assert torch.equal(pooled[..., :8], x[..., :8])
    assert torch.allclose(pooled[:, 9, 8], x[:, 8:10, 8].mean(1), atol=1e-6)
    assert tiny(haar=True).state_dict().keys() == tiny().state_dict().keys()  # no parameters


def test_greedy_codes_are_the_argmax_of_the_full_pass():
    model = tiny()
    prompt = some_codes(20, batch=3)
    made = model.generate(150, prompt, batch=3, temperature=0)
    assert made.shape == (3, 150) and made.dtype == torch.uint8
    start = torch.full((3, 1), 5)
    logits = model(torch.cat([start, prompt, made.long()], 1))[:, 20:-1]
    best = logits.gather(2, made.long()[..., None])[..., 0]
    assert (logits.amax(2) - best).max() < 1e-4
    assert torch.equal(torch.cat(list(model.stream(150, prompt, batch=3, temperature=0)), 1), made)


def test_draws_follow_the_distribution_and_the_seed():
    model = tiny(n_class=4)
    codes = model.generate(1, batch=2000)[:, 0]
    expected = model(torch.tensor([[2]]))[0, 0].softmax(0)
    assert torch.allclose(torch.bincount(codes.long(), minlength=4) / 2000, expected, atol=0.04)
    assert torch.equal(model.generate(100, seed=1, batch=2)[:1], model.generate(100, seed=1))
    assert not torch.equal(model.generate(100, seed=1), model.generate(100, seed=2))
    long = model.generate(100, seed=3)
    assert torch.equal(model.generate(70, long[:, :30], seed=3), long[:, 30:])  # a draw belongs to its position
    assert model.generate(0).shape == (1, 0)
    assert model.train().generate(1).shape == (1, 1) and model.training


def hidden_order(length, rng):
    """The sum of the last two codes, one time in ten a random code: the last code alone tells nothing."""
    codes = [0, 1]
    for wild, code in zip(rng.random(length) < 0.1, rng.integers(0, 11, length), strict=True):
        codes.append(int(code) if wild else (codes[-1] + codes[-2]) % 11)
    return codes[2:]


def test_it_learns_what_a_bigram_cannot(tmp_path):
    rng = np.random.default_rng(0)
    train, test = streams(hidden_order(20_000, rng)), streams(hidden_order(3000, rng))
    torch.manual_seed(0)
    model = CodeLM(dataclasses.replace(TINY, n_embd=32, window=8))
    config = TrainConfig(
        out=str(tmp_path), steps=150, batch=16, length=32, context=8, lr=1e-2, warmup=20, save_every=0,
        tensorboard=False, progress=False,
    )  # fmt: skip
    fit(model, Crops(train, batch=16, length=32, context=8), config)
    found = perplexities(model, train, test)
    assert found["code LM"] < 4 < 9 < found["bigram"] and found["unigram"] > 9, found


def test_it_learns_from_its_condition(tmp_path):
    """Every code is its condition's, which nothing in the past tells."""

    def crops(step):
        condition = some_codes(4, batch=16, n_class=5, seed=step)
        targets = condition.repeat_interleave(4, 1)
        return torch.cat([torch.full((16, 1), 5), targets], 1), {"condition": condition}

    torch.manual_seed(0)
    model = CodeLM(dataclasses.replace(TINY, condition_class=5, condition_hop=4))
    config = TrainConfig(
        out=str(tmp_path), steps=80, batch=16, length=16, context=0, lr=2e-2, warmup=5, save_every=0,
        tensorboard=False, progress=False,
    )  # fmt: skip
    history = fit(model, crops, config)
    assert history.bits[-1] < 0.1
    made = model.generate(16, condition=torch.tensor([[4, 0, 3, 1]]), temperature=0)
    assert made.tolist() == [[4] * 4 + [0] * 4 + [3] * 4 + [1] * 4]


def test_save_and_load(tmp_path):
    model = tiny(haar=True, codebook="abc")
    model.save_pretrained(tmp_path)
    again = CodeLM.from_pretrained(tmp_path)
    assert again.config == model.config and again.code_rate == 31.25
    assert torch.equal(again(some_codes(30)), model(some_codes(30)))


def test_streams_of_recordings():
    coder = PatchCodes(
        PatchCodesConfig(n_code=4, n_fft=64, hop=16, patch_frames=2, hidden=8, n_embd=4, sample_rate=8000)
    )
    data = recordings([note(60), note(70)[:31], note(72)])
    coder.fit_codes(data)
    found = code_recordings(data, coder)
    assert [r.name for r in found] == ["0", "2"] and (found.n_class, found.sample_rate) == (4, 250)
    sound = decode(data[2].codes, "linear", 65536)
    assert torch.equal(found[1].codes, coder.encode(sound[None])[0]) and len(found[1].codes) == 125
    with pytest.raises(ValueError, match="must be at 8000 Hz"):
        code_recordings(recordings([note(60)], rate=16000), coder)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m(torch.tensor([[11]])), "codes must be 0 .. 10, got 11 .. 11: are they of another codebook"),
        (lambda m: m(torch.tensor([1])), "codes must have 2 dimensions"),
        (lambda m: m(torch.tensor([[1]]), length=2), "length must be 0 .. 1, got 2"),
        (lambda m: m(torch.tensor([[1]]), torch.tensor([[1]])), "condition must be given exactly"),
        (lambda m: tiny(condition_class=3, condition_hop=2)(some_codes(5), some_codes(2, n_class=3)), r"\(2, 3\)"),
        (lambda m: m.generate(-1), "n must be >= 0"),
        (lambda m: m.generate(1, temperature=-1.0), "temperature must be finite"),
        (lambda m: m.generate(1, some_codes(3, batch=2), batch=3), "prompt must have 3 rows"),
        (lambda m: CodeLMConfig(n_embd=30, n_head=4), "n_embd must be n_head = 4 times an even head"),
        (lambda m: CodeLMConfig(window=0), "window must be 1 .. 1048576, got 0"),
        (lambda m: CodeLMConfig(dropout=1.0), "dropout must be"),
    ],
)
def test_wrong_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(tiny())

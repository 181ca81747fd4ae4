"""SampleRNN: whole and step by step the same, truncated gradients with a carried state, causal, learns."""

import pytest

pytest.importorskip("huggingface_hub")
import torch
from audiomodels.compare.score import causal
from audiomodels.sample_rnn import SampleRNN, SampleRNNConfig
from generator_cases import check_folder, check_generation, sharpen, stepped
from torch.nn import functional as F

SMALL = {"frame_size": 4, "big_frame": 3, "n_embd": 24, "n_rnn": 2, "bptt": 24, "n_class": 64, "sample_rate": 1000}
VARIANTS = {
    "three tiers": {},
    "frames of one sample": {"frame_size": 1, "big_frame": 2},
    "one middle frame": {"big_frame": 1},
    "300 classes": {"n_class": 300},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**config):
    torch.manual_seed(0)
    return SampleRNN(SampleRNNConfig(**{**SMALL, **config}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_equals_stepped(variant):
    model = sharpen(make(**VARIANTS[variant]))
    codes = torch.randint(0, model.config.n_class, (3, 62))  # five big frames and a part of one
    with torch.no_grad():
        whole = model(codes)
        assert whole.std(1).max() > 0.1  # the codes matter
        torch.testing.assert_close(stepped(model, codes), whole[:, :-1], rtol=0, atol=1e-5)
        for length in (0, 1, 11, 12, 13, 61, 62):
            torch.testing.assert_close(model(codes, length=length), whole[:, 62 - length :], rtol=0, atol=1e-5)


def test_generation():
    check_generation(sharpen(make(), 1.5))


def test_causal():
    assert causal(sharpen(make()), 64, length=100)


def gradient(model, codes, length):
    model.zero_grad()
    model(codes, length=length).logsumexp(2).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_are_cut_and_the_state_is_carried():
    codes = torch.randint(0, 64, (2, 96))
    short, long = sharpen(make(bptt=24), 1.5), sharpen(make(bptt=96), 1.5)
    with torch.no_grad():
        torch.testing.assert_close(short(codes), long(codes), rtol=0, atol=1e-5)  # values do not depend on bptt
        other = codes.clone()
        other[:, 0] = (other[:, 0] + 32) % 64
        assert not torch.equal(short(codes)[:, -1], short(other)[:, -1])  # the first code is 4 cuts away, and felt
    name = "top.gru.weight_hh_l0"
    assert not torch.allclose(gradient(short, codes, 96)[name], gradient(long, codes, 96)[name], rtol=1e-3)
    within = codes[:, :24]
    for key, value in gradient(short, within, 24).items():
        torch.testing.assert_close(value, gradient(long, within, 24)[key])
    # what lies before the predictions carries the state and no graph: the same gradient as from that state
    silent = gradient(long, codes, 24)
    assert not torch.allclose(silent[name], gradient(make(bptt=96), codes[:, -24:], 24)[name], rtol=1e-3)
    state = short(codes, length=24)
    assert state.shape == (2, 24, 64)
    torch.testing.assert_close(gradient(short, codes, 24)[name], silent[name])


def test_gradients_reach_every_weight():
    for name, grad in gradient(make(), torch.randint(0, 64, (2, 60)), 40).items():
        assert grad.abs().max() > 0, name


def test_learns_a_pattern():
    model = make(n_class=16, n_rnn=1)
    codes = torch.arange(150).remainder(11)[None]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(codes[:, :-1], length=100).flatten(0, 1), codes[:, -100:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert model.eval().generate(22, codes[0, :55], temperature=0).tolist()[0] == [i % 11 for i in range(22)]


def test_folder(tmp_path):
    check_folder(sharpen(make()), tmp_path / "model", torch.randint(0, 64, (1, 30)))


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"bptt": 25}, ValueError, "bptt must be a multiple of 12, got 25"),
        ({"frame_size": 0}, ValueError, "frame_size must be 1"),
        ({"n_embd": 2.5}, TypeError, "n_embd must be an integer"),
        ({"n_class": 65536}, ValueError, "n_class must be 2 .. 32768"),
        ({"n_embd": 65536}, ValueError, "parameters is more than"),
        ({"companding": "alaw"}, ValueError, "companding"),
    ],
)
def test_absurd_configs_are_refused(config, error, words):
    with pytest.raises(error, match=words):
        SampleRNNConfig(**{**SMALL, **config})


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(variant):
    model = make(**VARIANTS[variant])
    assert model.config.n_parameter == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m(torch.zeros(5, dtype=torch.int64)), r"codes must have shape \(batch, time\)"),
        (lambda m: m(torch.zeros(1, 5, dtype=torch.int64), length=6), "length must be 0 .. 5, got 6"),
        (lambda m: m.generate(5, torch.tensor([64])), "codes must be in 0 .. 63"),
        (lambda m: m.generate(5, temperature=-1.0), "temperature"),
        (lambda m: m.generate(5, label=1), "takes none"),
        (lambda m: m.generate(5, dtype=torch.bfloat16), "dtype must be torch.float32"),
        (lambda m: m.generate(-1), "n must be >= 0"),
    ],
)
def test_wrong_calls(call, words):
    with pytest.raises(ValueError, match=words):
        call(make())


def test_sound_is_no_prompt():
    with pytest.raises(TypeError, match="codes must be integers"):
        make().generate(5, torch.rand(3))

"""WaveRNN: whole and step by step the same, a density over 16-bit samples, drawn by its inverse CDF, trained by fit."""

import math

import pytest

pytest.importorskip("huggingface_hub")
import torch
from audiomodels import train
from audiomodels.data import Crops, Recording, Recordings
from audiomodels.wave_rnn import WaveRNN, WaveRNNConfig
from generator_cases import check_drawn_frequencies, check_folder, check_generation, sharpen, stepped

from audiokernels import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**config):
    torch.manual_seed(0)
    return WaveRNN(WaveRNNConfig(**{"n_embd": 32, "head_channels": 16, "sample_rate": 1000, **config}))


def test_whole_equals_stepped():
    model = sharpen(make())
    codes = torch.randint(0, 65536, (3, 62))
    with torch.no_grad():
        whole = model(codes[:, :-1], codes[:, 1:])
        torch.testing.assert_close(stepped(model, codes), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(codes[:, :-1], codes[:, -20:]), whole[:, -20:], rtol=0, atol=1e-5)
    assert whole.std(1).max() > 0.1


def test_codes_and_pcm_are_the_same_samples():
    model = make().eval()
    codes = torch.randint(0, 65536, (1, 40), dtype=torch.int32)
    pcm = (codes - 32768).to(torch.int16)
    with torch.no_grad():
        assert torch.equal(model(codes[:, :-1], codes[:, 1:]), model(pcm[:, :-1], pcm[:, 1:]))
    assert model.generate(5).dtype == torch.int16
    assert torch.equal(model.to_codes(pcm), codes.long())


def test_generation():
    check_generation(sharpen(make(), 2.0))


def test_coarse_now_is_masked_from_the_coarse_half():
    """P(coarse) does not depend on the target's coarse byte, P(fine) does, and neither on its fine byte."""
    model, codes = sharpen(make()), torch.randint(0, 65536, (1, 20))
    with torch.no_grad():
        base = model(codes, codes[:, -1:])
        coarse = model(codes, codes[:, -1:] ^ 0x4000)
        fine = model(codes, codes[:, -1:] ^ 0x0040)
    assert torch.equal(base[..., :256], coarse[..., :256]) and not torch.equal(base[..., 256:], coarse[..., 256:])
    assert torch.equal(base, fine)


def test_density_sums_to_one():
    model, codes = sharpen(make()), torch.randint(0, 65536, (1, 9))
    every = torch.arange(65536)[:, None]
    with torch.no_grad():
        logits = torch.cat([model(codes.expand(256, -1), c[:, None]) for c in torch.arange(0, 65536, 256).split(256)])
        log_p = model.log_prob(logits.repeat_interleave(256, 0), every)
    assert abs(float(log_p.double().exp().sum()) - 1) < 1e-5


def test_one_number_draws_both_bytes():
    """Uniform numbers on a grid give the coarse byte's and the fine byte's probabilities."""
    model, n = sharpen(make(), 2.0), 40_000
    uniforms = (torch.arange(n) + 0.5) / n
    state = {"h": model.initial_state(1)["h"].expand(n, -1)}
    last = torch.full((n,), 32768)
    with torch.no_grad():
        drawn, logits = model.step(state, last, uniforms=uniforms)
    assert (drawn.diff() >= 0).all()  # the inverse CDF of the whole sample, in order
    coarse, fine = drawn // 256, drawn % 256
    check_drawn_frequencies(logits[0, :256].double().softmax(0), coarse)
    top = coarse.mode().values
    chosen = coarse == top
    check_drawn_frequencies(logits[chosen][0, 256:].double().softmax(0), fine[chosen])
    state = {"h": model.initial_state(1)["h"].expand(n, -1)}
    sampling = Sampling(top_k=5, top_p=0.8)  # of each byte
    with torch.no_grad():
        drawn, logits = model.step(state, last, uniforms=uniforms, sampling=sampling)
    assert (drawn.diff() >= 0).all()
    chosen = drawn // 256 == top
    for byte, of in ((drawn // 256, logits[:1, :256]), (drawn[chosen] % 256, logits[chosen][:1, 256:])):
        weights = sampling.weights(of)[0].double()
        check_drawn_frequencies(weights / weights.sum(), byte)


def test_fit_and_evaluate_know_both_bytes(tmp_path):
    """16 bits without training, fewer after it; top-1 is that of the coarse byte."""
    t = torch.arange(3000)
    pcm = (20000 * torch.sin(t * 0.2)).round().long() + 32768
    recordings = Recordings([Recording("a", pcm.int(), "a")], sample_rate=1000, companding="linear", n_class=65536)
    model = make()
    before = train.evaluate(model, recordings, context=50)
    crops = Crops(recordings, batch=4, length=100, context=50)
    config = train.TrainConfig(
        out=str(tmp_path),
        steps=60,
        batch=4,
        length=100,
        context=50,
        lr=1e-2,
        warmup=5,
        tensorboard=False,
        progress=False,
    )
    history = train.fit(model, crops, config)
    after = train.evaluate(model, recordings, context=50)
    assert abs(history.bits[0] - 16) < 0.5 and abs(before.bits - 16) < 0.5
    assert after.bits < 14.7 and after.top1 > 3 / 256
    with torch.no_grad():
        log_p = model.log_prob(model.eval()(pcm[None, :-1], pcm[None, 1:]), pcm[None, 1:])
    assert abs(-float(log_p.mean()) / math.log(2) - after.bits) < 0.05


def test_gradients_reach_every_weight():
    model, codes = make(), torch.randint(0, 65536, (2, 30))
    (-model.log_prob(model(codes[:, :-1], codes[:, 1:]), codes[:, 1:]).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert (model.gru.weight_ih.grad[:, 2].view(3, 2, -1)[:, 0] == 0).all()  # the masked ones


def test_folder(tmp_path):
    codes = torch.randint(0, 65536, (1, 30))
    check_folder(make().eval(), tmp_path / "model", codes, codes[:, -3:])


def test_parameters():
    model = make()
    assert model.config.n_parameter == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"n_embd": 33}, "n_embd must be even, got 33"),
        ({"n_class": 256}, "n_class must be 65536 .. 65536, got 256"),
        ({"companding": "mulaw"}, "companding must be 'linear'"),
        ({"n_embd": 65536}, "parameters is more than"),
    ],
)
def test_absurd_configs_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        WaveRNNConfig(**config)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, c: m(c, c[:, :0].expand(1, 0).repeat(1, 1)[0]), "codes and targets must have shapes"),
        (lambda m, c: m(c[:, :3], c[:, :4]), "codes and targets must have shapes"),
        (lambda m, c: m(c + 65536, c), "codes must be in 0 .. 65535"),
        (lambda m, c: m.generate(3, temperature=float("nan")), "temperature"),
    ],
)
def test_wrong_calls(call, words):
    with pytest.raises(ValueError, match=words):
        call(make(), torch.randint(0, 65536, (1, 8)))

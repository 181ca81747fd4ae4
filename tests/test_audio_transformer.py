"""AudioTransformer: the published sizes, no convolution, the two ways of pooling, its losses, its folder."""

import dataclasses
import math

import pytest
import torch
from audiomodels.audio_transformer import LARGE, SMALL, AudioTransformer, AudioTransformerConfig, positions
from audiomodels.pretrained import ModelError
from audiomodels.tagger import seconds_of
from torch import nn

from audiokernels import haar_levels, haar_pool

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = AudioTransformerConfig(n_class=5, n_layer=3, n_head=2, n_embd=8, n_hidden=8, n_filter=16, sample_rate=4000)
TINY = dataclasses.replace(TINY, patch=100)


def model(**changes):
    torch.manual_seed(0)
    return AudioTransformer(dataclasses.replace(TINY, **changes)).eval()


def noise(*shape, seed=1):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_published_sizes(config):
    large = AudioTransformer(config)
    assert tuple(large.filters.weight.shape) == (2048, 400) and tuple(large.embed.weight.shape) == (64, 2048)
    assert tuple(large.tokens(noise(2, 16000)).shape) == (2, 40, 64)
    assert tuple(large(noise(2, 16000)).shape) == (2, 200) and len(large.blocks) == config.n_layer
    front = 2048 * 401 + 64 * 2049
    layer = 2 * 2 * 64 + 64 * (3 * 64 + 64 + 2 * 128) + 3 * 64 + 64 + 128 + 64
    assert sum(p.numel() for p in large.parameters()) == front + config.n_layer * layer + 128 + 65 * 200
    kinds = {type(module).__name__ for module in large.modules()}
    assert kinds == {"AudioTransformer", "Linear", "ModuleList", "Block", "LayerNorm"}


@pytest.mark.parametrize("changes", [{}, {"pool_every": 1}, {"haar": "every"}, {"haar": "every", "pool_every": 2}])
def test_there_is_no_convolution(changes):
    """No module of one, and none in the graph of what runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        model(**changes)(noise(2, 4000)).sum().backward()
    ran = {event.key for event in run.key_averages()}
    assert any("addmm" in key for key in ran) and not [key for key in ran if "conv" in key.lower()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        nn.Conv1d(1, 1, 3)(torch.zeros(1, 1, 9))
    assert [event.key for event in run.key_averages() if "conv" in event.key.lower()]  # it would have been seen


# --- the layers -------------------------------------------------------------------------------------------------------


def lengths(net, audio):
    """Tokens that each layer sees."""
    seen = []
    handles = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for block in net.blocks]
    net(audio)
    for handle in handles:
        handle.remove()
    return seen


def test_pooling_halves_the_tokens():
    assert lengths(model(), noise(1, 4000)) == [40, 40, 40]
    assert lengths(model(pool_every=1), noise(1, 4000)) == [40, 20, 10]
    assert lengths(model(n_layer=6, pool_every=2), noise(1, 4000)) == [40, 40, 20, 20, 10, 10]
    assert lengths(model(pool_every=1), noise(1, 700)) == [7, 4, 2]
    audio = noise(1, 500)  # the last layer's tokens are not pooled: of five, the last would count twice
    assert torch.equal(model(n_layer=1, pool_every=1)(audio), model(n_layer=1)(audio))
    sizes = {sum(p.numel() for p in model(**c).parameters()) for c in ({}, {"pool_every": 1}, {"haar": "every"})}
    assert len(sizes) == 1


@pytest.mark.parametrize("haar", ["none", "every", "last", "shuffled"])
@pytest.mark.parametrize("pool_every", [0, 1, 2])
def test_forward_is_what_it_says(haar, pool_every):
    """Against the formulas of the docstring, each written out."""
    net, audio = model(haar=haar, pool_every=pool_every), noise(3, 4000)
    x = (audio.reshape(3, 40, 100) @ net.filters.weight.T + net.filters.bias).clamp(min=0)
    x = x @ net.embed.weight.T + net.embed.bias
    for t in range(40):
        for i in range(4):
            angle = t / 10000 ** (2 * i / 8)
            x[:, t, 2 * i : 2 * i + 2] += torch.tensor([math.sin(angle), math.cos(angle)])
    shuffled = None
    for layer, block in enumerate(net.blocks, 1):
        q, k, v = (block.qkv(block.norm_1(x))[..., 8 * i : 8 * i + 8] for i in range(3))
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            weights = (q[..., h] @ k[..., h].transpose(1, 2) / 2).softmax(-1)
            heads.append(weights @ v[..., h])
        x = x + block.proj(torch.cat(heads, -1))
        x = x + block.down(nn.functional.gelu(block.up(block.norm_2(x))))
        if haar in ("every", "shuffled") or (haar == "last" and layer == 3):
            levels = net._levels(x.shape[1])
            assert sorted(levels) == sorted(haar_levels(8, x.shape[1]))
            assert (levels == haar_levels(8, x.shape[1])) == (haar != "shuffled")
            order = sorted(range(8), key=lambda c: levels[c])
            assert haar != "shuffled" or order == (shuffled := shuffled or order) or x.shape[1] < 40
            x = haar_pool(x, levels=levels)
        if pool_every and layer % pool_every == 0 and layer < 3:
            x = (x[:, 0::2] + x[:, 1::2]) / 2
    want = net.head(net.norm(x.mean(1)))
    torch.testing.assert_close(net(audio), want, rtol=1e-4, atol=1e-5)


def test_attention_looks_both_ways():
    net, audio = model(), noise(1, 4000)
    seen = []
    net.blocks[0].register_forward_hook(lambda _, __, out: seen.append(out))
    net(audio)
    for changed in (0, 3999):
        other = audio.clone()
        other[0, changed] += 1
        net(other)
        assert (seen[-1] != seen[0]).any(-1).all()


def test_positions():
    assert positions(40, 64).shape == (40, 64) and positions(3, 5).shape == (3, 5)
    assert torch.equal(positions(1, 4), torch.tensor([[0.0, 1, 0, 1]]))


def test_gradients_reach_every_parameter_and_bf16_runs():
    net = model(haar="every", pool_every=1)
    net(noise(2, 4000)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        low = net(noise(2, 4000))
    torch.testing.assert_close(low.float(), net(noise(2, 4000)), rtol=0.1, atol=0.05)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses():
    logits = torch.tensor([[2.0, -1.0, 0.5, 0, 0], [0.0, 3.0, 0, 0, 1]])
    labels = torch.tensor([[1.0, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
    p, s = torch.sigmoid(logits), logits.softmax(-1)
    bce = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(model().loss(logits, labels), bce)
    torch.testing.assert_close(model(loss="huber").loss(logits, labels), (p - labels).square().mean() / 2)
    share = labels / torch.tensor([[2.0], [1.0]])
    torch.testing.assert_close(model(output="softmax").loss(logits, labels), -(share * s.log()).sum(1).mean())
    huber = model(output="softmax", loss="huber")
    torch.testing.assert_close(huber.loss(logits, labels), (s - share).square().mean() / 2)
    torch.testing.assert_close(huber.probabilities(logits).sum(-1), torch.ones(2))
    assert torch.isfinite(model(output="softmax").loss(logits, torch.zeros(2, 5)))


@pytest.mark.parametrize(("loss", "output"), [("bce", "sigmoid"), ("huber", "softmax")])
def test_it_learns_to_tell_tones_apart(loss, output):
    """Five tones, each second one of them at a random phase and level: all learned."""
    net = model(loss=loss, output=output, haar="every", n_filter=64).train()
    generator = torch.Generator().manual_seed(0)
    hz = torch.tensor([100.0, 230, 410, 770, 1300])
    time = torch.arange(4000) / 4000

    def tones(n):
        which = torch.randint(5, (n,), generator=generator)
        phase = 6.28 * torch.rand(n, 1, generator=generator)
        level = 0.1 + 0.9 * torch.rand(n, 1, generator=generator)
        return level * torch.sin(6.2832 * hz[which, None] * time + phase), which

    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(80):
        audio, which = tones(16)
        optimizer.zero_grad()
        net.loss(net(audio), nn.functional.one_hot(which, 5)).backward()
        optimizer.step()
    audio, which = tones(200)
    assert float((net.score(audio).argmax(1) == which).float().mean()) > 0.9


# --- crops, folder, errors --------------------------------------------------------------------------------------------


def test_seconds():
    audio = torch.arange(250.0)
    starts = [int(crop[0]) for crop in seconds_of(audio, 100, 0.5)]
    assert starts == [0, 50, 100, 150] and all(len(crop) == 100 for crop in seconds_of(audio, 100, 0.5))
    assert [int(crop[0]) for crop in seconds_of(audio[:220], 100, 1.0)] == [0, 100, 120]
    assert [int(crop[0]) for crop in seconds_of(audio[:100], 100)] == [0]
    (short,) = seconds_of(torch.tensor([1.0, 2, 3]), 7)
    assert short.tolist() == [1, 2, 3, 1, 2, 3, 1]
    for bad in (torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="audio must have shape"):
            seconds_of(bad, 100)
    with pytest.raises(ValueError, match="hop must be positive, got 0"):
        seconds_of(audio, 100, 0)


def test_score_is_in_evaluation_mode():
    net = model().train()
    crops = noise(5, 4000)
    scores = net.score(crops, batch=2)
    assert net.training and not scores.requires_grad
    torch.testing.assert_close(scores, net(crops).sigmoid())


def test_save_and_load(tmp_path):
    net = model(labels=list("abcde"), haar="every", pool_every=1, output="softmax", loss="huber")
    net.save_pretrained(tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    again = AudioTransformer.from_pretrained(tmp_path / "m")
    assert again.config == net.config and again.config.labels == ("a", "b", "c", "d", "e")
    assert torch.equal(again(noise(2, 4000)), net(noise(2, 4000)))
    (tmp_path / "m" / "config.json").write_text('{"n_layer": 2, "n_class": 5}')
    with pytest.raises(ModelError, match="other tensors than the config asks for"):
        AudioTransformer.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "error", "rule"),
    [
        ({"n_class": 0}, ValueError, "n_class must be 1 .. 100000, got 0"),
        ({"n_layer": 0}, ValueError, "n_layer must be 1 .. 1024, got 0"),
        ({"n_layer": 2.5}, TypeError, "n_layer must be an int, got 2.5"),
        ({"n_head": 3}, ValueError, "n_embd must be a multiple of n_head, got 8 and 3"),
        ({"patch": 0}, ValueError, "patch must be 1 .. 4000, got 0"),
        ({"pool_every": -1}, ValueError, "pool_every must be 0 .. 1024, got -1"),
        ({"haar": "some"}, ValueError, "haar must be one of .*'shuffled'.*, got 'some'"),
        ({"loss": "mse"}, ValueError, "loss must be one of .*, got 'mse'"),
        ({"output": "tanh"}, ValueError, "output must be one of .*, got 'tanh'"),
        ({"labels": ("a",)}, ValueError, "labels must be n_class = 5 names or none, got 1"),
        ({"labels": (1, 2, 3, 4, 5)}, TypeError, "labels must be texts"),
        ({"sample_rate": 10}, ValueError, "sample_rate must be in 1000"),
    ],
)
def test_wrong_configs(change, error, rule):
    with pytest.raises(error, match=rule):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("audio", "error", "rule"),
    [
        (torch.zeros(2, 4001), ValueError, "audio must be a multiple of 100 samples, got 4001"),
        (torch.zeros(2, 0), ValueError, "multiple of 100 samples, got 0"),
        (torch.zeros(4000), ValueError, r"audio must have shape \(batch, time\), got \(4000,\)"),
        (torch.zeros(2, 4000).long(), TypeError, "audio must be a floating point tensor, got torch.int64"),
        (None, TypeError, "audio must be a floating point tensor, got NoneType"),
    ],
)
def test_wrong_audio(audio, error, rule):
    with pytest.raises(error, match=rule):
        model()(audio)

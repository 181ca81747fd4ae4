"""Attention by lag: against a softmax over the whole matrix, and heads whose lag is known."""

import math

import pytest
import torch
from audiomodels import attention_lags as lags_module
from audiomodels.attention_lags import attention_lags, picture, table
from audiomodels.audio import write_audio
from audiomodels.sample_transformer import SampleTransformer, SampleTransformerConfig, start_lags
from audiomodels.transformer_block import rotate

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS = {
    "rotary": {},
    "sinusoidal": {"positions": "sinusoidal"},
    "haar": {"haar": True},
    "context, latents": {"context_channels": 4, "context_widths": (3, 2), "latent_patch": 16, "latent_layers": 1},
}


def make(**changed):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "window": 20, "sample_rate": 8000}
    model = SampleTransformer(SampleTransformerConfig(**{**sizes, **changed})).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight *= 6
    return model


def codes_of(n, seed=1):
    return torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_whole_matrix(variant, monkeypatch):
    """q and k as the layers have them, one softmax over time x time; blocks of queries of any size."""
    model, n, seen = make(**VARIANTS[variant]), 150, []
    window, first = model.config.window, 2 * (model.config.window - 1)
    codes = codes_of(n)
    hooks = [block.register_forward_pre_hook(lambda b, inputs: seen.append((b, *inputs))) for block in model.blocks]
    with torch.no_grad():
        model(codes[None])
    for hook in hooks:
        hook.remove()
    expected, entropies = torch.zeros(2, 2, window, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    for layer, (block, x, _, turn, *_) in enumerate(seen):
        qkv = block.qkv(block.norm1(x))[0].detach()
        for head in range(2):
            q, k = (qkv[:, part * 32 + head * 16 :][:, :16] for part in (0, 1))
            if turn is not None:
                q, k = rotate(q, *turn), rotate(k, *turn)
            time = torch.arange(n)
            lag = time[:, None] - time
            scores = (q @ k.T / 4).masked_fill((lag < 0) | (lag >= window), -torch.inf)
            p = scores.double().softmax(1)[first:]
            for i in range(window):
                expected[layer, head, i] = p[lag[first:] == i].sum() / (n - first)
            entropies[layer, head] = -torch.special.xlogy(p, p).sum() / (n - first) / math.log(2)
    for queries in (256, 7):
        monkeypatch.setattr(lags_module, "QUERIES", queries)
        got = attention_lags(model, codes)
        assert torch.allclose(got.mass, expected, atol=1e-6) and torch.allclose(got.entropy, entropies, atol=1e-5)
        assert torch.allclose(got.mass.sum(2), torch.ones(2, 2).double(), atol=1e-6)
    assert expected.std(2).min() > 0.005  # not even


def attend_to(model, layer, head, lag, sharpness=30.0):
    """Make a rotary head look `lag` samples back: q is k turned by that much, the same at every sample."""
    block, e = model.blocks[layer], model.config.n_embd
    d = e // model.config.n_head
    with torch.no_grad():
        rows = [slice(part * e + head * d, part * e + (head + 1) * d) for part in (0, 1)]
        angle = lag * 10000.0 ** (-torch.arange(0, d, 2) / d)
        key = torch.full((d,), math.sqrt(sharpness))
        query = rotate(key[None], angle.cos()[None], -angle.sin()[None])[0]
        for row, bias in zip(rows, (query, key), strict=True):
            block.qkv.weight[row] = 0
            block.qkv.bias[row] = bias


def test_a_head_that_looks_at_a_known_lag():
    model = make(n_embd=64, window=50)
    with torch.no_grad():
        for block in model.blocks:  # the other heads look at all samples evenly
            block.qkv.weight[:128] = block.qkv.bias[:128] = 0
    attend_to(model, 0, 1, 17)
    attend_to(model, 1, 0, 3)
    lags = attention_lags(model, codes_of(300))
    assert lags.mass[0, 1].argmax() == 17 and lags.mass[0, 1, 17] > 0.9
    assert lags.mass[1, 0].argmax() == 3 and lags.mass[1, 0, 3] > 0.9
    assert torch.allclose(lags.mass[0, 0], torch.full((50,), 0.02).double())
    assert abs(lags.mean[0, 0] - 24.5) < 1e-3 and abs(lags.entropy[1, 1] - math.log2(50)) < 1e-4
    rows = [line.split() for line in table(lags).splitlines()[1:5]]
    assert [row[:2] for row in rows] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    assert rows[1][3] == "2.12" and rows[0][4] == "5.64" and rows[0][5] == "14.0%"  # 17 / 8 ms; lags 0, 1, .. 32 of 50
    drawn = picture(lags, "known").axes[0].patches
    values, edges, _ = next(steps for steps in drawn if steps.get_label().startswith("head 1")).get_data()
    assert edges[values.argmax()] < 17 < edges[values.argmax() + 1]
    widths = torch.tensor(edges).log2().diff()
    assert abs(float((torch.tensor(values) * widths).sum()) - 1) < 1e-6


def test_errors():
    model = make()
    with pytest.raises(ValueError, match=r"2 layers with a window of 20 need more than 38; got shape \(38,\)"):
        attention_lags(model, codes_of(38))
    assert attention_lags(model, codes_of(39)).mass.sum() > 3.99
    with pytest.raises(ValueError, match="one row"):
        attention_lags(model, codes_of(80)[None])
    model.mode = "recompute"
    assert torch.equal(attention_lags(model, codes_of(80)).mass, attention_lags(make(), codes_of(80)).mass)
    assert model.mode == "recompute" and not any(block._forward_pre_hooks for block in model.blocks)


def test_the_command(call, tmp_path):
    make().save_pretrained(tmp_path / "model")
    write_audio(tmp_path / "a.wav", 0.1 * torch.randn(900), 8000)
    out = tmp_path / "new" / "attention.png"
    code, text, _ = call("plot-attention", tmp_path / "model", tmp_path / "a.wav", "-o", out, "--seconds", 0.1)
    assert code == 0 and "mean over 762 samples" in text and out.stat().st_size > 20_000
    code, _, err = call("plot-attention", tmp_path / "model", tmp_path / "a.wav", "--seconds", 0.001)
    assert code == 2 and "need more than 38" in err


@pytest.mark.parametrize("window", [1, 2, 3, 40, 100])
def test_heads_of_a_fresh_model_look_at_lags_of_their_own(window):
    lags = start_lags(window)
    assert lags == [lag for lag in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96) if lag < window] or lags == [0]
    torch.manual_seed(window)
    model = SampleTransformer(SampleTransformerConfig(n_layer=3, n_head=5, n_embd=80, window=window))
    mass = attention_lags(model, torch.randint(0, 256, (3 * window + 500,))).mass
    assert mass.argmax(2).flatten().tolist() == [lags[head % len(lags)] for head in range(15)]
    torch.manual_seed(window)
    other = SampleTransformer(SampleTransformerConfig(n_head=5, n_embd=80, window=40, positions="sinusoidal"))
    assert not any(block.qkv.bias.abs().max() > 1 for block in other.blocks)

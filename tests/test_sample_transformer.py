"""SampleTransformer: causal, equal to its fused generation, its sliding crop, its long context, saved and read back."""

import dataclasses
import json

import pytest

pytest.importorskip("huggingface_hub")
import torch
from audiomodels import peers
from audiomodels.pretrained import ModelError
from audiomodels.sample_transformer import SampleTransformer, SampleTransformerConfig
from generator_cases import check_top
from torch.nn import functional as F

import audiokernels

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "window": 20, "n_class": 64, "context_code": 12}
CONTEXT = {"context_channels": 6, "context_widths": (3, 2, 2)}
VARIANTS = {
    "plain": {},
    "sinusoidal": {"positions": "sinusoidal"},
    "logits": {**CONTEXT, "fusion": "logits"},
    "add": {**CONTEXT, "fusion": "add"},
    "film": {**CONTEXT, "fusion": "film", "positions": "sinusoidal"},
    "haar": {"haar": True, "n_layer": 3},
    "condition": {"condition_channels": 5, "condition_hop": 7},
    "label": {"n_label": 3},
    "all": {**CONTEXT, "haar": True, "condition_channels": 5, "condition_hop": 7, "n_label": 3, "fusion": "add"},
    "300 classes": {"n_class": 300, "n_head": 1},
    "latents": {"latent_patch": 8, "latent_layers": 2, "latent_context": 128},
    "latents and more": {
        **CONTEXT, "latent_patch": 8, "latent_layers": 1, "condition_channels": 5, "condition_hop": 8, "n_label": 3
    },
}  # fmt: skip
SPARSE = {name: sizes for name, sizes in VARIANTS.items() if "latents" not in name}


def make(seed: int = 0, **config) -> SampleTransformer:
    torch.manual_seed(seed)
    model = SampleTransformer(SampleTransformerConfig(**{**SMALL, **config})).eval()
    with torch.no_grad():  # fresh weights give smooth and nearly uniform logits: these are neither
        model.embedding.weight.normal_()
        model.out.weight.normal_(std=1.3 * model.config.n_embd**-0.5)
        for name, parameter in model.named_parameters():
            parameter *= 3 if "qkv.weight" in name else 1.5
        for block in model.blocks:  # heads that look at all of the window, not at their lags alone
            block.qkv.bias.uniform_(-0.4, 0.4)
    return model


def inputs(model: SampleTransformer, batch: int, time: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config, options = model.config, {}
    if config.condition_channels:
        options["condition"] = torch.randn(batch, -(-time // config.condition_hop), config.condition_channels)
    if config.n_label:
        options["label"] = torch.randint(0, config.n_label, (batch,))
    return torch.randint(0, config.n_class, (batch, time)), options


def shifted(model: SampleTransformer, codes: torch.Tensor) -> torch.Tensor:
    """What generation reads: the start code, then every code but the last."""
    return torch.cat([torch.full_like(codes[:, :1], model.config.n_class // 2), codes[:, :-1]], 1)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())))


def test_the_paper_s_sizes():
    """models.md counts 0.87, 1.46 and 1.86 million with learned positions (204,800), which these do not have."""
    for n_layer, n_head, expected in ((3, 4, 0.66e6), (6, 8, 1.26e6), (8, 8, 1.65e6)):
        config = SampleTransformerConfig(n_layer=n_layer, n_head=n_head)
        assert config.n_parameter == pytest.approx(expected, rel=0.01)
    config = SampleTransformerConfig(context_channels=64)
    assert (config.context, len(config.context_widths), config.context_code) == (4000, 6, 128)


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_parameters_are_those_of_the_model(variant):
    model = make(**VARIANTS[variant])
    assert sum(p.numel() for p in model.parameters()) == model.config.n_parameter


@pytest.mark.parametrize("mode", ["full", "recompute"])
@pytest.mark.parametrize("variant", SPARSE)
def test_receptive_field_is_what_a_prediction_sees(variant, mode):
    model = make(**VARIANTS[variant])
    model.mode = mode
    seen = model.receptive_field
    codes, options = inputs(model, 1, seen + 4)
    with torch.no_grad():
        before = model(codes, **options, length=1)
        other = codes.clone()
        other[0, : -seen or None] = (other[0, : -seen or None] + 1) % model.config.n_class
        assert torch.equal(model(other, **options, length=1), before)
        other[0, -min(seen, 20)] = (other[0, -min(seen, 20)] + 1) % model.config.n_class
        assert not torch.equal(model(other, **options, length=1), before)


def test_receptive_field_is_tight():
    """Of one layer, where the farthest sample's weight in a prediction is not lost in rounding."""
    for sizes in ({"window": 20}, {"haar": True, "window": 8}, {**CONTEXT, "fusion": "add", "window": 5}):
        model = make(n_layer=1, **sizes)
        codes, _ = inputs(model, 20, model.receptive_field)  # in some rows no relu on the way is closed
        other = codes.clone()
        other[:, 0] = (other[:, 0] + 17) % 64
        assert not torch.equal(model(other, length=1), model(codes, length=1))


@pytest.mark.parametrize("mode", ["full", "recompute"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_causal(variant, mode):
    """Other codes from t0 on: every logit before is the same to the bit."""
    model = make(**VARIANTS[variant])
    model.mode = mode
    codes, options = inputs(model, 2, 60)
    with torch.no_grad():
        before = model(codes, **options)
        for first in (1, 17, 48, 59):
            other = codes.clone()
            other[:, first:] = torch.randint(0, model.config.n_class, other[:, first:].shape)
            after = model(other, **options)
            assert torch.equal(after[:, :first], before[:, :first])
            assert not torch.equal(after[:, first:], before[:, first:])


@pytest.mark.parametrize("mode", ["full", "recompute"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_length_gives_the_last_logits(variant, mode):
    model = make(**VARIANTS[variant])
    model.mode = mode
    codes, options = inputs(model, 2, 130)
    with torch.no_grad():
        full = model(codes, **options)
        for length in (0, 1, 7, 130):
            last = model(codes, **options, length=length)
            assert last.shape == (2, length, model.config.n_class)
            assert length == 0 or close(last, full[:, 130 - length :])


@pytest.mark.parametrize("variant", SPARSE)
def test_recompute_is_the_model_on_every_crop(variant):
    """The paper's sliding crop: each prediction as if there were no samples before its window."""
    model = make(**VARIANTS[variant])
    window = model.config.window
    codes, options = inputs(model, 2, 50)
    with torch.no_grad():
        model.mode = "recompute"
        crops = model(codes, **options)
        model.mode = "full"
        assert close(crops[:, :window], model(codes[:, :window], **{
            **options, **({"condition": options["condition"][:, : -(-window // 7)]} if "condition" in options else {})
        }))  # fmt: skip
        if model.context is None and not options:
            for t in (window, 49):
                assert close(crops[:, t], model(codes[:, t - window + 1 : t + 1])[:, -1])
        if model.config.n_layer > 1:
            assert not close(crops[:, -1], model(codes, **options)[:, -1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_equals_forward(variant):
    """Prompted with all but the last code at temperature 0, over three wraps of the ring, blocks of any size."""
    model = make(**VARIANTS[variant])
    time = 3 * 64 + 21
    codes, options = inputs(model, 2, time)
    with torch.no_grad():
        expected = model(shifted(model, codes), **options)
        frames = model._condition(2, time, options.get("condition"), options.get("label"))
        if model.latents is not None:
            frames = model._with_latents(shifted(model, codes), frames)
        pack = model.pack()
        _, logits = audiokernels.transformer_generate(
            pack,
            audiokernels.transformer_state(pack, 2),
            torch.zeros(2, time),
            codes=codes,
            condition=frames,
            return_logits=True,
        )
    assert close(logits, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generated_codes_are_forward_s_choice(variant):
    """At temperature 0, free running after a prompt, every code is the argmax of forward on all codes before it."""
    model = make(**VARIANTS[variant])
    n = 150
    prompt = torch.randint(0, model.config.n_class, (2, 9))
    _, options = inputs(model, 2, 9 + n)
    new = model.generate(n, prompt, temperature=0, batch=2, **options).long()
    with torch.no_grad():
        logits = model(shifted(model, torch.cat([prompt, new], 1)), **options)[:, 9:]
    chosen = logits.gather(2, new[:, :, None])[:, :, 0]
    assert (logits.amax(2) - chosen).max() <= 2e-5 * max(1.0, float(logits.abs().max()))
    assert new.unique().numel() > 1
    new = model.generate(n, prompt, top_k=3, batch=2, **options).long()
    with torch.no_grad():
        logits = model(shifted(model, torch.cat([prompt, new], 1)), **options)[:, 9:]
    check_top(logits, new, 3)


@pytest.mark.parametrize("variant", ["plain", "logits", "haar"])
def test_recompute_generates_from_its_crops(variant):
    model = make(**VARIANTS[variant])
    model.mode = "recompute"
    prompt = torch.randint(0, 64, (2, 30))
    new = model.generate(60, prompt, temperature=0, batch=2).long()  # longer than what a prediction sees
    with torch.no_grad():
        logits = model(shifted(model, torch.cat([prompt, new], 1)))[:, 30:]
    chosen = logits.gather(2, new[:, :, None])[:, :, 0]
    assert (logits.amax(2) - chosen).max() <= 2e-5 * max(1.0, float(logits.abs().max()))
    new = model.generate(40, top_k=3).long()
    with torch.no_grad():
        check_top(model(shifted(model, new)), new, 3)
    assert not torch.equal(model.generate(40, seed=1), model.generate(40, seed=2))
    with pytest.raises(ValueError, match="recompute"):
        model.generate(5, dtype=torch.bfloat16)


@pytest.mark.parametrize("variant", ["plain", "all", "latents and more", "300 classes"])
def test_stream_is_generate_in_blocks(variant):
    model = make(**{**VARIANTS[variant], "sample_rate": 1000})  # blocks of 100 samples
    _, options = inputs(model, 2, 155)
    blocks = list(model.stream(150, torch.tensor([3, 1, 4, 1, 5]), seed=7, batch=2, **options))
    assert [block.shape for block in blocks] == [(2, 100), (2, 50)]
    codes = make(**VARIANTS[variant]).generate(150, torch.tensor([3, 1, 4, 1, 5]), seed=7, batch=2, **options)
    assert torch.equal(torch.cat(blocks, 1), codes)
    assert codes.dtype == (torch.uint8 if model.config.n_class <= 256 else torch.int16)


def test_generate_depends_on_seed_and_row_only():
    model = make()
    codes = model.generate(120, seed=1, batch=3)
    assert torch.equal(codes, model.generate(120, seed=1, batch=3, progress=True))
    assert torch.equal(codes[:1], model.generate(120, seed=1))
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes, model.generate(120, seed=2, batch=3))
    for dtype in (torch.bfloat16, torch.int8):
        assert model.generate(50, dtype=dtype).shape == (1, 50)
    assert model.generate(0, torch.tensor([1, 2]), batch=2).shape == (2, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_eager_peer_draws_the_same(batch):
    """The ring of keys and values in plain PyTorch, in two calls over three of its wraps."""
    model = make()
    uniforms = audiokernels.philox_uniform(5, batch, 70)
    weights = {name: tensor.detach() for name, tensor in model.weights().items()}
    peer = peers.KeyValueRings(weights, n_head=2, window=20, batch=batch)
    drawn = torch.cat([peer.generate(uniforms[:, :30]), peer.generate(uniforms[:, 30:])], 1)
    assert torch.equal(drawn, model.generate(70, seed=5, batch=batch).long())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_weight(variant):
    model = make(**VARIANTS[variant])
    codes, options = inputs(model, 4, 60)
    model.train()(codes, **options).logsumexp(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("variant", ["plain", "all", "latents"])
def test_checkpointing_changes_no_gradient(variant):
    grads = []
    for checkpoint in (False, True):
        model = make(**VARIANTS[variant], checkpoint=checkpoint).train()
        torch.manual_seed(1)
        codes, options = inputs(model, 2, 60)
        model(codes, **options).logsumexp(2).sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


def test_long_context_reaches_far():
    """16,384 samples, forward and backward: the last prediction depends on the first sample, through latents alone."""
    model = make(latent_patch=64, latent_layers=2, latent_context=1 << 20, checkpoint=True, n_embd=16).train()
    codes = torch.randint(0, 64, (1, 16384))
    other = codes.clone()
    other[0, 0] = (other[0, 0] + 17) % 64
    logits = model(codes, length=1)
    assert not torch.equal(logits, model(other, length=1))
    loss = F.cross_entropy(model(codes[:, :-1]).flatten(0, 1), codes[0, 1:])
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    short = make(latent_patch=64, latent_layers=1, latent_context=1024)
    assert torch.equal(short(codes, length=1), short(other, length=1))


def test_random_offsets_of_sinusoidal_positions_are_for_training_only():
    model = make(positions="sinusoidal")
    codes, _ = inputs(model, 1, 30)
    assert torch.equal(model(codes), model(codes))
    model.train()
    assert not torch.equal(model(codes), model(codes))


def test_learns_a_pattern():
    torch.manual_seed(0)
    model = SampleTransformer(SampleTransformerConfig(**{**SMALL, "n_class": 16}))
    codes = torch.arange(300).remainder(11)[None]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(codes[:, :-1], length=250).flatten(0, 1), codes[:, -250:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert model.generate(22, codes[0, :50], temperature=0).tolist()[0] == [(50 + i) % 11 for i in range(22)]


@pytest.mark.parametrize("variant", ["plain", "add"])
def test_autocast_and_export_take_it(variant):
    model = make(**VARIANTS[variant])
    codes, options = inputs(model, 2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(codes, **options)
    full = model(codes, **options)
    assert (low.float() - full).abs().mean() < 0.05 * full.std()
    exported = torch.export.export(model, (codes,), options)
    torch.testing.assert_close(exported.module()(codes, **options), full)


# --- files and arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "all", "latents"])
def test_saved_and_read_back(variant, tmp_path):
    model = make(**VARIANTS[variant])
    model.save_pretrained(tmp_path / "model")
    again = SampleTransformer.from_pretrained(tmp_path / "model")
    assert again.config == model.config and not again.training
    codes, options = inputs(model, 1, 40)
    assert torch.equal(model(codes, **options), again(codes, **options))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["sample_rate"] == 16000 and config["companding"] == "mulaw"
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "n_embd": 32}))
    with pytest.raises(ModelError, match="shape"):
        SampleTransformer.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("error", "field", "value", "came"),
    [
        (TypeError, "n_layer", "3", "'3'"),
        (ValueError, "n_layer", 0, "0"),
        (ValueError, "window", 0, "0"),
        (ValueError, "n_head", 3, "16 / 3"),
        (ValueError, "n_head", 4, "16 / 4"),
        (ValueError, "positions", "learned", "'learned'"),
        (ValueError, "fusion", "mul", "'mul'"),
        (TypeError, "haar", 1, "1"),
        (ValueError, "context_widths", (), r"\(\)"),
        (ValueError, "context_widths", (0, 2), r"\(0, 2\)"),
        (ValueError, "context_widths", 5, "5"),
        (ValueError, "latent_patch", 12, "12"),
        (ValueError, "companding", "alaw", "'alaw'"),
        (ValueError, "a model of", None, "1,000,000,000"),
    ],
)
def test_wrong_config(error, field, value, came):
    change = {field: value} if value is not None else {"n_layer": 1000, "n_embd": 4096, "n_head": 32}
    with pytest.raises(error, match=f"^{field}.*{came}"):
        SampleTransformerConfig(**{**SMALL, **change})


def test_condition_hop_of_latents():
    with pytest.raises(ValueError, match="^condition_hop must be latent_patch"):
        SampleTransformerConfig(latent_patch=8, condition_channels=2, condition_hop=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m(c[0]), "^codes must have shape"),
        (lambda m, c: m(c, length=100), r"^length must be 0 \.\. 30"),
        (lambda m, c: m(c, torch.zeros(2, 5, 3)), "^condition must be given exactly"),
        (lambda m, c: m(c, label=torch.zeros(2)), "^label must be given exactly"),
        (lambda m, c: m.generate(-1), "^n must be >= 0"),
        (lambda m, c: m.generate(3, c, batch=3), "^prompt must have 3 rows"),
        (lambda m, c: m.generate(3, c + 64, batch=2), "^codes must be in"),
        (lambda m, c: m.generate(3, temperature=-1.0), "^temperature must be finite"),
        (lambda m, c: m.generate(3, seed=-1), "^seed must be an integer from 0"),
    ],
)
def test_wrong_call(call, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        call(model, torch.zeros(2, 30, dtype=torch.int64))


def test_wrong_mode():
    model = make()
    model.mode = "slow"
    with pytest.raises(ValueError, match="^mode must be one of full, recompute, got 'slow'"):
        model(torch.zeros(1, 3, dtype=torch.int64))


def test_configs_can_be_replaced():
    config = SampleTransformerConfig(**SMALL)
    assert dataclasses.replace(config, haar=True).haar_levels == (0,) * 8 + (1,) * 4 + (2, 2, 3, 4)
    assert dataclasses.replace(config, haar=True, window=4).haar_levels[-1] == 2


def test_torch_compile_takes_the_whole_model():
    torch.manual_seed(0)
    model = SampleTransformer(SampleTransformerConfig(**SMALL))
    codes = torch.randint(64, (1, 30))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(codes), model(codes))

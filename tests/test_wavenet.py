"""WaveNet: causal, equal to its fused generation, saved and read back safely."""

import json
import os
import pickle

import pytest

pytest.importorskip("huggingface_hub")
import torch
from audiomodels import peers
from audiomodels.pretrained import ModelError
from audiomodels.wavenet import WaveNet, WaveNetConfig
from generator_cases import check_top
from torch.nn import functional as F

import audiokernels

SMALL = {"n_layer": 6, "dilation_cycle": 3, "residual_channels": 12, "skip_channels": 20, "head_channels": 24}
VARIANTS = {
    "plain": {"n_class": 64},
    "width 1": {"n_class": 64, "kernel_size": 1},
    "width 3": {"n_class": 64, "kernel_size": 3},
    "condition": {"n_class": 64, "condition_channels": 5, "condition_hop": 7},
    "label": {"n_class": 64, "n_label": 3},
    "all, width 3": {"n_class": 64, "kernel_size": 3, "condition_channels": 5, "condition_hop": 7, "n_label": 3},
    "one layer, 300 classes": {"n_class": 300, "n_layer": 1},
}


def make(seed: int = 0, scale: float = 2.0, **config) -> WaveNet:
    torch.manual_seed(seed)
    model = WaveNet(WaveNetConfig(**{**SMALL, **config})).eval()
    with torch.no_grad():  # fresh weights give smooth and nearly uniform logits: these are neither
        model.embedding.weight.normal_()
        model.out.weight.normal_(std=model.config.head_channels**-0.5)
        for parameter in model.parameters():
            parameter *= scale
    return model


def inputs(model: WaveNet, batch: int, time: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config, options = model.config, {}
    if config.condition_channels:
        options["condition"] = torch.randn(batch, -(-time // config.condition_hop), config.condition_channels)
    if config.n_label:
        options["label"] = torch.randint(0, config.n_label, (batch,))
    return torch.randint(0, config.n_class, (batch, time)), options


def shifted(model: WaveNet, codes: torch.Tensor) -> torch.Tensor:
    """What generation reads: the start code, then every code but the last."""
    return torch.cat([torch.full_like(codes[:, :1], model.config.n_class // 2), codes[:, :-1]], 1)


def test_receptive_field():
    assert WaveNetConfig(n_layer=10).receptive_field == 1024
    assert WaveNetConfig(n_layer=30).receptive_field == 3070
    assert WaveNet(WaveNetConfig(**SMALL, kernel_size=3)).receptive_field == 2 * 14 + 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_receptive_field_is_what_a_prediction_sees(variant):
    model = make(**VARIANTS[variant])
    seen = model.receptive_field
    codes, options = inputs(model, 1, seen + 4)
    before = model(codes, **options)[0, -1]

    def change(back: int) -> float:
        other = codes.clone()
        other[0, -back] = (other[0, -back] + 1) % model.config.n_class
        return float((model(other, **options)[0, -1] - before).detach().abs().max())

    assert change(seen) > 0
    assert change(seen + 1) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal(variant):
    model = make(**VARIANTS[variant])
    codes, options = inputs(model, 2, 60)
    before = model(codes, **options)
    for first in (1, 17, 59):
        other = codes.clone()
        other[:, first:] = torch.randint(0, model.config.n_class, other[:, first:].shape)
        after = model(other, **options)
        assert torch.equal(after[:, :first], before[:, :first])
        assert not torch.equal(after[:, first:], before[:, first:])
    if "condition" in options:
        options["condition"] = options["condition"].clone()
        options["condition"][:, 4:] += 1
        after = model(codes, **options)
        assert torch.equal(after[:, :28], before[:, :28])
        assert not torch.equal(after[:, 28], before[:, 28])


@pytest.mark.parametrize("variant", VARIANTS)
def test_length_gives_the_last_logits(variant):
    model = make(**VARIANTS[variant])
    codes, options = inputs(model, 2, 50)
    full = model(codes, **options)
    for length in (0, 1, 7, 50):
        last = model(codes, **options, length=length)
        assert last.shape == (2, length, model.config.n_class)
        torch.testing.assert_close(last, full[:, 50 - length :], rtol=0, atol=2e-6 * float(full.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype):
    model = make(n_class=64)
    codes, _ = inputs(model, 2, 20)
    assert torch.equal(model(codes.to(dtype)), model(codes))


def test_the_sum_of_the_paper():
    """One prediction by the formula of the module's docstring, in float64, layer by layer and tap by tap."""
    model = make(**VARIANTS["all, width 3"])
    codes, options = inputs(model, 1, 40)
    w = {name: tensor.detach().double() for name, tensor in model.weights().items()}
    label = model.label.weight.detach().double()[options["label"][0]]
    frames = torch.cat([options["condition"][0].double(), label.expand(6, -1)], 1)
    x, skip = w["embedding"][codes[0]], 0.0
    for layer, d in enumerate(model.config.dilations):
        z = w["conv_bias"][layer] + frames[torch.arange(40) // 7] @ w["condition_weight"][layer].T
        for k in range(3):
            back = (2 - k) * d
            past = torch.cat([torch.zeros(back, 12), x])[:40]
            z = z + past @ w["conv_weight"][layer, :, :, k].T
        h = torch.tanh(z[:, :12]) * torch.sigmoid(z[:, 12:])
        skip = skip + h @ w["skip_weight"][layer].T + w["skip_bias"][layer]
        if layer < 5:
            x = x + h @ w["res_weight"][layer].T + w["res_bias"][layer]
    head = torch.relu(torch.relu(skip) @ w["head_weight"].T + w["head_bias"])
    expected = head @ w["out_weight"].T + w["out_bias"]
    torch.testing.assert_close(model(codes, **options)[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_equals_forward(variant):
    """Teacher forcing through the op gives forward's logits, over more than two receptive fields."""
    model = make(**VARIANTS[variant])
    time = 3 * model.receptive_field + 50
    codes, options = inputs(model, 2, time)
    with torch.no_grad():
        expected = model(shifted(model, codes), **options)
        pack = model.pack()
        _, logits = audiokernels.wavenet_generate(
            pack,
            audiokernels.wavenet_state(pack, 2),
            torch.zeros(2, time),
            codes=codes,
            condition=model._condition(2, time, options.get("condition"), options.get("label")),
            return_logits=True,
        )
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_generated_codes_are_forward_s_choice(variant):
    """At temperature 0, free running after a prompt, every code is the argmax of forward on all codes before it."""
    model = make(**VARIANTS[variant])
    n = 2 * model.receptive_field + 30
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_is_generate_in_blocks(variant):
    model = make(**{**VARIANTS[variant], "sample_rate": 1000})  # blocks of 100 samples
    _, options = inputs(model, 2, 255)
    blocks = list(model.stream(250, torch.tensor([3, 1, 4, 1, 5]), seed=7, batch=2, **options))
    assert [block.shape for block in blocks] == [(2, 100), (2, 100), (2, 50)]
    codes = make(**VARIANTS[variant]).generate(250, torch.tensor([3, 1, 4, 1, 5]), seed=7, batch=2, **options)
    assert torch.equal(torch.cat(blocks, 1), codes)
    assert codes.dtype == (torch.uint8 if model.config.n_class <= 256 else torch.int16)


def test_generate_depends_on_seed_and_row_only():
    model = make(n_class=64)
    codes = model.generate(200, seed=1, batch=3)
    assert torch.equal(codes, model.generate(200, seed=1, batch=3, progress=True))
    assert torch.equal(codes[:1], model.generate(200, seed=1))
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes, model.generate(200, seed=2, batch=3))
    assert torch.equal(model.generate(200, seed=1, dtype=torch.float32), codes[:1])
    for dtype in (torch.bfloat16, torch.int8):
        assert model.generate(50, dtype=dtype).shape == (1, 50)
    assert model.generate(0, torch.tensor([1, 2]), batch=2).shape == (2, 0)


def test_stream_object_gives_the_same_codes():
    model = make(n_class=64)
    stream = audiokernels.WaveNetStream(model.pack(), seed=5, batch=2)
    pulled = [torch.from_numpy(stream.read(n)) for n in (1, 17, 82)]
    assert torch.equal(torch.cat(pulled, 1).to(torch.uint8), model.generate(100, seed=5, batch=2))


def test_generate_keeps_no_graph_and_leaves_grad_mode_alone():
    model = make(n_class=64, n_label=2)
    for block in model.stream(2000, label=1):
        assert torch.is_grad_enabled() and not block.requires_grad


def test_gradients_reach_every_weight():
    model = make(**VARIANTS["all, width 3"])
    codes, options = inputs(model, 4, 80)
    model(codes, **options).logsumexp(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_near_levels_start_near():
    model = WaveNet(WaveNetConfig(**SMALL))
    for rows in (model.embedding.weight, model.out.weight):
        steps = (rows[1:] - rows[:-1]).norm(dim=1)
        assert steps.max() < 0.3 * (rows[0] - rows[-1]).norm()
    assert model.embedding.weight.unique(dim=0).shape[0] == 256


def test_learns_a_pattern():
    torch.manual_seed(0)
    model = WaveNet(WaveNetConfig(**SMALL, n_class=16))
    codes = torch.arange(400).remainder(11)[None]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(codes[:, :-1], length=300).flatten(0, 1), codes[:, -300:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert model.generate(22, codes[0, :50], temperature=0).tolist()[0] == [(50 + i) % 11 for i in range(22)]


def test_autocast_and_compile_take_it():
    model = make(n_class=64, scale=1.0)
    codes, _ = inputs(model, 2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(codes)
    assert low.dtype == torch.bfloat16
    assert (low.float() - model(codes)).abs().max() < 0.05
    exported = torch.export.export(model, (codes,))
    torch.testing.assert_close(exported.module()(codes), model(codes))


# --- wrong arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"n_layer": 10**9}, ValueError, "n_layer must be 1 .. 1000, got 1000000000"),
        ({"n_layer": 0}, ValueError, "n_layer"),
        ({"n_layer": 2.5}, TypeError, "n_layer must be an integer, got 2.5"),
        ({"n_layer": None}, TypeError, "n_layer"),
        ({"n_layer": 1000, "residual_channels": 65536}, ValueError, "parameters is more than"),
        ({"residual_channels": 10**30}, ValueError, "residual_channels"),
        ({"n_class": 1}, ValueError, "n_class"),
        ({"n_class": 65536}, ValueError, "n_class must be 2 .. 32768, got 65536"),
        ({"dilation_cycle": 64}, ValueError, "dilation_cycle"),
        ({"kernel_size": 0}, ValueError, "kernel_size"),
        ({"condition_hop": 0}, ValueError, "condition_hop"),
        ({"n_label": -1}, ValueError, "n_label"),
        ({"sample_rate": 0}, ValueError, "sample_rate"),
        ({"companding": "alaw"}, ValueError, "companding must be 'mulaw' or 'linear', got 'alaw'"),
    ],
)
def test_absurd_configs_are_refused(config, error, words):
    with pytest.raises(error, match=words):
        WaveNetConfig(**config)


def test_config_is_normalised():
    numbers = {"n_layer": torch.tensor(6), "n_class": torch.tensor(64, dtype=torch.int16)}
    config = WaveNetConfig(**{**SMALL, **numbers})
    assert config == WaveNetConfig(**{**SMALL, "n_class": 64}) and type(config.n_layer) is int
    for variant in VARIANTS.values():
        config = WaveNetConfig(**{**SMALL, **variant})
        assert config.n_parameter == sum(p.numel() for p in WaveNet(config).parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m(torch.zeros(5, dtype=torch.int64)), r"codes must have shape \(batch, time\), got \(5,\)"),
        (lambda m: m(torch.zeros(1, 5, dtype=torch.int64), length=6), r"length must be 0 .. 5, got 6"),
        (lambda m: m(torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5, 3)), "condition must be given exactly"),
        (lambda m: m(torch.zeros(1, 5, dtype=torch.int64), label=torch.zeros(1)), "label must be given exactly"),
        (lambda m: m.generate(-1), "n must be >= 0"),
        (lambda m: m.generate(5, batch=0), "batch >= 1"),
        (lambda m: m.generate(5, torch.zeros(2, 3), batch=3), "prompt must have 3 rows"),
        (lambda m: m.generate(5, temperature=-1.0), "temperature"),
        (lambda m: m.generate(5, seed=-1), "seed"),
        (lambda m: m.generate(5, torch.tensor([64])), "codes must be in 0 .. 63"),
        (lambda m: m.generate(5, dtype=torch.float64), "dtype"),
    ],
)
def test_wrong_calls(call, words):
    with pytest.raises(ValueError, match=words):
        call(make(n_class=64))


@pytest.mark.parametrize("call", [lambda m: m(torch.rand(1, 5)), lambda m: m.generate(5, [1, 2])])
def test_sound_and_lists_are_no_codes(call):
    with pytest.raises(TypeError, match="^(codes must be integers|prompt must be a tensor)"):
        call(make(n_class=64))


def test_seconds_times_rate_are_no_number_of_samples():
    with pytest.raises(TypeError, match="^n must be an integer, got 8000.0"):
        make(n_class=64).generate(0.5 * 16000)


def test_wrong_condition_and_label():
    model = make(**VARIANTS["all, width 3"])
    codes, options = inputs(model, 2, 20)
    with pytest.raises(ValueError, match="condition must be given exactly"):
        model(codes, label=options["label"])
    with pytest.raises(ValueError, match=r"condition must have shape \(2, 3, 5\)"):
        model(codes, **{**options, "condition": torch.zeros(2, 4, 5)})
    with pytest.raises(ValueError, match="label must be 2 integers in 0 .. 2"):
        model(codes, **{**options, "label": torch.tensor([0, 3])})


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant, tmp_path):
    model = make(**VARIANTS[variant])
    model.save_pretrained(tmp_path / "model")
    assert os.stat(tmp_path / "model/model.safetensors").st_mode == os.stat(tmp_path / "model/config.json").st_mode
    again = WaveNet.from_pretrained(tmp_path / "model")
    assert again.config == model.config and not again.training
    codes, options = inputs(model, 1, 30)
    assert torch.equal(again(codes, **options), model(codes, **options))
    assert all(p.requires_grad for p in again.parameters())


def test_folder_errors(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ModelError, match="no such folder"):
        WaveNet.from_pretrained("prateek/wavenet")  # a hub's name is not looked up
    with pytest.raises(ModelError, match="no such folder"):
        WaveNet.from_pretrained(folder)
    model = make(n_class=64)
    model.save_pretrained(folder)
    good_config, good_weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()

    def config(text: str) -> None:
        (folder / "config.json").write_text(text)

    def changed(**values) -> str:
        return json.dumps({**json.loads(good_config), **values})

    cases = [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("9" * 10_000, "cannot be read as JSON"),
        ("[]", "not a WaveNetConfig"),
        ("{}", "not a WaveNetConfig"),
        (json.dumps({"n_layer": 6, "n_head": 8}), "unknown 'n_head'"),
        (changed(n_layer=10**9), "n_layer must be 1 .. 1000"),
        (changed(n_layer="6"), "n_layer must be an integer"),
        (changed(n_layer=7), "other tensors than the config asks for"),
        (changed(residual_channels=65536), "parameters is more than"),
        (changed(head_channels=25), "head.weight must be float of shape"),
        (" " * 2_000_000, "larger than"),
    ]
    for text, words in cases:
        config(text)
        with pytest.raises(ModelError, match=words):
            WaveNet.from_pretrained(folder)
    config(good_config)
    for cut in (0, 4, 100, len(good_weights) - 1):
        (folder / "model.safetensors").write_bytes(good_weights[:cut])
        with pytest.raises(ModelError, match="cannot be read as safetensors"):
            WaveNet.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(str(tmp_path / "canary"))))
    with pytest.raises(ModelError, match="no such file"):
        WaveNet.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes((folder / "pytorch_model.bin").read_bytes())
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        WaveNet.from_pretrained(folder)
    assert not (tmp_path / "canary").exists()
    os.remove(folder / "model.safetensors")
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ModelError, match="no such file"):
        WaveNet.from_pretrained(folder)


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


# --- the peers of the benchmarks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_peers_draw_the_same_codes(width, batch):
    model = make(n_class=64, kernel_size=width)
    uniforms = audiokernels.philox_uniform(3, batch, 150)
    codes = model.generate(150, seed=3, batch=batch).long()
    weights = {name: tensor.detach() for name, tensor in model.weights().items()}
    assert torch.equal(peers.ring_buffers(weights, model.config.dilations, uniforms), codes)
    assert torch.equal(peers.recompute(model, uniforms[:, :40]), codes[:, :40])
    assert torch.equal(peers.recompute(model, uniforms[:, 100:], codes[:, :100]), codes[:, 100:])
    assert peers.ring_buffers(weights, model.config.dilations, uniforms[:, :0]).shape == (batch, 0)


def test_peers_are_slower():
    rates = peers.samples_per_second(WaveNet(WaveNetConfig(n_layer=10)), seconds=0.05, rounds=3)
    assert list(rates) == ["fused kernel", "ring buffers", "recomputation"]
    assert rates["ring buffers"] > rates["recomputation"] > 0
    if audiokernels.backends()["wavenet_generate"]["cpu"].startswith("C++"):
        assert rates["fused kernel"] > 2 * rates["ring buffers"]

"""audiokernels in Hugging Face models and behind scaled_dot_product_attention: the same results, the right calls."""

import importlib
import threading

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from audiokernels import causal_attention, causal_attention_decode, dilated_conv_update
from audiokernels.integrations import flop_counter, sdpa

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    importlib.import_module("audiokernels.integrations.transformers").register()
    return transformers


@pytest.fixture
def integration(hf):
    return importlib.import_module("audiokernels.integrations.transformers")


@pytest.fixture
def calls(integration, monkeypatch):
    """The options of every call that causal_attention gets from transformers, with the sizes of q and k."""
    seen = []

    def counted(q, k, v, **options):
        seen.append((tuple(q.shape), tuple(k.shape), options["window"]))
        return causal_attention(q, k, v, **options)

    monkeypatch.setattr(integration, "causal_attention", counted)
    return seen


SMALL = {"vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(hf, name):
    """(a tiny random model, its other inputs)"""
    torch.manual_seed(0)
    other = {}
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL))
    elif name == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **SIZES, **SMALL))
    elif name == "mistral":
        config = hf.MistralConfig(num_key_value_heads=2, sliding_window=7, **SIZES, **SMALL)
        model = hf.MistralForCausalLM(config)
    elif name == "musicgen":
        config = hf.MusicgenDecoderConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, num_codebooks=2, **SMALL
        )
        model = hf.MusicgenForCausalLM(config)
        other = {"encoder_hidden_states": torch.randn(2, 5, 32)}
    else:
        config = hf.WhisperConfig(
            d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20, max_target_positions=64,
            decoder_start_token_id=1, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = hf.WhisperForConditionalGeneration(config)
        other = {"encoder_outputs": (torch.randn(2, 20, 32),)}
    for parameter in model.parameters():  # logits further apart than rounding, so that greedy choices are sure
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)
    return model.eval(), other


MODELS = ["gpt2", "llama", "mistral", "musicgen", "whisper"]


def logits_of(model, name, tokens, other, **options):
    if name == "musicgen":
        tokens = tokens.repeat_interleave(2, 0)  # codebooks
    key = "decoder_input_ids" if name == "whisper" else "input_ids"
    return model(**{key: tokens}, **other, **options)


def greedy(model, name, tokens, other, n):
    """n tokens one by one with the model's own cache."""
    cache, out, now = None, [], tokens
    for _ in range(n):
        result = logits_of(model, name, now, other, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        logits = result.logits[::2] if name == "musicgen" else result.logits
        now = logits[:, -1:].argmax(-1)
        out.append(now)
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_tokens_and_gradients(hf, calls, name):
    model, other = build(hf, name)
    tokens = torch.randint(3, 60, (2, 20))
    results = {}
    for implementation in ("sdpa", "audiokernels"):
        model.set_attn_implementation(implementation)
        logits = logits_of(model, name, tokens, other).logits
        model.zero_grad()
        logits.float().logsumexp(-1).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            results[implementation] = logits.detach(), greedy(model, name, tokens, other, 12), gradients
        if implementation == "sdpa":
            assert not calls
    (expected, tokens_sdpa, gradients_sdpa), (logits, tokens_ours, gradients) = results.values()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(tokens_ours, tokens_sdpa)
    for ours, theirs in zip(gradients, gradients_sdpa, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()) + 1e-6)
    assert calls
    if int(hf.__version__.split(".")[0]) >= 5:  # earlier ones call a single query not causal, or build masks themselves
        assert len(calls) == 2 * (1 + 12)  # two layers: the whole, and every step; cross attention is SDPA's
    assert all(q[2] <= k[2] and q[0] == 2 for q, k, _ in calls)
    assert {window for *_, window in calls} == ({7} if name == "mistral" else {None})
    if name in ("llama", "mistral"):
        assert all(k[1] == 2 for _, k, _ in calls)  # grouped heads stay grouped


def test_generate_of_transformers(hf, calls):
    model, _ = build(hf, "mistral")
    tokens = torch.randint(3, 60, (2, 10))
    options = {"max_new_tokens": 15, "do_sample": False}
    expected = model.generate(tokens, **options)
    model.set_attn_implementation("audiokernels")
    assert torch.equal(model.generate(tokens, **options), expected) and calls
    del calls[:]
    static = model.generate(tokens, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)


def test_a_window_needs_no_square_mask(hf, integration, calls, monkeypatch):
    model, _ = build(hf, "mistral")
    model.set_attn_implementation("audiokernels")
    monkeypatch.setattr(integration, "sdpa_mask", None)  # calling it would be an error
    model(torch.randint(3, 60, (1, 40)))
    assert [window for *_, window in calls] == [7, 7]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_padding_and_packing_go_to_sdpa(hf, calls, name):
    model, _ = build(hf, name)
    tokens = torch.randint(3, 60, (2, 12))
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[1, :5] = 0
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None].expand(2, -1)
    for options in ({"attention_mask": padding}, {"position_ids": packed, "use_cache": False}):
        model.set_attn_implementation("sdpa")
        expected = model(tokens, **options).logits
        model.set_attn_implementation("audiokernels")
        result = model(tokens, **options).logits
        seen = padding.bool() if "attention_mask" in options else slice(None)
        assert torch.equal(result[seen], expected[seen]) and not calls
    model(tokens, attention_mask=torch.ones(2, 12, dtype=torch.long))  # no padding in it
    assert len(calls) == 2


class Layer(torch.nn.Module):
    is_causal, num_key_value_groups, training = True, 2, False


def tensors(seqlen=9, headdim=8, seqlen_k=None):
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 4, seqlen, headdim)] + 2 * [(2, 2, seqlen_k or seqlen, headdim)]
    return [torch.randn(shape, generator=g) for shape in shapes]


def test_bookkeeping_is_ignored(integration, calls):
    q, k, v = tensors()
    expected = causal_attention(q, k, v, scale=0.3, window=4).transpose(1, 2)
    words = {word: torch.ones(2) for word in integration.BOOKKEEPING} | {
        "softcap": None,
        "s_aux": None,
        "unheard": None,
    }
    out, weights = integration.attention(Layer(), q, k, v, None, 0.0, scaling=0.3, sliding_window=4, **words)
    assert torch.equal(out, expected) and weights is None and out.is_contiguous() and len(calls) == 1


@pytest.mark.parametrize("word", ["softcap", "s_aux", "sinks", "head_mask", "cu_seq_lens_q"])
def test_what_nobody_computes_is_refused(integration, calls, word):
    with pytest.raises(ValueError, match=f"does not compute {word}: use attn_implementation="):
        integration.attention(Layer(), *tensors(), None, **{word: torch.ones(4)})
    assert not calls


def test_what_sdpa_computes_goes_there(integration, calls, monkeypatch):
    seen = []
    monkeypatch.setattr(integration, "sdpa_attention_forward", lambda *args, **kwargs: seen.append((args, kwargs)))
    q, k, v = tensors()
    integration.attention(Layer(), q, k, v, torch.ones(2, 1, 9, 9).bool())
    integration.attention(Layer(), q, k, v, None, is_causal=False)
    integration.attention(Layer(), q, k, v, None, 0.1)
    integration.attention(Layer(), q, k, v, None, position_bias=torch.zeros(1, 4, 9, 9), scaling=0.5)
    integration.attention(Layer(), *tensors(headdim=4), None)
    integration.attention(Layer(), *tensors(12, seqlen_k=9), None)
    integration.attention(Layer(), q, k, torch.cat([v, v], 3), None)
    cross = Layer()
    cross.is_causal = False
    integration.attention(cross, q, k, v, None)
    integration.attention(Layer(), q, k, v, None, output_attentions=True)
    assert len(seen) == 9 and not calls
    assert seen[3][1] == {"position_bias": seen[3][1]["position_bias"]} and seen[3][0][6] == 0.5


def test_masks(hf, integration):
    if int(hf.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 describes masks in other words: the tests of whole models stand for them")
    from transformers.masking_utils import (  # noqa: PLC0415
        causal_mask_function,
        chunked_causal_mask_function,
        sliding_window_causal_mask_function,
    )

    sizes = {"batch_size": 1, "q_length": 10, "kv_length": 10}
    assert integration.mask(**sizes) is None
    assert integration.mask(**sizes, q_offset=5, kv_offset=5) is None
    window = {"mask_function": sliding_window_causal_mask_function(3), "local_size": 3}
    assert integration.mask(**sizes, **window) is None
    chunks = {"mask_function": chunked_causal_mask_function(3, torch.zeros(1, dtype=int)), "local_size": 3}
    for options in (
        chunks,
        {"q_offset": 2},  # a static cache
        {"q_offset": torch.tensor(0)},
        {"allow_is_causal_skip": False},
        {"mask_function": lambda b, h, q, k: causal_mask_function(b, h, q, k) | (k < 2)},
        {"attention_mask": torch.arange(10)[None] > 2},
        window | {"mask_function": sliding_window_causal_mask_function(4)},
    ):
        assert integration.mask(**sizes, **options).shape == (1, 1, 10, 10), options


def test_another_name(hf, integration):
    integration.register("named_otherwise")
    model, _ = build(hf, "gpt2")
    tokens = torch.randint(3, 60, (1, 8))
    expected = model(tokens).logits
    model.set_attn_implementation("named_otherwise")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-3)


# ---- scaled_dot_product_attention


@pytest.fixture
def patched(monkeypatch):
    seen = []

    def counted(q, k, v, **options):
        seen.append(tuple(q.shape))
        return causal_attention(q, k, v, **options)

    monkeypatch.setattr(sdpa, "causal_attention", counted)
    return seen


def test_patch_takes_causal_calls(patched):
    q, k, v = tensors()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    before = F.scaled_dot_product_attention
    with sdpa.patch():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        with sdpa.patch():
            F.scaled_dot_product_attention(q, q, q, None, 0.0, True)
    torch.testing.assert_close(out, expected)
    assert len(patched) == 2 and F.scaled_dot_product_attention is before
    with pytest.raises(KeyError), sdpa.patch():
        raise KeyError
    assert F.scaled_dot_product_attention is before


def test_patch_leaves_other_calls_to_torch(patched):
    q, k, v = tensors()
    calls = [
        ((q, q, q), {}),
        ((q, q, q), {"attn_mask": torch.ones(9, 9).bool()}),
        ((q[:, :, :5], q, q), {"is_causal": True}),
        ((q[0], q[0], q[0]), {"is_causal": True}),
        ((q[..., :4], q[..., :4], q[..., :4]), {"is_causal": True}),
        ((q, q, torch.cat([q, q], 3)), {"is_causal": True}),
        ((q[:, :, :0], q[:, :, :0], q[:, :, :0]), {}),
    ]
    expected = [F.scaled_dot_product_attention(*args, **options) for args, options in calls]
    with sdpa.patch():
        results = [F.scaled_dot_product_attention(*args, **options) for args, options in calls]
        F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=0.5)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, v, is_causal=True)  # grouped heads without enable_gqa: torch's error
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True)) and not patched


def test_patch_reaches_torchs_own_layers_and_compiled_models(patched):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    x, hidden = torch.randn(2, 9, 32), torch.nn.Transformer.generate_square_subsequent_mask(9)
    expected = layer(x, hidden, is_causal=True)
    with sdpa.patch():
        torch.testing.assert_close(layer(x, hidden, is_causal=True), expected)

        def attend(q):
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

        q = tensors()[0]
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(q), attend(q))
        thread = threading.Thread(target=attend, args=(q,))
        thread.start()
        thread.join()
    assert len(patched) >= 2


# ---- the counter of operations


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flop_counter(device):
    flop_counter.register()
    flop_counter.register()  # again
    q = torch.randn(2, 4, 50, 16, device=device, requires_grad=True)
    k, v = torch.randn(2, 2, 2, 60, 16, device=device)
    pairs = 50 * 20  # the first query sees 11 keys, and so sees a whole window of them
    pairs -= sum(20 - seen for seen in range(11, 20))
    with FlopCounterMode(display=False) as counter:
        causal_attention(q, k, v, window=20).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 4 * 16 * pairs
    caches = [torch.zeros(2, 2, 30, 16, device=device) for _ in range(2)]
    steps = torch.zeros(5, dtype=torch.int32, device=device)
    x, state, weight = (torch.zeros(size, device=device) for size in ((5, 8), (5, 4, 8), (7, 8, 3)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        causal_attention_decode(q[:, :, :3], *caches, steps[:2], window=20)
        dilated_conv_update(x, state, weight, None, steps, dilation=2)
    assert counter.get_total_flops() == 4 * 2 * 4 * 3 * 20 * 16 + 2 * 5 * 7 * 8 * 3

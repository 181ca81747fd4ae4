"""The drawing rule: Sampling against numpy and Hugging Face, and the kernels' draws against it."""

import itertools

import numpy as np
import pytest
import torch
from cuda_on_host import COMPILER
from instruction_sets import in_use, instruction_sets
from transformer_cases import pack_of as transformer_pack_of
from wavenet_cases import pack_of, weights_of
from wavenet_on_host import on_host

from audiokernels import (
    Sampling,
    WaveNetStream,
    philox_uniform,
    transformer_generate,
    transformer_state,
    wavenet_generate,
    wavenet_pack,
    wavenet_state,
)
from audiokernels.transformer_generate import transformer_generate_ref
from audiokernels.wavenet_generate import wavenet_generate_ref
from audiokernels.wavenet_plan import cluster_bytes, general_bytes

CASES = [{"top_k": 1}, {"top_k": 3}, {"top_k": 40}, {"top_p": 0.05}, {"top_p": 0.5}, {"top_p": 0.99},
         {"top_k": 10, "top_p": 0.7}, {"temperature": 0.3, "top_k": 7}, {"temperature": 2.0, "top_p": 0.9},
         {"temperature": 20.0, "top_k": 40}]  # fmt: skip
ISAS = [isa for isa in instruction_sets("wavenet_generate") if isa != "reference"]


def logits_of(batch, n_class, *, seed=0, spread=2.0):
    return spread * torch.randn(batch, n_class, generator=torch.Generator().manual_seed(seed))


def kept(logits, temperature=1.0, top_k=None, top_p=None):
    """Which classes of one row stay, class by class in descending order, in float64: no threshold, no tensors."""
    p = np.exp(np.float64(logits) / temperature)
    order = sorted(range(len(p)), key=lambda c: -p[c])
    if top_k is not None:
        order = order[:top_k]
    total, held, stays = sum(p[order]), 0.0, []
    for c in order:
        if top_p is not None and held >= top_p * total:
            break
        stays.append(c)
        held += p[c]
    return sorted(stays)


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("n_class", [2, 50, 256, 1000])
def test_the_classes_that_stay(options, n_class):
    logits = logits_of(20, n_class)
    weights = Sampling(**options).weights(logits)
    whole = Sampling(options.get("temperature", 1.0)).weights(logits)
    for row, mine, all_ in zip(logits, weights, whole, strict=True):
        stays = kept(row.numpy(), **options)
        assert mine.nonzero()[:, 0].tolist() == stays
        assert torch.equal(mine[stays], all_[stays])


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_same_classes_as_hugging_face(options):
    process = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed").generation
    temperature, logits = options.get("temperature", 1.0), logits_of(20, 256)
    scores = logits / temperature
    if "top_k" in options:
        scores = process.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = process.TopPLogitsWarper(options["top_p"])(None, scores)
    weights = Sampling(**options).weights(logits)
    assert torch.equal(weights > 0, scores > -torch.inf)
    expected = scores.softmax(1)
    assert torch.allclose(weights / weights.sum(1, keepdim=True), expected, atol=1e-6)


def test_classes_that_tie_stay_together():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    for options, stays in (
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 2, 3, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 6}, list(range(6))),
        ({"top_k": 600}, list(range(6))),
        ({"top_p": 1e-30}, [1]),
        ({"top_p": 0.5}, [1, 2, 3, 4]),
        ({"top_k": 2, "top_p": 0.9}, [1, 2, 3, 4]),
        ({"top_p": 1.0}, list(range(6))),
        ({"temperature": 0, "top_k": 3}, [1]),
    ):
        assert Sampling(**options).weights(logits)[0].nonzero()[:, 0].tolist() == stays, options
    near = torch.tensor([[0.0, 1e-9, 2e-9]])  # alike as probabilities
    assert Sampling(top_k=2).weights(near).tolist() == [[0, 1, 1]]
    assert Sampling(top_p=0.1).weights(near).tolist() == [[1, 1, 1]]
    flat = Sampling(top_k=1, top_p=0.1).weights(torch.zeros(1, 7))
    assert flat.tolist() == [[1.0] * 7]


def test_a_draw_is_the_inverse_cdf_of_what_stays():
    """Over a grid of numbers each class is drawn as often as its share says, in ascending order; others never."""
    logits, n = logits_of(1, 12), 4000
    uniforms = (torch.arange(n) + 0.5) / n
    for options in ({}, {"top_k": 4}, {"top_p": 0.6}, {"temperature": 0}):
        sampling = Sampling(**options)
        drawn = sampling.draw(logits.expand(n, -1), uniforms)
        assert torch.equal(drawn, drawn.sort().values)
        weights = sampling.weights(logits)[0]
        counts = torch.bincount(drawn, minlength=12)
        assert (counts - n * weights / weights.sum()).abs().max() <= 1
    first, last = logits[0].topk(2).indices.sort().values.tolist()
    assert Sampling(top_k=2).draw(logits.expand(2, -1), torch.tensor([0.0, 1 - 2**-24])).tolist() == [first, last]


WRONG = [
    (TypeError, "temperature must be a number, got str", {"temperature": "hot"}),
    (ValueError, "temperature must be finite and >= 0, got -1", {"temperature": -1}),
    (ValueError, "temperature must be finite and >= 0, got nan", {"temperature": float("nan")}),
    (TypeError, "top_k must be an integer, got float", {"top_k": 2.0}),
    (TypeError, "top_k must be an integer, got bool", {"top_k": True}),
    (ValueError, "top_k must be >= 1, got 0", {"top_k": 0}),
    (ValueError, "top_k must be >= 1, got -3", {"top_k": -3}),
    (TypeError, "top_p must be a number, got str", {"top_p": "0.9"}),
    (ValueError, "top_p must be above 0 and at most 1, got 0", {"top_p": 0}),
    (ValueError, "top_p must be above 0 and at most 1, got 1.5", {"top_p": 1.5}),
    (ValueError, "top_p must be above 0 and at most 1, got nan", {"top_p": float("nan")}),
]


@pytest.mark.parametrize(("error", "message", "options"), WRONG)
def test_wrong_numbers_are_named(error, message, options):
    with pytest.raises(error, match=f"^{message}"):
        Sampling(**options)


def test_numbers_of_numpy_are_numbers():
    mine = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float32(0.75))
    assert mine == Sampling(0.5, 3, 0.75)
    logits, uniforms = logits_of(50, 12), torch.rand(50)
    assert torch.equal(mine.draw(logits, uniforms), Sampling(0.5, 3, 0.75).draw(logits, uniforms))


def test_draw_names_what_does_not_fit():
    for logits, uniforms in ((torch.zeros(4), torch.zeros(4)), (torch.zeros(4, 3), torch.zeros(3))):
        with pytest.raises(ValueError, match="^logits must have shape"):
            Sampling().draw(logits, uniforms)
    with pytest.raises(TypeError, match="^uniforms must be a tensor, got float"):
        Sampling().draw(torch.zeros(1, 3), 0.5)


# ---- the kernels


def differing(options, logits, uniforms, codes):
    """How many codes the rule does not draw from these logits, and how many of those no rounding can explain.

    A code may differ where u lies within 2^-16 of an edge of the CDF, or top_p within 1e-5 of where a class comes in.
    """
    flat, u, codes = logits.flatten(0, 1), uniforms.flatten(), codes.flatten().long()
    wrong = Sampling(**options).draw(flat, u) != codes
    right = torch.zeros_like(wrong)
    for du, dp in itertools.product((-(2**-16), 0, 2**-16), (-1e-5, 0, 1e-5)):
        near = {**options, **({"top_p": options["top_p"] + dp} if "top_p" in options else {})}
        right |= Sampling(**near).draw(flat, (u + du).clamp(0, 1 - 2**-24)) == codes
    return int(wrong.sum()), int((wrong & ~right).sum())


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("n_class", [50, 256, 300])
def test_cpu_kernel_draws_by_the_rule(options, n_class):
    pack = pack_of([1, 2, 4], n_class=n_class)
    uniforms = philox_uniform(3, 4, 300)
    codes, logits = wavenet_generate(pack, wavenet_state(pack, 4), uniforms, **options, return_logits=True)
    wrong, unexplained = differing(options, logits, uniforms, codes)
    assert wrong <= 2 and unexplained == 0
    free = wavenet_generate(pack, wavenet_state(pack, 4), uniforms, temperature=options.get("temperature", 1.0))
    assert not torch.equal(codes, free)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_transformer_kernel_and_references_draw_by_the_rule(options):
    uniforms, wavenet, transformer = philox_uniform(3, 4, 60), pack_of([1, 2, 4]), transformer_pack_of()
    numbers = (options.get("temperature", 1.0), True, options.get("top_k"), options.get("top_p"))
    made = [
        transformer_generate(transformer, transformer_state(transformer, 4), uniforms, **options, return_logits=True)
    ]
    for pack, state, reference in (
        (wavenet, wavenet_state, wavenet_generate_ref),
        (transformer, transformer_state, transformer_generate_ref),
    ):
        made.append(reference(pack.data, pack.shape.to_ints(), state(pack, 4), uniforms, None, None, *numbers))
    for codes, logits in made:
        wrong, unexplained = differing(options, logits, uniforms, codes)
        assert wrong <= 1 and unexplained == 0


@pytest.mark.parametrize("options", [(None, None), (5, None), (None, 0.9), (5, 0.9)])
def test_opcheck(options):
    ops = torch.ops.audiokernels
    for pack, state, op in (
        (pack_of([1, 2]), wavenet_state, ops.wavenet_generate.default),
        (transformer_pack_of(), transformer_state, ops.transformer_generate.default),
    ):
        call = (pack.data, pack.shape.to_ints(), state(pack, 2), philox_uniform(0, 2, 6), None, None, 1.0, True)
        torch.library.opcheck(op, (*call, *options))


@pytest.mark.parametrize("options", CASES, ids=str)
def test_codes_do_not_depend_on_instruction_set_batch_or_chunks(options):
    for dtype in (torch.float32, torch.int8):
        pack, uniforms = pack_of([1, 2, 4], n_class=256, dtype=dtype), philox_uniform(4, 9, 120)
        codes = wavenet_generate(pack, wavenet_state(pack, 9), uniforms, **options)
        for isa in ISAS:
            with in_use(isa):
                assert torch.equal(wavenet_generate(pack, wavenet_state(pack, 9), uniforms, **options), codes), isa
        state = wavenet_state(pack, 1)
        parts = [wavenet_generate(pack, state, uniforms[6:7, a:b], **options) for a, b in ((0, 1), (1, 50), (50, 120))]
        assert torch.equal(torch.cat(parts, 1), codes[6:7])


def tied(levels, dtype=torch.float32):
    """A pack whose logits are always these."""
    weights = weights_of(2, n_class=len(levels))
    weights["out_weight"].zero_()
    weights["out_bias"] = torch.tensor(levels)
    return wavenet_pack(weights, [1, 2], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", instruction_sets("wavenet_generate"))
def test_temperatures_that_float32_does_not_hold(isa, dtype):
    """None makes a NaN of the difference between two logits, nor draws what pads 15 classes to 16."""
    levels = [-1.0, 0.5, 0.5, -1.0, 0.0] * 3
    pack, uniforms = tied(levels, dtype), (torch.arange(150.0)[None] + 0.5) / 150
    for temperature, stays in ((1e-300, [1, 2]), (1e-39, [1, 2]), (2e38, range(5)), (1e300, range(5))):
        stays = [5 * i + c for i in range(3) for c in stays]
        weights = Sampling(temperature).weights(torch.tensor([levels]))[0]
        assert weights.tolist() == [float(c in stays) for c in range(15)]
        with in_use(isa):
            codes = wavenet_generate(pack, wavenet_state(pack, 1), uniforms, temperature=temperature)
            streamed = WaveNetStream(pack, temperature=temperature).read(400)
        assert codes.unique().tolist() == stays and np.unique(streamed).tolist() == stays


@pytest.mark.parametrize("kernel", [*ISAS, "general"])
def test_kernels_keep_classes_that_tie(kernel):
    levels = [-1.0, 0.5, 0.5, -1.0, 0.5, 0.0, -0.0, -2.0] * 3  # 9 of 0.5, 6 of 0, 6 of -1, 3 of -2
    pack = tied(levels)
    uniforms = (torch.arange(150.0)[None] + 0.5) / 150
    if kernel == "general" and COMPILER is None:
        pytest.skip("no C++ compiler")
    for options in ({"top_k": 1}, {"top_k": 9}, {"top_k": 10}, {"top_k": 16}, {"top_p": 1e-30}, {"top_p": 0.8}):
        if kernel == "general":
            plan = (1, general_bytes(pack.shape, 1), 0, 0)
            codes = on_host("general", plan, pack, wavenet_state(pack, 1), uniforms, **options)
        else:
            with in_use(kernel):
                codes = wavenet_generate(pack, wavenet_state(pack, 1), uniforms, **options)
        stays = Sampling(**options).weights(torch.tensor([levels]))[0].nonzero()[:, 0]
        assert torch.equal(codes.unique().long(), stays), options


def test_off_is_off():
    pack, uniforms = pack_of([1, 2, 4]), philox_uniform(4, 2, 200)
    codes = wavenet_generate(pack, wavenet_state(pack, 2), uniforms)
    for options in ({"top_k": 64}, {"top_k": 2**40}, {"top_p": 1.0}, {"top_k": 99, "top_p": 1}):
        assert torch.equal(wavenet_generate(pack, wavenet_state(pack, 2), uniforms, **options), codes)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("kernel", ["general", "cluster"])
def test_gpu_kernels_draw_by_the_rule(kernel):
    """Run on the host, in another order of threads for each case."""
    sizes = {"residual": 32, "hidden": 32, "skip": 64, "head": 64}
    for seed, options in enumerate(CASES):
        pack = pack_of([1, 2], dtype=torch.float16, n_class=64 if kernel == "cluster" else 50, **sizes)
        plan = (4, general_bytes(pack.shape, 4), 0, 0) if kernel == "general" else None
        plan = plan or (1, 1, 2, cluster_bytes(pack.shape, 1, 1, 2))
        uniforms = philox_uniform(3, 3, 12)
        run = {"seed": seed, "return_logits": True, **options}
        codes, logits = on_host(kernel, plan, pack, wavenet_state(pack, 3), uniforms, **run)
        wrong, unexplained = differing(options, logits, uniforms, codes)
        assert wrong <= 1 and unexplained == 0, options


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gpu_kernels_on_a_gpu(dtype):
    pack = pack_of([1, 2, 4], dtype=dtype, residual=32, hidden=32, skip=64, head=64, n_class=256).to("cuda")
    uniforms = philox_uniform(3, 5, 400)
    for options in CASES:
        state = wavenet_state(pack, 5)
        codes, logits = wavenet_generate(pack, state, uniforms.cuda(), **options, return_logits=True)
        wrong, unexplained = differing(options, logits.cpu(), uniforms, codes.cpu())
        assert wrong <= 5 and unexplained == 0, options

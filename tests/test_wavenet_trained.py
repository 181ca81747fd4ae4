"""The WaveNet kernels on a trained checkpoint, whose distributions are sharp (random weights give near-uniform ones).

tests/data/wavenet_guitar: 10 layers, 32 channels, 500 steps of training on the first 80 % of the bundled recording
music/guitar_em9.flac (CC0-1.0).
"""

import math
from pathlib import Path

import pytest
import torch
from cuda_on_host import COMPILER
from torch.nn import functional as F
from wavenet_cases import DTYPES, differing_draws, full_logits
from wavenet_on_host import on_host

from audiokernels import philox_uniform, wavenet_generate, wavenet_state, wavenet_unpack
from audiokernels._library import C
from audiokernels.wavenet_plan import cluster_bytes

pytest.importorskip("safetensors")
pytest.importorskip("soundfile")
from audiomodels.data import Recordings, clips  # noqa: E402
from audiomodels.wavenet import WaveNet  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return WaveNet.from_pretrained(Path(__file__).parent / "data" / "wavenet_guitar").eval()


@pytest.fixture(scope="module")
def unseen():
    """The last 20 % of the recording, as codes (1, 12800)."""
    recordings = Recordings.load(clips() / "music" / "guitar_em9.flac", sample_rate=16000, companding="mulaw")
    return recordings.cut(0.8)[1][0].codes[None]


def bits(logits, codes, skip):
    """Bits per sample of codes[:, skip:]."""
    loss = F.cross_entropy(logits[0, skip:].double(), codes[0, skip:].long())
    return float(loss) / math.log(2)


@pytest.mark.skipif(C is None, reason="the reference alone would take minutes")
def test_bits_per_sample_of_every_pack(model, unseen):
    """DESIGN 3: bfloat16 costs less than 0.01 bits per sample, int8 less than 0.03; float32 nothing."""
    n, skip = unseen.shape[1], model.receptive_field
    w = {name: tensor.detach() for name, tensor in model.weights().items()}
    exact = bits(full_logits(w, model.config.dilations, unseen), unseen, skip)
    assert 1.5 < exact < 3.5  # it is trained: bigrams of the codes need more than 4 bits
    for dtype, allowed in zip(DTYPES, (1e-4, 0.01, 0.03, 0.002), strict=True):
        pack = model.pack(dtype)
        _, logits = wavenet_generate(
            pack, wavenet_state(pack, 1), philox_uniform(0, 1, n), codes=unseen, return_logits=True
        )
        assert bits(logits, unseen, skip) - exact < allowed, dtype


@pytest.mark.skipif(C is None, reason="the reference alone would take minutes")
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_are_those_of_the_reference_or_on_an_edge(model, dtype):
    """20,000 free-running draws, each repeated under teacher forcing by plain torch on the exact weights."""
    pack, batch, n = model.pack(dtype), 2, 10_000
    uniforms = philox_uniform(7, batch, n)
    codes, logits = wavenet_generate(pack, wavenet_state(pack, batch), uniforms, return_logits=True)
    w = {name: tensor.detach() for name, tensor in model.weights().items()}
    expected = full_logits(w, model.config.dilations, codes, dtype=torch.float32)
    scale = max(1.0, float(expected.abs().max()))
    bound = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05, torch.int8: 0.15}[dtype] * scale
    assert float((logits - expected).abs().max()) <= bound
    differ, off_edge = differing_draws(logits, expected, uniforms, codes)
    assert off_edge == 0
    if dtype == torch.float32:
        assert differ <= batch * n // 10_000
        exact = full_logits(w, model.config.dilations, codes)  # incremental equals full, over ten receptive fields
        assert float((logits - exact).abs().max()) <= 1e-5 * scale
    assert len(codes.unique()) > 50


@pytest.mark.skipif(C is None or COMPILER is None, reason="the reference alone would take minutes")
def test_draws_of_the_cluster_kernel(model):
    """Issue 5: fewer than 1 % of the draws differ: the probability that a number lies between the CDFs' edges."""
    pack, exact, batch, n, layout = model.pack(torch.float16), model.pack(), 8, 16, (1, 2, 4)
    state, uniforms = wavenet_state(exact, batch), philox_uniform(4, batch, n)
    wavenet_generate(exact, state, philox_uniform(3, batch, 1100))  # more than a receptive field
    other, plan = state.clone(), (*layout, cluster_bytes(pack.shape, *layout))
    codes, logits = on_host("cluster", plan, pack, state, uniforms, return_logits=True)
    _, expected = wavenet_generate(exact, other, uniforms, codes=codes, return_logits=True)
    assert (logits - expected).square().mean() < 1e-6 * expected.square().mean()
    cdf, of_exact = (torch.softmax(x.double(), 2).cumsum(2) for x in (logits, expected))
    assert 0 < (cdf - of_exact).abs().sum(2).mean() < 0.01
    assert differing_draws(logits, expected, uniforms, codes)[1] == 0


def test_model_and_pack_agree(model, unseen):
    """The training forward of the model gives the logits that generation uses."""
    pack, part = model.pack(), unseen[:, :300]
    start = torch.full_like(part[:, :1], pack.shape.n_class // 2)
    with torch.no_grad():
        expected = model(torch.cat([start, part[:, :-1]], 1))
    _, logits = wavenet_generate(
        pack, wavenet_state(pack, 1), philox_uniform(0, 1, 300), codes=part, return_logits=True
    )
    assert float((logits - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert set(wavenet_unpack(pack.data, pack.shape)) == set(model.weights())

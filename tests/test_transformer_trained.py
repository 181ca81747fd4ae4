"""The transformer kernels on a trained checkpoint: its distributions are sharp, those of random weights near uniform.

tests/data/transformer_guitar: 2 layers of 48 channels, a window of 256, a context network over 4,000 samples; 500 steps
of training on the first 80 % of the bundled recording music/guitar_em9.flac (CC0-1.0).
"""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformer_cases import DTYPES
from wavenet_cases import differing_draws

from audiokernels import philox_uniform, transformer_generate, transformer_state
from audiokernels._library import C

pytest.importorskip("safetensors")
pytest.importorskip("soundfile")
from audiomodels.data import Recordings, clips  # noqa: E402
from audiomodels.sample_transformer import SampleTransformer  # noqa: E402

pytestmark = pytest.mark.skipif(C is None, reason="the reference alone would take minutes")


@pytest.fixture(scope="module")
def model():
    return SampleTransformer.from_pretrained(Path(__file__).parent / "data" / "transformer_guitar").eval()


@pytest.fixture(scope="module")
def unseen():
    """The last 20 % of the recording, as codes (1, 12800)."""
    recordings = Recordings.load(clips() / "music" / "guitar_em9.flac", sample_rate=16000, companding="mulaw")
    return recordings.cut(0.8)[1][0].codes[None]


@torch.no_grad()
def forward(model, codes):
    """The logits of the training forward from which generation draws `codes`, in float64."""
    start = torch.full_like(codes[:, :1], model.config.n_class // 2)
    return model.double()(torch.cat([start, codes[:, :-1]], 1))


def bits(logits, codes, skip):
    """Bits per sample of codes[:, skip:]."""
    loss = F.cross_entropy(logits[0, skip:].double(), codes[0, skip:].long())
    return float(loss) / math.log(2)


def test_bits_per_sample_of_every_pack(model, unseen):
    """DESIGN 3: bfloat16 costs less than 0.01 bits per sample, int8 less than 0.03; float32 nothing."""
    n, skip = 8000, 4000
    codes = unseen[:, :n]
    packs = [model.float().pack(dtype) for dtype in DTYPES]
    exact = bits(forward(model, codes), codes, skip)
    assert 1.5 < exact < 4.0  # it is trained: bigrams of the codes need more than 4 bits
    for pack, allowed in zip(packs, (1e-4, 0.01, 0.03), strict=True):
        _, logits = transformer_generate(
            pack, transformer_state(pack, 1), philox_uniform(0, 1, n), codes=codes, return_logits=True
        )
        assert bits(logits, codes, skip) - exact < allowed, pack.shape.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_are_those_of_the_model_or_on_an_edge(model, dtype):
    """10,000 free-running draws, each repeated by the model over the whole sequence, in float64 on exact weights."""
    pack, batch, n = model.float().pack(dtype), 2, 5000
    uniforms = philox_uniform(7, batch, n)
    codes, logits = transformer_generate(pack, transformer_state(pack, batch), uniforms, return_logits=True)
    expected = forward(model, codes)
    scale = max(1.0, float(expected.abs().max()))
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.int8: 0.15}[dtype] * scale
    assert float((logits - expected).abs().max()) <= bound
    differ, off_edge = differing_draws(logits, expected, uniforms, codes)
    assert off_edge == 0
    if dtype == torch.float32:
        assert differ <= batch * n // 10_000
    assert len(codes.unique()) > 40

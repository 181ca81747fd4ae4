"""Fast PyTorch ops for sequence models over raw audio. `python -m audiokernels` shows which kernel serves which op."""

from audiokernels._library import version as _version
from audiokernels.backends import Explanation, backends, explain, use_reference
from audiokernels.causal_attention import causal_attention
from audiokernels.causal_attention_decode import causal_attention_decode, kv_cache_update
from audiokernels.dilated_conv_update import dilated_conv_update
from audiokernels.haar_dwt import haar_dwt, haar_idwt
from audiokernels.haar_levels import haar_levels
from audiokernels.haar_pool import haar_pool, haar_pool_
from audiokernels.haar_pool_update import haar_pool_state, haar_pool_update
from audiokernels.philox import philox_uniform
from audiokernels.sampling import Sampling
from audiokernels.transformer_generate import transformer_generate, transformer_position, transformer_state
from audiokernels.transformer_pack import TransformerPack, TransformerShape, transformer_pack
from audiokernels.wavenet_generate import wavenet_generate, wavenet_position, wavenet_state
from audiokernels.wavenet_pack import WaveNetPack, WaveNetShape, wavenet_pack, wavenet_unpack
from audiokernels.wavenet_stream import WaveNetStream

__all__ = [
    "Explanation",
    "Sampling",
    "TransformerPack",
    "TransformerShape",
    "WaveNetPack",
    "WaveNetShape",
    "WaveNetStream",
    "backends",
    "causal_attention",
    "causal_attention_decode",
    "dilated_conv_update",
    "explain",
    "haar_dwt",
    "haar_idwt",
    "haar_levels",
    "haar_pool",
    "haar_pool_",
    "haar_pool_state",
    "haar_pool_update",
    "kv_cache_update",
    "philox_uniform",
    "transformer_generate",
    "transformer_pack",
    "transformer_position",
    "transformer_state",
    "use_reference",
    "wavenet_generate",
    "wavenet_pack",
    "wavenet_position",
    "wavenet_state",
    "wavenet_unpack",
]
__version__ = _version()

"""Drop-in modules on fastattn's ops.

Where torch.nn has the class, ours inherits from it, takes the same arguments, has the same state_dict and gives the
same results; differences are named in its docstring. None of these classes keeps state beyond its base's, so that a
module of torch.nn can become one of ours, and back, by its class alone.
"""

from .additive_attention import AdditiveAttention
from .attention import MultiheadAttention
from .feed_forward import FeedForward, Linear
from .norm import LayerNorm, RMSNorm
from .positional import (
    ALiBi,
    LearnedPositionalEncoding,
    RelativePositionBias,
    RotaryEmbedding,
    SinusoidalPositionalEncoding,
)
from .transformer import Transformer
from .transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "ALiBi",
    "AdditiveAttention",
    "FeedForward",
    "LayerNorm",
    "LearnedPositionalEncoding",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

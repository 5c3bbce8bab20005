"""The public functions, one an op: checks, autocast, dispatch, autograd. `fastattn.<op>` is `fastattn.ops.<op>`."""

from .additive_attention import additive_attention
from .attention import attention
from .attention_summary import attention_summary
from .attention_varlen import attention_varlen
from .attention_with_kvcache import attention_with_kvcache
from .decoder_layer import decoder_layer
from .encoder_layer import encoder_layer
from .feed_forward import feed_forward
from .info_nce import info_nce
from .layer_norm import layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .rms_norm import rms_norm
from .rotary_embedding import rotary_embedding

__all__ = [
    "additive_attention",
    "attention",
    "attention_summary",
    "attention_varlen",
    "attention_with_kvcache",
    "decoder_layer",
    "encoder_layer",
    "feed_forward",
    "info_nce",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rotary_embedding",
]

"""When a layer may run as `ops.decoder_layer`, which has no gradients and no dropout: what it is asked, and how it is read.

The weights are read from the modules in every call: one that changes, or is replaced, hooked or adapted, counts from that
call on.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastattn import _watch, ops
from fastattn.nn import FeedForward, LayerNorm, RMSNorm, _modules
from fastattn.nn._encoder_layer import may_run
from fastattn.nn.feed_forward import weights

from .self_attention import Angles, Continued, SelfAttention

if TYPE_CHECKING:
    from .layers import PreNormLayer


def run(
    layer: "PreNormLayer",
    branch: Tensor | None,
    x: Tensor,
    tokens: Continued,
    angles: Angles,
) -> Tensor | None:
    """The layer on branch + x (batch, new, d_model), with its own last branch added; None where it has to run in parts."""
    attention, network, cache = layer.attention, layer.feed_forward, tokens.cache
    if layer.cross is not None or tokens.bias is not None or not _plain_attention(attention):
        return None
    if type(network) is not FeedForward or _modules.hooked(network) or not may_run(network.dropout):
        return None
    if layer.dropout and layer.training:
        return None
    norm1, norm2 = _plain_norm(layer.norm1), _plain_norm(layer.norm2)
    qkv, out = weights(attention.qkv), weights(attention.out)
    first, last = weights(network.linear1), weights(network.linear2)
    gate = (None, None) if network.linear_gate is None else weights(network.linear_gate)
    if norm1 is None or norm2 is None or norm1[0] != norm2[0]:
        return None
    if qkv is None or out is None or first is None or last is None or gate is None or gate[1] is not None:
        return None
    cos, sin = (None, None) if angles is None else angles
    return ops.decoder_layer(
        x if branch is None else x + branch,
        cache.keys[attention.layer],
        cache.values[attention.layer],
        *qkv,
        *out,
        *norm1[1:3],
        *first,
        *last,
        *norm2[1:3],
        cache_seqlens=cache.lengths,
        w_gate=gate[0],
        cos=cos,
        sin=sin,
        activation=network.activation,
        norm=norm1[0],
        eps1=norm1[3],
        eps2=norm2[3],
        scale=attention.scale,
    )


def _plain_attention(attention: Any) -> bool:
    """Self-attention that is no more than its projections' weights."""
    return (
        type(attention) is SelfAttention
        and not _modules.hooked(attention)
        and not _watch.watched(attention)
        and not (attention.dropout and attention.training)
    )


def _plain_norm(norm: Any) -> tuple[str, Tensor | None, Tensor | None, float] | None:
    """(kind, weight, bias, eps) of a norm that is no more than these."""
    if _modules.hooked(norm) or len(norm.normalized_shape) != 1 or norm.eps is None:
        return None
    if type(norm) is LayerNorm:
        return "layer", norm.weight, norm.bias, norm.eps
    return ("rms", norm.weight, None, norm.eps) if type(norm) is RMSNorm else None

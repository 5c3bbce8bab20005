"""When a layer may run as `ops.encoder_layer`, which has no gradients and no dropout: what it is asked, and how it is read.

The weights are read from the modules in every call: one that changes, or is replaced, hooked or adapted, counts from that
call on.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import _watch, ops
from . import _modules
from .attention import MultiheadAttention
from .feed_forward import activation_name, weights
from .norm import LayerNorm


def may_run(*dropouts: Any) -> bool:
    """Whether nothing is recorded, transformed, converted or dropped."""
    if torch.is_grad_enabled() or _are_functorch_transforms_active() or torch._C._is_any_autocast_enabled():
        return False
    return all(_modules.dropout_p(dropout) == 0.0 for dropout in dropouts)


def plain_norm(norm: Any) -> tuple[Tensor | None, Tensor | None, float] | None:
    """(weight, bias, eps) of a layer norm that is no more than these."""
    plain = type(norm) is nn.LayerNorm or (isinstance(norm, LayerNorm) and type(norm).forward is LayerNorm.forward)
    if not plain or _modules.hooked(norm) or getattr(norm, "dropout", None) or len(norm.normalized_shape) != 1:
        return None
    return norm.weight, norm.bias, norm.eps


def run(layer: Any, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor | None:
    """A TransformerEncoderLayer on (batch, seq, E), or (tokens, E) with cu_seqlens; None where it has to run in parts."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.ndim != (3 if cu_seqlens is None else 2):
        return None
    if not may_run(layer.dropout, layer.dropout1, layer.dropout2):
        return None
    attention, name = layer.self_attn, activation_name(layer.activation)
    first, last = weights(layer.linear1), weights(layer.linear2)
    norm1, norm2 = plain_norm(layer.norm1), plain_norm(layer.norm2)
    if (
        name is None
        or first is None
        or last is None
        or norm1 is None
        or norm2 is None
        or not _plain_attention(attention)
    ):
        return None
    if x.shape[-1] != attention.embed_dim or x.dtype != attention.in_proj_weight.dtype:
        return None  # the parts say what is wrong
    query, key, value = attention.in_proj_weight.chunk(3)
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    out = attention.out_proj
    layered = ops.encoder_layer(
        x if cu_seqlens is None else x.unsqueeze(0),
        query,
        biases[0],
        key,
        biases[1],
        value,
        biases[2],
        out.weight,
        out.bias,
        norm1[0],
        norm1[1],
        first[0],
        first[1],
        last[0],
        last[1],
        norm2[0],
        norm2[1],
        attention.num_heads,
        name,
        norm1[2],
        norm2[2],
        layer.norm_first,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )
    return layered if cu_seqlens is None else layered.squeeze(0)


def _plain_attention(attention: Any) -> bool:
    """Self-attention that is no more than its projections' weights."""
    if not isinstance(attention, MultiheadAttention) or type(attention).forward is not MultiheadAttention.forward:
        return False
    out = attention.out_proj
    return (
        type(out) in (NonDynamicallyQuantizableLinear, nn.Linear)
        and not _modules.hooked(attention)
        and not _watch.watched(attention)
        and not _modules.hooked(out)
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and (attention.dropout == 0.0 or not attention.training)
    )

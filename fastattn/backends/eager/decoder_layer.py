"""A layer of a decoder (Radford et al., 2019; Touvron et al., 2023) on tokens that follow those in a cache, the definition.

h = x + w_out . attention(norm1(x)) + b_out;   out = h + feed_forward(norm2(h)), without dropout
attention(x) = softmax(scale * query . keys^T) . values, head by head, with query, key, value = w_qkv . x + b_qkv, query and key
               turned by cos and sin where given; key and value are written behind those of the cache
"""

import torch.nn.functional as F
from torch import Tensor

from . import attention_with_kvcache, layer_norm, rms_norm
from .activation import ACTIVATIONS


def forward(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    activation: str,
    norm: str,
    eps1: float,
    eps2: float,
    scale: float,
) -> Tensor:
    """x (batch, new, width); arguments as in docs/architecture.md."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = w_out.shape[1] // head_dim

    def attend(x: Tensor) -> Tensor:
        projected = F.linear(x, w_qkv, b_qkv).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        query, key, value = projected.split([heads, kv_heads, kv_heads], dim=1)
        cached = (k_cache, v_cache, key, value, cache_seqlens, None, None, cos, sin)
        out, _ = attention_with_kvcache.forward(query, *cached, scale, -1, 0, 0.0, False)
        return F.linear(out.transpose(1, 2).flatten(2), w_out, b_out)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, w1, b1)
        if w_gate is None:
            return F.linear(ACTIVATIONS[activation](hidden), w2, b2)
        return F.linear(ACTIVATIONS[activation](F.linear(x, w_gate)) * hidden, w2, b2)

    def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        if norm == "rms":
            return rms_norm.forward(x, weight, None, None, eps, 0.0)[0]
        return layer_norm.forward(x, weight, bias, None, None, eps, 0.0)[0]

    h = x + attend(normed(x, norm1_weight, norm1_bias, eps1))
    return h + feed_forward(normed(h, norm2_weight, norm2_bias, eps2))

"""A whole decoder layer on new tokens: the kernels of its parts one after the other.

h = x + w_out . attention(norm1(x)) + b_out;   out = h + feed_forward(norm2(h))

Biases, the activation and both residual adds are epilogues of the products, and the heads are views of the one projection. For a
few tokens a layer's time is that of reading its weights, and of as many launches as it has parts.
"""

from typing import Any

from torch import Tensor

from . import _launch, attention_with_kvcache, feed_forward, norm
from .matmul import flat, product


def unsupported(
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
    *settings: Any,
) -> str | None:
    """Why the kernel cannot take this call; None if it can. (The norms may be float32 beside another dtype.)"""
    why = _launch.unsupported(x, k_cache, v_cache, w_qkv, w_out, w1, w2) or norm.unsupported(x)
    if why is not None:
        return why
    query = x.new_empty((x.shape[0], w_out.shape[1] // k_cache.shape[3], 0, k_cache.shape[3]))
    cached = (query, k_cache, v_cache, None, None, cache_seqlens, None, None, cos, sin)
    return attention_with_kvcache.unsupported(*cached, 1.0, -1, 0, 0.0, False)


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
    norm_kind: str,
    eps1: float,
    eps2: float,
    scale: float,
) -> Tensor:
    """Arguments and result as in docs/architecture.md, "Normalised arguments"."""
    batch, new, _ = x.shape
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    heads = w_out.shape[1] // head_dim

    def project(tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        out = tokens.new_empty((tokens.shape[0], weight.shape[0]))
        return product(tokens, weight.t(), out, bias=bias, residual=residual)

    def attend(tokens: Tensor) -> Tensor:
        projected = project(tokens, w_qkv, b_qkv).view(batch, new, heads + 2 * kv_heads, head_dim)
        query, key, value = projected.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
        cached = (k_cache, v_cache, key, value, cache_seqlens, None, None, cos, sin)
        out, _ = attention_with_kvcache.forward(query, *cached, scale, -1, 0, 0.0, False)
        return out.transpose(1, 2).reshape(batch * new, heads * head_dim)

    def normed(tokens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return norm.forward(tokens, weight, bias, None, None, eps, 0.0, centred=norm_kind == "layer")[0]

    tokens = flat(x)
    h = project(attend(normed(tokens, norm1_weight, norm1_bias, eps1)), w_out, b_out, tokens)
    hidden = feed_forward.hidden_of(normed(h, norm2_weight, norm2_bias, eps2), w1, b1, w_gate, None, activation, 0.0)
    return project(hidden, w2, b2, h).view(x.shape)

"""A whole layer of a decoder as one op, on tokens that follow those in a key-value cache, for inference."""

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import _autocast, _checks, _library
from .attention_with_kvcache import check_lengths
from .linear import activation_name, matrix_product, vector

NORMS = ("layer", "rms")


def decoder_layer(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
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
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    *,
    cache_seqlens: Tensor,
    w_gate: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    activation: str = "gelu",
    norm: str = "layer",
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    scale: float | None = None,
) -> Tensor:
    """h + feed_forward(norm2(h)) with h = x + attention(norm1(x)), in one call; for inference.

    The new tokens' keys and values are written behind those of the cache, in place, and attention is causal. Nothing is
    prepared or kept between calls: a weight that changes counts from the next call on.

    Args:
        x: (batch, new, width), float32, bfloat16, float16 or float64, the newest tokens of each sequence.
        k_cache, v_cache: (batch, kv_heads, capacity, head_dim), in x's dtype. Changed in place.
        w_qkv: ((heads + 2 · kv_heads) · head_dim, width), rows of queries, keys and values, head after head; w_out: (width,
            heads · head_dim); any strides, in x's dtype. heads is a multiple of kv_heads.
        w1, w_gate: (hidden, width); w2: (width, hidden). With w_gate the network is w2 · (activation(w_gate · x) ∘ (w1 · x)).
        b_qkv, b_out, b1, b2: the biases, or None.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (width,), in x's dtype or float32, or None.
        cache_seqlens: (batch,), int32, how many tokens of each sequence are in the cache before this call. It is not changed.
        cos, sin: (new, rotary_dim) or (batch or 1, new, rotary_dim), the new tokens' angles as in `rotary_embedding`, halves
            repeated; both or none.
        activation: "relu", "gelu", "gelu_tanh", "silu" or None.
        norm: "layer" or "rms"; RMS norm has no bias.
        eps1, eps2: of the norms.
        scale: factor of the scores; 1 / sqrt(head_dim) by default.

    Returns:
        As x, contiguous.

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes, devices or values that do not fit; a cache too short for the new tokens.
        RuntimeError: an input requires a gradient: the cache is changed in place, so there is none to give.

    Source: Radford et al., 2019 (GPT-2); Touvron et al., 2023 (Llama).
    """
    weights: tuple = (w_qkv, b_qkv, w_out, b_out, norm1_weight, norm1_bias, w1, b1, w2, b2, w_gate)
    weights = (*weights, norm2_weight, norm2_bias)
    if _autocast.active(x):
        x, *converted = _autocast.cast(x, *weights)
        weights = tuple(converted)
    plain = not _library.watched(x, k_cache, v_cache, cache_seqlens, *weights, cos, sin)
    tensors = (x, k_cache, v_cache, cache_seqlens, *weights)
    given: tuple[Any, ...] = (*tensors, cos, sin)
    if not (plain and _library.fits("decoder_layer_fits", *given)):
        _check_layer(*given)
    if _library.needs_grad(x, k_cache, v_cache, *weights, cos, sin):
        raise RuntimeError(
            "decoder_layer changes its cache in place and has no gradient; call it under torch.no_grad(), or train with "
            "fastattn.models.DecoderLM"
        )
    _checks.one_of("norm", norm, NORMS)
    if norm == "rms" and (norm1_bias is not None or norm2_bias is not None):
        raise ValueError(
            "norm is 'rms' and norm1_bias or norm2_bias is given; RMS norm has no bias: pass None for both"
        )
    args = (
        *tensors,
        *_checks.angles_with_heads(cos, sin),
        activation_name(activation),
        norm,
        _checks.not_negative("eps1", eps1),
        _checks.not_negative("eps2", eps2),
        _checks.softmax_scale(scale, k_cache.shape[3]),
    )
    forward = _forward.unwatched if plain else _forward
    out = forward(*args, dispatch.choose("decoder_layer", args))
    if not torch.compiler.is_compiling():
        # So that autograd notices if somebody saved the cache for a backward.
        torch.autograd.graph.increment_version((k_cache, v_cache))
    return out


def _check_layer(
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
) -> None:
    """Says what is wrong, if anything is."""
    _checks.floating("x", x)
    _checks.rank("x", x, "(batch, new, width)", 3)
    batch, new, width = x.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.like(name, cache, "x", x)
        _checks.rank(name, cache, "(batch, kv_heads, capacity, head_dim)", 4)
    _, kv_heads, capacity, head_dim = k_cache.shape
    if kv_heads == 0 or head_dim == 0:
        raise ValueError(f"k_cache has {kv_heads} heads and head_dim {head_dim}; expected at least 1 of each, not 0")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape != (batch, kv_heads, capacity, head_dim):
            raise ValueError(
                f"{name} has shape {tuple(cache.shape)}; expected {(batch, kv_heads, capacity, head_dim)}, for x's batch and "
                f"k_cache's sizes"
            )
    check_lengths(x, k_cache, cache_seqlens, None, new)
    matrix_product("w_qkv", w_qkv, "x", x)
    matrix_product("w1", w1, "x", x)
    _checks.like("w_out", w_out, "x", x)
    _checks.rank("w_out", w_out, "(width, heads * head_dim)", 2)
    inner, hidden = w_out.shape[1], w1.shape[0]
    if inner == 0 or inner % (kv_heads * head_dim):
        raise ValueError(
            f"w_out has {inner} columns; expected heads · {head_dim} of them, for heads a multiple of k_cache's {kv_heads} and "
            f"not 0"
        )
    columns = inner + 2 * kv_heads * head_dim
    shapes = {"w_qkv": (w_qkv, (columns, width)), "w_out": (w_out, (width, inner)), "w2": (w2, (width, hidden))}
    if w_gate is not None:
        shapes["w_gate"] = (w_gate, (hidden, width))
    for name, (weight, shape) in shapes.items():
        _checks.like(name, weight, "x", x)
        if weight.shape != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected {shape}")
    for name, bias, size in (("b_qkv", b_qkv, columns), ("b_out", b_out, width), ("b1", b1, hidden), ("b2", b2, width)):
        if bias is not None:
            vector(name, bias, size, "out_features", x)
    norms = {
        "norm1_weight": norm1_weight,
        "norm1_bias": norm1_bias,
        "norm2_weight": norm2_weight,
        "norm2_bias": norm2_bias,
    }
    for name, parameter in norms.items():
        _checks.affine(name, parameter, x, width)
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("one of cos and sin is given without the other; pass both or none")
    _checks.angles(cos, sin, "x", x, (batch, kv_heads, new, head_dim))


def _fake_forward(x, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_forward = _library.define(
    "decoder_layer",
    "(Tensor x, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor w_qkv, Tensor? b_qkv, Tensor w_out, "
    "Tensor? b_out, Tensor? norm1_weight, Tensor? norm1_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate, "
    "Tensor? norm2_weight, Tensor? norm2_bias, Tensor? cos, Tensor? sin, str activation, str norm, float eps1, float eps2, "
    "float scale) -> Tensor",
    _fake_forward,
)

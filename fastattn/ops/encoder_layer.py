"""A whole layer of a Transformer's encoder as one op, for inference."""

import torch
from torch import Tensor

from .. import dispatch
from . import _autocast, _checks, _library
from .linear import activation_name, matrix_product, vector


def encoder_layer(
    x: Tensor,
    w_query: Tensor,
    b_query: Tensor | None,
    w_key: Tensor,
    b_key: Tensor | None,
    w_value: Tensor,
    b_value: Tensor | None,
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
    heads: int,
    activation: str = "gelu",
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    norm_first: bool = False,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """norm2(h + w2 · activation(w1 · h)) with h = norm1(x + attention(x)), in one call; for inference.

    Nothing is prepared or kept between calls: a weight that changes counts from the next call on.

    Args:
        x: (batch, seq, width), float32, bfloat16, float16 or float64; with cu_seqlens (1, tokens, width), sequences laid end
            to end.
        w_query, w_key, w_value: (heads · head_dim, width); w_out: (width, heads · head_dim); any strides, in x's dtype.
        w1: (hidden, width); w2: (width, hidden).
        b_query, b_key, b_value, b_out, b1, b2: the biases, or None.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: (width,), in x's dtype or float32, or None.
        heads: the number of heads.
        activation: "relu", "gelu", "gelu_tanh", "silu" or None.
        eps1, eps2: of the norms.
        norm_first: out = h + w2 · activation(w1 · norm2(h)) with h = x + attention(norm1(x)) instead.
        scale: factor of the scores; 1 / sqrt(head_dim) by default.
        cu_seqlens: (sequences + 1,), int32, as in `attention_varlen`, with max_seqlen, the longest sequence or more.

    Returns:
        As x, contiguous.

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes, devices or values that do not fit.
        RuntimeError: an input requires a gradient, which this op has not.

    Source: Vaswani et al., 2017; post-norm as in Devlin et al., 2019 (BERT), norm_first as in Xiong et al., 2020.
    """
    attention = (w_query, b_query, w_key, b_key, w_value, b_value, w_out, b_out)
    weights: tuple = (*attention, norm1_weight, norm1_bias, w1, b1, w2, b2, norm2_weight, norm2_bias)
    if _autocast.active(x):
        x, *converted = _autocast.cast(x, *weights)
        weights = tuple(converted)
    if (cu_seqlens is None) != (max_seqlen is None):
        raise ValueError("one of cu_seqlens and max_seqlen is given without the other; pass both or none")
    longest = x.shape[1] if max_seqlen is None and isinstance(x, Tensor) and x.ndim == 3 else max_seqlen
    plain = not _library.watched(x, *weights, cu_seqlens)
    if not (plain and _library.fits("encoder_layer_fits", x, *weights, cu_seqlens, heads, longest)):
        _check_layer(x, weights, heads, cu_seqlens, longest)
    if _library.needs_grad(x, *weights):
        raise RuntimeError(
            "encoder_layer has no gradient; call it under torch.no_grad(), or train with fastattn.nn.TransformerEncoderLayer"
        )
    args = (
        x,
        *weights,
        cu_seqlens,
        _checks.integer("heads", heads),
        _checks.integer("max_seqlen", longest),
        activation_name(activation),
        _checks.not_negative("eps1", eps1),
        _checks.not_negative("eps2", eps2),
        _checks.softmax_scale(scale, weights[0].shape[0] // heads),
        _checks.flag("norm_first", norm_first),
    )
    forward = _forward.unwatched if plain else _forward
    return forward(*args, dispatch.choose("encoder_layer", args))


_ATTENTION = ("w_query", "b_query", "w_key", "b_key", "w_value", "b_value", "w_out", "b_out")
_NAMES = (*_ATTENTION, "norm1_weight", "norm1_bias", "w1", "b1", "w2", "b2", "norm2_weight", "norm2_bias")


def _check_layer(x: Tensor, weights: tuple, heads: int, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
    _checks.floating("x", x)
    _checks.rank("x", x, "(batch, seq, width)", 3)
    batch, seq, width = x.shape
    named = dict(zip(_NAMES, weights, strict=True))
    matrix_product("w_query", named["w_query"], "x", x)
    matrix_product("w1", named["w1"], "x", x)
    inner, hidden = named["w_query"].shape[0], named["w1"].shape[0]
    heads = _checks.integer("heads", heads)
    if heads < 1 or inner == 0 or inner % heads != 0:
        raise ValueError(f"heads is {heads}; expected a divisor of w_query's first dimension, {inner}")
    shapes = {"w_key": (inner, width), "w_value": (inner, width), "w_out": (width, inner), "w2": (width, hidden)}
    for name, shape in shapes.items():
        _checks.like(name, named[name], "x", x)
        if named[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(named[name].shape)}; expected {shape}")
    for name, size in (("b_query", inner), ("b_key", inner), ("b_value", inner), ("b_out", width), ("b1", hidden)):
        if named[name] is not None:
            vector(name, named[name], size, "out_features", x)
    if named["b2"] is not None:
        vector("b2", named["b2"], width, "width", x)
    for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"):
        _checks.affine(name, named[name], x, width)
    if cu_seqlens is None:
        return
    if batch != 1:
        raise ValueError(
            f"x has batch {batch} but cu_seqlens says where sequences lie end to end; pass (1, tokens, width)"
        )
    most = _checks.integer("max_seqlen", max_seqlen)
    _checks.cu_seqlens("cu_seqlens", cu_seqlens, "x", seq, "max_seqlen", most, x)


def _fake_forward(x, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_forward = _library.define(
    "encoder_layer",
    "(Tensor x, Tensor w_query, Tensor? b_query, Tensor w_key, Tensor? b_key, Tensor w_value, Tensor? b_value, Tensor w_out, "
    "Tensor? b_out, Tensor? norm1_weight, Tensor? norm1_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "Tensor? norm2_weight, Tensor? norm2_bias, Tensor? cu_seqlens, int heads, SymInt max_seqlen, str activation, "
    "float eps1, float eps2, float scale, bool norm_first) -> Tensor",
    _fake_forward,
)

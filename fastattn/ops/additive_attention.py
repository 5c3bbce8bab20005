"""Additive (Bahdanau) attention."""

import torch
from torch import Tensor

from .. import dispatch
from . import _autocast, _checks, _library, _seed


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(vᵀ tanh(W_q q + W_k k)) · value.

    Args:
        query: (…, q, query_dim), floating.
        key: (…, k, key_dim), with query's leading dimensions.
        value: (…, k, value_dim), with query's leading dimensions.
        w_query: (hidden, query_dim). w_key: (hidden, key_dim). v: (hidden,).
        attn_mask: broadcastable to (…, q, k): bool, True where the key takes part, or floating, added to the scores.
        dropout_p: probability with which each attention weight is zeroed.

    Returns:
        (…, q, value_dim). A query whose every key is masked gets zeros.

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes or devices that do not fit.

    Source: Bahdanau, Cho and Bengio, 2015.
    """
    if _autocast.active(query):
        query, key, value, w_query, w_key, v = _autocast.cast(query, key, value, w_query, w_key, v)
    _checks.floating("query", query)
    for name, x in (("key", key), ("value", value), ("w_query", w_query), ("w_key", w_key), ("v", v)):
        _checks.like(name, x, "query", query)
    if query.ndim < 2:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected (…, q, query_dim)")
    lead = query.shape[:-2]
    for name, x in (("key", key), ("value", value)):
        if x.ndim != query.ndim or x.shape[:-2] != lead:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} but query has {tuple(query.shape)}; the leading dimensions must be equal"
            )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key has {key.shape[-2]} positions but value has {value.shape[-2]}; they must be equal")
    hidden = w_query.shape[0] if w_query.ndim == 2 else -1
    expected = {"w_query": (hidden, query.shape[-1]), "w_key": (hidden, key.shape[-1]), "v": (hidden,)}
    for name, x in (("w_query", w_query), ("w_key", w_key), ("v", v)):
        if hidden < 0 or x.shape != expected[name]:
            wanted = ("hidden", *expected[name][1:]) if hidden < 0 else expected[name]
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {wanted}")
    if attn_mask is not None:
        check_mask("attn_mask", attn_mask, query, (*lead, query.shape[-2], key.shape[-2]))
    args = (query, key, value, w_query, w_key, v, attn_mask, _seed.draw(dropout_p, query.device), float(dropout_p))
    dispatch.choose("additive_attention", args)
    return _forward(*args)


def check_mask(name: str, mask: Tensor, query: Tensor, shape: tuple[int, ...]) -> None:
    """A mask, boolean or floating, that broadcasts to this shape."""
    _checks.tensor(name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} has dtype {mask.dtype}; expected bool (True takes part) or floating (added)")
    if mask.device != query.device:
        raise ValueError(f"{name} is on {mask.device} but query is on {query.device}; move one with .to(device)")
    padded = (1,) * (len(shape) - mask.ndim) + tuple(mask.shape)
    if len(padded) != len(shape) or any(m != 1 and m != n for m, n in zip(padded, shape, strict=True)):
        what = "(…, q, k)" if name == "attn_mask" else "(…, k)"
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, which does not broadcast to {what} = {shape}")


_forward = _library.define_composite(
    "additive_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor w_query, Tensor w_key, Tensor v, Tensor? attn_mask, Tensor? seed, "
    "float dropout_p) -> Tensor",
)

"""Additive (Bahdanau) attention."""

import math

import torch
from torch import Tensor

from .. import dispatch
from ..backends import BACKENDS
from ..backends.additive_projections import projections
from . import _autocast, _checks, _library, _seed

_eager = BACKENDS["eager"]["additive_attention"].forward


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
        attn_mask: broadcastable to (…, q, k): bool, True where the key takes part, or floating, added to the scores. A
            floating mask gets a gradient if it requires one.
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
        attn_mask = _flat_mask(attn_mask, query)
    # The leading dimensions as one.
    batch = math.prod(lead)
    query, key, value = (x if x.ndim == 3 else x.reshape(batch, *x.shape[-2:]) for x in (query, key, value))
    seed = _seed.draw(dropout_p, query.device)
    recorded = _library.needs_grad(query, key, value, w_query, w_key, v, attn_mask)
    args = (query, key, value, w_query, w_key, v, attn_mask, seed, float(dropout_p), recorded)
    backend = dispatch.choose("additive_attention", args)
    if backend == "eager":
        out, *_ = _eager(*args)
    elif recorded:
        out, *_ = _library.record(_AdditiveAttention, *args, backend)
    else:
        out, *_ = _forward(*args, backend)
    return out if len(lead) == 1 else out.reshape(*lead, *out.shape[1:])


def _flat_mask(mask: Tensor, query: Tensor) -> Tensor:
    """The mask as (batch or 1, q or 1, k or 1); a floating one in the dtype of the scores, to which it is added."""
    if mask.dtype != torch.bool:
        mask = mask.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    lead, own = query.shape[:-2], mask.shape[:-2]
    if mask.ndim == 3 and len(lead) == 1:
        return mask
    last = (1,) * (2 - mask.ndim) + tuple(mask.shape[-2:])
    if math.prod(own) == 1:
        return mask.reshape(1, *last)
    # Full in some of the leading dimensions: in all of them, which copies it where it was not.
    return mask.expand(*lead, *last).reshape(math.prod(lead), *last)


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


def _fake_forward(query, key, value, w_query, w_key, v, attn_mask, seed, dropout_p, save, backend):
    out = query.new_empty((*query.shape[:2], value.shape[2]))
    return out, *projections(query, key, w_query, save)


def _fake_backward(
    grad_out,
    query,
    key,
    value,
    w_query,
    w_key,
    v,
    attn_mask,
    seed,
    projected_query,
    projected_key,
    dropout_p,
    needs,
    backend,
):
    tensors = (query, key, value, w_query, w_key, v, attn_mask)
    return tuple(torch.empty_like(x) if need else query.new_empty(0) for x, need in zip(tensors, needs, strict=True))


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor w_query, Tensor w_key, Tensor v, Tensor? attn_mask, Tensor? seed"
)
_forward = _library.define(
    "additive_attention",
    f"({_TENSORS}, float dropout_p, bool save) -> (Tensor out, Tensor projected_query, Tensor projected_key)",
    _fake_forward,
)
_backward = _library.define(
    "additive_attention",
    f"(Tensor grad_out, {_TENSORS}, Tensor projected_query, Tensor projected_key, float dropout_p, bool[] needs) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_w_query, Tensor grad_w_key, Tensor grad_v, "
    "Tensor grad_mask)",
    _fake_backward,
    "backward",
)


@_library.differentiable(_forward)
class _AdditiveAttention(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, dropout_p, _, backend = inputs
        _, *projections = output
        ctx.mark_non_differentiable(*projections)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *projections)
        ctx.settings = dropout_p, backend

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 11
        dropout_p, backend = ctx.settings
        needs = list(ctx.needs_input_grad[:7])
        grads = _library.run_backward(_backward, grad_out, *ctx.saved_tensors, dropout_p, needs, backend)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None, None

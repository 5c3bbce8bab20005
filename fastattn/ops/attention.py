"""Scaled dot-product attention on (batch, heads, seq, head_dim) tensors."""

import torch
from torch import Tensor

from .. import dispatch
from ..backends import BACKENDS
from ..backends.attention_outputs import attention_outputs
from . import _autocast, _checks, _library, _seed

_eager = BACKENDS["eager"]["attention"].forward


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · query · keyᵀ + mask) · value, without the (q, k) matrix in memory.

    The arguments up to `enable_gqa` are those of `torch.nn.functional.scaled_dot_product_attention`, position for position.

    Args:
        query: (batch, heads, q, head_dim), float32, bfloat16, float16 or float64, any strides.
        key: (batch, kv_heads, k, head_dim), same dtype and device.
        value: (batch, kv_heads, k, value_dim), same dtype and device.
        attn_mask: broadcastable to (batch, heads, q, k): bool, True where the key takes part, or floating (query's dtype or
            float32), added to the scaled scores. A floating mask gets a gradient if it requires one.
        dropout_p: probability with which each attention weight is zeroed, seeded from torch's default generator. As in
            torch's function it applies whenever it is above 0: pass 0 outside training.
        is_causal: query i sees keys 0 … i (aligned to the top left, as in torch's function). Combines with attn_mask.
        scale: factor of the scores; 1 / sqrt(head_dim) by default.
        enable_gqa: lets heads be a multiple of kv_heads: query head h reads kv head h // (heads / kv_heads).
        window: (left, right), how many keys before and after the diagonal a query sees; None on a side for no limit. The
            diagonal is aligned to the bottom right: query i stands at key i + k - q.
        softcap: scores become softcap · tanh(score / softcap) before any mask (Gemma 2).
        alibi_slopes: (heads,) or (batch, heads), float32: -slope · |i + k - q - j| is added to the scores (Press et al., 2022).
            They get no gradient.
        return_lse: also return the logsumexp of the scores.

    Returns:
        (batch, heads, q, value_dim) in query's dtype, stored so that `out.transpose(1, 2).flatten(2)` copies nothing; with
        return_lse a pair with lse (batch, heads, q), float32 (float64 for float64), natural logarithm. A query that sees no
        key gets zeros and lse = -inf, and all gradients through it are zero.

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes, devices or values that do not fit, with what to change.

    Source: Vaswani et al., 2017; computed as in Dao et al., 2022 (FlashAttention).
    """
    if _autocast.active(query):
        query, key, value, attn_mask = _autocast.cast(query, key, value, attn_mask)
    plain = not _library.watched(query, key, value, attn_mask, alibi_slopes)
    if not (plain and _library.fits("attention_fits", query, key, value)):
        _checks.attention_shapes(query, key, value, "(batch, heads, q, head_dim)", "(batch, kv_heads, k, head_dim)", 4)
    if not type(is_causal) is type(enable_gqa) is type(return_lse) is bool:  # three calls cost 0.4 µs
        is_causal = _checks.flag("is_causal", is_causal)
        enable_gqa = _checks.flag("enable_gqa", enable_gqa)
        return_lse = _checks.flag("return_lse", return_lse)
    batch, heads, q_len, head_dim = query.shape
    kv_heads, k_len = key.shape[1], key.shape[2]
    if key.shape[0] != batch:
        raise ValueError(f"key has batch {key.shape[0]} but query has {batch}; expand one to the other's")
    if heads != kv_heads and not enable_gqa:
        raise ValueError(f"query has {heads} heads and key {kv_heads}; pass enable_gqa=True for grouped queries")
    if attn_mask is not None:
        attn_mask = _checks.attention_mask(attn_mask, query, (batch, heads, q_len, k_len))
    if alibi_slopes is not None:
        alibi_slopes = _checks.slopes(alibi_slopes, query, batch, heads)
    left, right = (-1, -1) if window is None else _checks.window_sides(window)
    diagonal = k_len - q_len
    if is_causal:
        if diagonal != 0:
            _checks.one_alignment(q_len, k_len, window, alibi_slopes)
        diagonal, right = 0, 0
    args = (
        query,
        key,
        value,
        attn_mask,
        alibi_slopes,
        _seed.draw(dropout_p, query.device),
        _checks.softmax_scale(scale, head_dim),
        left,
        right,
        diagonal,
        _checks.softcap_value(softcap),
        float(dropout_p),
    )
    backend = dispatch.choose("attention", args)
    if backend == "eager":
        out, lse = _eager(*args)
    elif _library.needs_grad(query, key, value, attn_mask):
        record = _library.record_unwatched if plain else _library.record
        out, lse = record(_Attention, *args, backend)
    else:
        forward = _forward.unwatched if plain else _forward
        out, lse = forward(*args, backend)
    return (out, lse) if return_lse else out


def _fake_forward(query, key, value, *rest):
    return attention_outputs(query, value)


def _fake_backward(grad_out, grad_lse, query, key, value, attn_mask, *rest):
    grad_mask = torch.empty_like(attn_mask) if rest[-2] else query.new_empty(0)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), grad_mask


_SETTINGS = "float scale, int window_left, int window_right, SymInt diagonal, float softcap, float dropout_p"

_forward = _library.define(
    "attention",
    f"(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? seed, {_SETTINGS}) "
    "-> (Tensor out, Tensor lse)",
    _fake_forward,
)
_backward = _library.define(
    "attention",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes, "
    f"Tensor? seed, Tensor out, Tensor lse, {_SETTINGS}, bool mask_grad) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)",
    _fake_backward,
    "backward",
)


@_library.differentiable(_forward)
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.settings = inputs[6:]

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        query, key, value, attn_mask, alibi_slopes, seed, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        *settings, backend = ctx.settings
        mask_grad = ctx.needs_input_grad[3]
        grads = _library.run_backward(
            _backward,
            grad_out,
            grad_lse,
            query,
            key,
            value,
            attn_mask,
            alibi_slopes,
            seed,
            out,
            lse,
            *settings,
            mask_grad,
            backend,
        )
        return (*grads[:3], grads[3] if mask_grad else None, *(None,) * 9)

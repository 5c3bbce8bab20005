"""Attention over packed sequences of different lengths: no padding is computed."""

import torch
from torch import Tensor

from .. import dispatch
from ..backends import BACKENDS
from ..backends.attention_outputs import packed_outputs
from . import _autocast, _checks, _library, _seed

_eager = BACKENDS["eager"]["attention_varlen"].forward


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    attn_mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` on sequences laid end to end, each attending to itself (or to its own keys).

    Sequence b's queries are the rows cu_seqlens_q[b] … cu_seqlens_q[b + 1] - 1, its keys likewise by cu_seqlens_k.

    Args:
        query: (total_q, heads, head_dim), float32, bfloat16, float16 or float64, any strides.
        key: (total_k, kv_heads, head_dim); heads is a multiple of kv_heads.
        value: (total_k, kv_heads, value_dim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32, from 0 to the total, never decreasing. Those on a GPU are not read
            back: there they are cut to the total, and what they leave out of the results is not written.
        max_seqlen_q, max_seqlen_k: the longest sequence, or more.
        dropout_p: probability with which each attention weight is zeroed.
        is_causal: aligned to the bottom right: the last query of a sequence sees its last key. (With equal lengths this is
            also the top left.)
        scale: factor of the scores; 1 / sqrt(head_dim) by default.
        attn_mask: broadcastable to (batch, heads, max_seqlen_q, max_seqlen_k), indexed by position inside the sequence:
            bool, True where the key takes part, or floating, added, with a gradient if it requires one.
        window, softcap, alibi_slopes: as in `attention`, aligned to the bottom right of each sequence.
        return_lse: also return the logsumexp.

    Returns:
        (total_q, heads, value_dim), contiguous; with return_lse a pair with lse (heads, total_q).

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes, devices or values that do not fit; cumulative lengths that decrease or overrun.

    Source: the packed interface follows flash_attn_varlen_func (Dao et al.).
    """
    if _autocast.active(query):
        query, key, value, attn_mask = _autocast.cast(query, key, value, attn_mask)
    packed = (query, key, value, cu_seqlens_q, cu_seqlens_k)
    plain = not _library.watched(*packed, attn_mask, alibi_slopes)
    if not (plain and _library.fits("attention_varlen_fits", *packed, max_seqlen_q, max_seqlen_k)):
        _check_packed(*packed, max_seqlen_q, max_seqlen_k)
    if not type(is_causal) is type(return_lse) is bool:
        is_causal = _checks.flag("is_causal", is_causal)
        return_lse = _checks.flag("return_lse", return_lse)
    total_q, heads, head_dim = query.shape
    max_seqlen_q = _checks.integer("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = _checks.integer("max_seqlen_k", max_seqlen_k)
    batch = cu_seqlens_q.shape[0] - 1
    if attn_mask is not None:
        attn_mask = _checks.attention_mask(attn_mask, query, (batch, heads, max_seqlen_q, max_seqlen_k))
    if _checks.readable(cu_seqlens_q) and (max_seqlen_q > total_q or max_seqlen_k > key.shape[0]):
        # No sequence is longer than all of them; eager would make room for one.
        max_seqlen_q, max_seqlen_k = min(max_seqlen_q, total_q), min(max_seqlen_k, key.shape[0])
        if attn_mask is not None:
            attn_mask = attn_mask[:, :, :max_seqlen_q, :max_seqlen_k]
    if alibi_slopes is not None:
        alibi_slopes = _checks.slopes(alibi_slopes, query, batch, heads)
    left, right = (-1, -1) if window is None else _checks.window_sides(window)
    args = (
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        attn_mask,
        alibi_slopes,
        _seed.draw(dropout_p, query.device),
        max_seqlen_q,
        max_seqlen_k,
        _checks.softmax_scale(scale, head_dim),
        left,
        0 if is_causal else right,
        _checks.softcap_value(softcap),
        float(dropout_p),
    )
    backend = dispatch.choose("attention_varlen", args)
    if backend == "eager":
        out, lse = _eager(*args)
    elif _library.needs_grad(query, key, value, attn_mask):
        record = _library.record_unwatched if plain else _library.record
        out, lse = record(_AttentionVarlen, *args, backend)
    else:
        forward = _forward.unwatched if plain else _forward
        out, lse = forward(*args, backend)
    return (out, lse) if return_lse else out


def _check_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    _checks.attention_shapes(query, key, value, "(total_q, heads, head_dim)", "(total_k, kv_heads, head_dim)", 3)
    most_q = _checks.integer("max_seqlen_q", max_seqlen_q)
    most_k = _checks.integer("max_seqlen_k", max_seqlen_k)
    _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, "query", query.shape[0], "max_seqlen_q", most_q, query)
    _checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, "key", key.shape[0], "max_seqlen_k", most_k, query)
    if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
        raise ValueError(
            f"cu_seqlens_q holds {cu_seqlens_q.shape[0] - 1} sequences and cu_seqlens_k {cu_seqlens_k.shape[0] - 1}; the "
            f"numbers must be equal"
        )


def _fake_forward(query, key, value, *rest):
    return packed_outputs(query, value)


def _fake_backward(grad_out, grad_lse, query, key, value, cu_seqlens_q, cu_seqlens_k, attn_mask, *rest):
    grad_mask = torch.empty_like(attn_mask) if rest[-2] else query.new_empty(0)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), grad_mask


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? attn_mask, "
    "Tensor? alibi_slopes, Tensor? seed"
)
_SETTINGS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, int window_left, int window_right, float softcap, "
    "float dropout_p"
)

_forward = _library.define("attention_varlen", f"({_TENSORS}, {_SETTINGS}) -> (Tensor out, Tensor lse)", _fake_forward)
_backward = _library.define(
    "attention_varlen",
    f"(Tensor grad_out, Tensor? grad_lse, {_TENSORS}, Tensor out, Tensor lse, {_SETTINGS}, bool mask_grad) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)",
    _fake_backward,
    "backward",
)


@_library.differentiable(_forward)
class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:8], *output)
        ctx.settings = inputs[8:]

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        *inputs, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        *settings, backend = ctx.settings
        mask_grad = ctx.needs_input_grad[5]
        grads = _library.run_backward(_backward, grad_out, grad_lse, *inputs, out, lse, *settings, mask_grad, backend)
        return (*grads[:3], None, None, grads[3] if mask_grad else None, *(None,) * 10)

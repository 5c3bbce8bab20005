"""How attention spreads its weights: entropy, largest weight and distance of each query, without the weights in memory."""

from typing import NamedTuple

from torch import Tensor

from .. import dispatch
from ..backends.attention_outputs import summary_outputs
from . import _autocast, _checks, _library


class AttentionSummary(NamedTuple):
    """A few numbers about the weights of each query and head, each (batch, heads, q).

    Attributes:
        entropy: -Σ p log p, in nats: 0 where one key takes all the weight, log(n) where n keys share it equally.
        max_weight: the largest weight, between 0 and 1.
        argmax: the key that has it (of equal ones the first, up to rounding), int64; -1 where there is none.
        distance: Σ p · |i - j|, the mean distance in tokens between the query's position and the keys it attends to. Query
            i stands at key i + k - q, as in ALiBi; with is_causal at key i.
    """

    entropy: Tensor
    max_weight: Tensor
    argmax: Tensor
    distance: Tensor


def attention_summary(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> AttentionSummary:
    """What `attention`'s weights softmax(scale · query · keyᵀ + mask) look like, without the (q, k) matrix in memory.

    For looking inside: it has no gradients, and its results are detached. Dropout is left out.

    Args:
        query: (batch, heads, q, head_dim), float32, bfloat16, float16 or float64, any strides.
        key: (batch, kv_heads, k, head_dim), same dtype and device.
        attn_mask, is_causal, scale, enable_gqa, window, softcap, alibi_slopes: as in `attention`.

    Returns:
        entropy, max_weight, argmax and distance, each (batch, heads, q), float32 (float64 for float64), argmax int64. A
        query that sees no key has 0, 0, -1 and 0; one that a NaN reaches has NaN, NaN, -1 and NaN.

    Raises:
        TypeError, ValueError: as `attention`.

    Source: entropy and distance of heads as in Vig and Belinkov, "Analyzing the Structure of Attention in a Transformer
        Language Model", 2019; summed along the way as in Dao et al., 2022 (FlashAttention).
    """
    return summarise(
        score_arguments(query, key, attn_mask, is_causal, scale, enable_gqa, window, softcap, alibi_slopes)
    )


def summarise(args: tuple) -> AttentionSummary:
    """The op, of `score_arguments`."""
    return AttentionSummary(*_forward(*args, dispatch.choose("attention_summary", args)))


def score_arguments(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> tuple:
    """What decides the weights, checked, detached and normalised: the arguments of a backend's `forward`."""
    if _autocast.active(query):
        query, key, attn_mask = _autocast.cast(query, key, attn_mask)
    plain = not _library.watched(query, key)
    if not (plain and _library.fits("attention_fits", query, key, key)):
        _checks.attention_shapes(query, key, key, "(batch, heads, q, head_dim)", "(batch, kv_heads, k, head_dim)", 4)
    is_causal, enable_gqa = _checks.flag("is_causal", is_causal), _checks.flag("enable_gqa", enable_gqa)
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
    left, right = _checks.window_sides(window)
    diagonal = k_len - q_len
    if is_causal:
        if diagonal != 0:
            _checks.one_alignment(q_len, k_len, window, alibi_slopes)
        diagonal, right = 0, 0
    if _library.needs_grad(query, key, attn_mask):
        query, key = query.detach(), key.detach()
        attn_mask = None if attn_mask is None else attn_mask.detach()
    scale, softcap = _checks.softmax_scale(scale, head_dim), _checks.softcap_value(softcap)
    return query, key, attn_mask, alibi_slopes, scale, left, right, diagonal, softcap


def _fake_forward(query, *rest):
    return summary_outputs(query)


_forward = _library.define(
    "attention_summary",
    "(Tensor query, Tensor key, Tensor? attn_mask, Tensor? alibi_slopes, float scale, int window_left, int window_right, "
    "SymInt diagonal, float softcap) -> (Tensor entropy, Tensor max_weight, Tensor argmax, Tensor distance)",
    _fake_forward,
)

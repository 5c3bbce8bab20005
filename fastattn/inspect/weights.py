"""The weights of attention, of chosen heads and queries alone."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..backends.eager.attention import scores, window
from ..backends.eager.softmax import masked_softmax
from ..ops import _checks
from ..ops.attention_summary import score_arguments

Sides = tuple[int | None, int | None]


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Sides | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    rows: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
) -> Tensor:
    """softmax(scale · query · keyᵀ + mask), of the chosen queries and heads: what `attention` weighs the values by.

    Memory is that of the result and, for 16-bit inputs, of the keys in float32; what is not chosen is not computed. For
    looking inside: no gradients, and no dropout.

    Args:
        query: (batch, heads, q, head_dim), float32, bfloat16, float16 or float64, any strides.
        key: (batch, kv_heads, k, head_dim), same dtype and device.
        attn_mask, is_causal, scale, enable_gqa, window, softcap, alibi_slopes: as in `attention`.
        rows: which queries, in any order; negative ones count from the end. None for all.
        heads: which heads, likewise.

    Returns:
        (batch, len(heads), len(rows), k), float32 (float64 for float64). The weights of a query sum to 1; of one that sees
        no key they are all 0.

    Raises:
        TypeError, ValueError: as `attention`; rows or heads that are not there.

    Source: Vaswani et al., 2017.
    """
    args = score_arguments(query, key, attn_mask, is_causal, scale, enable_gqa, window, softcap, alibi_slopes)
    return weights_of(select_heads(args, heads), chosen("rows", rows, query.shape[2]))


def select_heads(args: tuple, heads: Iterable[int] | None) -> tuple:
    """`score_arguments` of the chosen query heads alone."""
    if heads is None:
        return args
    query, key, attn_mask, alibi_slopes, *settings = args
    index = torch.tensor(chosen("heads", heads, query.shape[1]), device=query.device, dtype=torch.int64)
    group = query.shape[1] // max(key.shape[1], 1)
    if attn_mask is not None and attn_mask.shape[1] != 1:
        attn_mask = attn_mask[:, index]
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes[..., index]
    return (query[:, index], key[:, index // group], attn_mask, alibi_slopes, *settings)


def weights_of(args: tuple, rows: list[int]) -> Tensor:
    """The weights of these queries, from `score_arguments`."""
    query, key, attn_mask, alibi_slopes, scale, left, right, diagonal, softcap = args
    index = torch.tensor(rows, device=query.device, dtype=torch.int64)
    if attn_mask is not None and attn_mask.shape[2] != 1:
        attn_mask = attn_mask[:, :, index]
    distance = index[:, None] + diagonal - torch.arange(key.shape[2], device=query.device)
    query, key = (x if x.dtype == torch.float64 else x.float() for x in (query[:, :, index], key))
    score = scores(query, key, attn_mask, alibi_slopes, window(distance, left, right), distance, scale, softcap)
    return masked_softmax(score)[0]


def chosen(name: str, picks: Iterable[int] | None, count: int) -> list[int]:
    """The picks as indices from 0; None for all `count` of them."""
    if picks is None:
        return list(range(count))
    if not isinstance(picks, Iterable):
        raise TypeError(f"{name} is a {type(picks).__name__}; expected a list of ints, or None for all")
    found = [_checks.integer(f"an element of {name}", pick) for pick in picks]
    for pick in found:
        if not -count <= pick < count:
            raise ValueError(f"{name} has {pick}, but there are {count}; expected {-count} to {count - 1}")
    return [pick % count for pick in found]

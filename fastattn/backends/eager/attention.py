"""Scaled dot-product attention (Vaswani et al., 2017), the definition.

    s   = scale * query . key                                   (batch, heads, q, k)
    s   = softcap * tanh(s / softcap)                           where softcap > 0
    s  += -slope[head] * |i + diagonal - j|                     ALiBi
    s  += floating mask;  s = -inf where a bool mask or the window excludes the key
    p   = softmax(s);  lse = logsumexp(s)
    out = dropout(p) . value

A key at s = -inf takes no part: its weight and gradient are zero, even in a row that holds NaN. A row whose every key is
excluded gives out = 0, lse = -inf and gradients of zero.
"""

import torch
from torch import Tensor

from . import dropout
from .softmax import masked_softmax


def window(distance: Tensor, window_left: int, window_right: int) -> Tensor | None:
    """Which keys the window admits; None for all. `distance` is i + diagonal - j; -1 means no limit on that side."""
    allowed = None
    if window_left >= 0:
        allowed = distance <= window_left
    if window_right >= 0:
        right = distance >= -window_right
        allowed = right if allowed is None else allowed & right
    return allowed


def scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    allowed: Tensor | None,
    distance: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """s of the formula, (batch, heads, q, k), float32 (float64 for float64). `allowed` (bool) and `distance` broadcast to it."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // max(key.shape[1], 1)
    if group != 1:
        key = key.repeat_interleave(group, dim=1)

    takes_part = allowed
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        takes_part = attn_mask if allowed is None else attn_mask & allowed

    score = (query @ key.mT).to(accumulate) * scale
    if takes_part is not None:
        score = score.masked_fill(~takes_part, 0.0)  # what lies there is not looked at, be it NaN
    if softcap > 0.0:
        score = softcap * torch.tanh(score / softcap)
    if alibi_slopes is not None:
        score = score - alibi_slopes[..., None, None].to(accumulate) * distance.abs()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        score = score + attn_mask.to(accumulate)
    if takes_part is not None:
        score = score.masked_fill(~takes_part, -torch.inf)
    return score


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    allowed: Tensor | None,
    distance: Tensor,
    keep: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The formula. Arguments as of `scores`; `keep` is dropout's mask."""
    weight, lse = masked_softmax(scores(query, key, attn_mask, alibi_slopes, allowed, distance, scale, softcap))
    if keep is not None:
        weight = dropout.apply(weight, keep, dropout_p)
    group = query.shape[1] // max(key.shape[1], 1)
    if group != 1:
        value = value.repeat_interleave(group, dim=1)
    out = weight.to(value.dtype) @ value
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    batch, heads, q_len, _ = query.shape
    k_len = key.shape[2]
    i = torch.arange(q_len, device=query.device)[:, None]
    distance = i + diagonal - torch.arange(k_len, device=query.device)
    keep = None
    if seed is not None:
        rows = torch.arange(batch * heads * q_len, device=query.device).reshape(batch, heads, q_len)
        keep = dropout.keep_mask(seed, rows, k_len, dropout_p)
    allowed = window(distance, window_left, window_right)
    return attend(query, key, value, attn_mask, alibi_slopes, allowed, distance, keep, scale, softcap, dropout_p)

"""Attention over packed sequences, the definition: unpack into a padded batch, attend, pack again."""

import torch
from torch import Tensor

from . import dropout
from .attention import attend, window


def _unpack(packed: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(total, heads, dim) to (batch, heads, max_seqlen, dim), and the lengths (batch, 1, 1, 1)."""
    start, length = cu_seqlens[:-1, None].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()[:, None]
    position = torch.arange(max_seqlen, device=packed.device)
    token = torch.where(position < length, start + position, 0)
    if packed.shape[0] == 0:
        padded = packed.new_zeros(token.shape + packed.shape[1:]) + packed.sum()  # of nothing; keeps the graph
    else:
        padded = torch.where((position < length)[:, :, None, None], packed[token], 0.0)
    return padded.transpose(1, 2), length[:, :, None, None]


def _pack(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """(batch, max_seqlen, …) to (total, …); tokens past the last sequence get zeros."""
    if total == 0 or padded.shape[0] == 0 or padded.shape[1] == 0:
        return padded.new_zeros((total, *padded.shape[2:])) + padded[:0].sum()  # of nothing; keeps the graph
    token = torch.arange(total, device=padded.device)
    ends = cu_seqlens[1:].long()
    sequence = torch.searchsorted(ends, token, right=True)
    inside = (sequence < padded.shape[0]) & (token >= cu_seqlens[0])
    sequence = sequence.clamp(max=padded.shape[0] - 1)
    position = (token - cu_seqlens.long()[sequence]).clamp(0, padded.shape[1] - 1)
    rows = padded[sequence, position]
    return torch.where(inside.reshape((-1,) + (1,) * (rows.ndim - 1)), rows, 0.0)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    total_q, heads, _ = query.shape
    padded_query, q_len = _unpack(query, cu_seqlens_q, max_seqlen_q)
    padded_key, k_len = _unpack(key, cu_seqlens_k, max_seqlen_k)
    padded_value, _ = _unpack(value, cu_seqlens_k, max_seqlen_k)

    i = torch.arange(max_seqlen_q, device=query.device)[:, None]
    j = torch.arange(max_seqlen_k, device=query.device)
    distance = i + (k_len - q_len) - j
    # Padding takes part on neither side: a row of zeros times an infinite key would be NaN, and so its gradient.
    allowed = (i < q_len) & (j < k_len)
    admitted = window(distance, window_left, window_right)
    if admitted is not None:
        allowed = allowed & admitted
    keep = None
    if seed is not None:
        head = torch.arange(heads, device=query.device)[:, None]
        rows = head * total_q + (cu_seqlens_q[:-1, None, None].long() + i[:, 0])
        keep = dropout.keep_mask(seed, rows, max_seqlen_k, dropout_p)
    out, lse = attend(
        padded_query,
        padded_key,
        padded_value,
        attn_mask,
        alibi_slopes,
        allowed,
        distance,
        keep,
        scale,
        softcap,
        dropout_p,
    )
    packed_lse = _pack(lse.transpose(1, 2), cu_seqlens_q, total_q).transpose(0, 1)
    return _pack(out.transpose(1, 2), cu_seqlens_q, total_q), packed_lse.contiguous()

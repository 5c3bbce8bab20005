"""Attention over packed sequences: csrc/cpu/attention_forward.cpp."""

import torch
from torch import Tensor

from ..attention_outputs import packed_outputs
from ..tensors import gradient
from . import _native


def unsupported(
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
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return _native.unsupported(query, key, value)


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
    out, lse = packed_outputs(query, value)
    _native.C.attention_varlen_forward(
        query,
        key,
        value,
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        attn_mask,
        alibi_slopes,
        seed,
        out,
        lse,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        window_left,
        window_right,
        softcap,
        dropout_p,
    )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad_mask = gradient(attn_mask, mask_grad)
    _native.C.attention_varlen_backward(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        attn_mask,
        alibi_slopes,
        seed,
        out,
        lse,
        *grads,
        grad_mask,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        window_left,
        window_right,
        softcap,
        dropout_p,
    )
    return (*grads, query.new_empty(0) if grad_mask is None else grad_mask)

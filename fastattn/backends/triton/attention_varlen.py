"""Attention over packed sequences: the kernels of attention.py, which take the sequences' boundaries from cu_seqlens."""

import torch
from torch import Tensor

from ..attention_outputs import packed_outputs
from ..tensors import given, gradient
from . import attention_backward, attention_forward, attention_problem
from .attention_mask_gradient import mask_gradient
from .attention_problem import Problem


def _heads_first(packed: Tensor) -> Tensor:
    """(tokens, heads, dim) as (1, heads, tokens, dim)."""
    return packed.transpose(0, 1)[None]


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
    """Why the kernels cannot take this call; None if they can."""
    return attention_problem.unsupported(query, key, value)


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
    problem = Problem(
        _heads_first(query),
        _heads_first(key),
        _heads_first(value),
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        attn_mask,
        alibi_slopes,
        seed,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        window_left,
        window_right,
        0,
        softcap,
        dropout_p,
    )
    attention_forward.forward(problem, _heads_first(out), lse[None])
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
    problem = Problem(
        _heads_first(query),
        _heads_first(key),
        _heads_first(value),
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        attn_mask,
        alibi_slopes,
        seed,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        window_left,
        window_right,
        0,
        softcap,
        dropout_p,
    )
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad_mask = gradient(attn_mask, mask_grad)
    received = _heads_first(grad_out), None if grad_lse is None else grad_lse[None]
    query_grad, key_grad, value_grad = map(_heads_first, grads)
    found = (query_grad, key_grad, value_grad)
    terms = attention_backward.backward(problem, *received, _heads_first(out), lse[None], found)
    if grad_mask is not None:
        mask_gradient(problem, *received, lse[None], terms, grad_mask)
    return (*grads, given(grad_mask, query))

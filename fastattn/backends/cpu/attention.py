"""Scaled dot-product attention: csrc/cpu/attention_forward.cpp, and attention_decode.cpp for a few queries."""

import torch
from torch import Tensor

from ..attention_outputs import attention_outputs
from ..tensors import gradient
from . import _native


def unsupported(
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
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return _native.unsupported(query, key, value)


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
    out, lse = attention_outputs(query, value)
    _native.C.attention_forward(
        query,
        key,
        value,
        attn_mask,
        alibi_slopes,
        seed,
        out,
        lse,
        scale,
        window_left,
        window_right,
        diagonal,
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
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    dropout_p: float,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad_mask = gradient(attn_mask, mask_grad)
    _native.C.attention_backward(
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
        *grads,
        grad_mask,
        scale,
        window_left,
        window_right,
        diagonal,
        softcap,
        dropout_p,
    )
    return (*grads, query.new_empty(0) if grad_mask is None else grad_mask)

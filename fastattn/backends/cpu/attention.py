"""Scaled dot-product attention: csrc/cpu/attention_forward.cpp, and attention_decode.cpp for a few queries."""

import torch
from torch import Tensor

from ..eager import attention as eager
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
    batch, heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32)
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


def backward(grad_out, grad_lse, query, key, value, attn_mask, alibi_slopes, seed, out, lse, *rest):
    """Interim: the definition's own derivative, until csrc/cpu has the kernel."""
    *settings, mask_grad = rest
    return _through_eager(
        eager.forward,
        grad_out,
        grad_lse,
        (query, key, value),
        attn_mask,
        mask_grad,
        lambda q, k, v, mask: (q, k, v, mask, alibi_slopes, seed, *settings),
    )


def _through_eager(function, grad_out, grad_lse, tensors, attn_mask, mask_grad, arguments):
    leaves = [x.detach().requires_grad_() for x in tensors]
    mask = attn_mask.detach().requires_grad_() if mask_grad else attn_mask
    with torch.enable_grad():
        out, lse = function(*arguments(*leaves, mask))
    wanted = [*leaves, mask] if mask_grad else leaves
    outputs, grads = ([out], [grad_out]) if grad_lse is None else ([out, lse], [grad_out, grad_lse])
    found = torch.autograd.grad(outputs, wanted, grads)
    # In the layout of the inputs, as the op's fake kernel has it.
    laid_out = [torch.empty_like(x).copy_(grad) for x, grad in zip(wanted, found, strict=True)]
    return (*laid_out, *([] if mask_grad else [tensors[0].new_empty(0)]))

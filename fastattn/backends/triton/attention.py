"""Scaled dot-product attention: the kernels are in attention_forward.py and attention_backward.py."""

import torch
from torch import Tensor

from ..attention_outputs import attention_outputs
from ..tensors import given, gradient
from . import attention_backward, attention_forward, attention_problem
from .attention_mask_gradient import mask_gradient
from .attention_problem import Problem


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
    """Why the kernels cannot take this call; None if they can."""
    return attention_problem.unsupported(query, key, value)


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
    problem = Problem(
        query,
        key,
        value,
        None,
        None,
        attn_mask,
        alibi_slopes,
        seed,
        query.shape[2],
        key.shape[2],
        scale,
        window_left,
        window_right,
        diagonal,
        softcap,
        dropout_p,
    )
    attention_forward.forward(problem, out, lse)
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
    problem = Problem(
        query,
        key,
        value,
        None,
        None,
        attn_mask,
        alibi_slopes,
        seed,
        query.shape[2],
        key.shape[2],
        scale,
        window_left,
        window_right,
        diagonal,
        softcap,
        dropout_p,
    )
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad_mask = gradient(attn_mask, mask_grad)
    terms = attention_backward.backward(problem, grad_out, grad_lse, out, lse, grads)
    if grad_mask is not None:
        mask_gradient(problem, grad_out, grad_lse, lse, terms, grad_mask)
    return (*grads, given(grad_mask, query))

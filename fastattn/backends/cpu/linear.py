"""Linear with its activation and residual: csrc/cpu/linear_forward.cpp and linear_backward.cpp."""

import torch
from torch import Tensor

from ..tensors import contiguous, given, gradient, matrix, rows
from . import _native


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, save_pre: bool
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return _native.unsupported(x, weight, bias, residual)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    pre = torch.empty_like(out) if save_pre and activation != "none" else None
    _native.C.linear_forward(
        matrix(x), weight, contiguous(bias), None if residual is None else rows(residual), out, pre, activation
    )
    return out, given(pre, x)


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    grad_x = gradient(x, needs[0])
    grad_weight = gradient(weight, needs[1])
    grad_bias = gradient(bias, needs[2])
    written = contiguous(grad_x)  # another tensor where x has its features apart: the kernel writes rows
    _native.C.linear_backward(
        rows(grad_out),
        matrix(x),
        weight,
        None if activation == "none" else rows(pre),
        written,
        grad_weight,
        grad_bias,
        activation,
    )
    if grad_x is not None and written is not None and written is not grad_x:
        grad_x.copy_(written)
    return given(grad_x, x), given(grad_weight, x), given(grad_bias, x)

"""Residual add, dropout and layer norm: csrc/cpu/norm_forward.cpp and norm_backward.cpp."""

import torch
from torch import Tensor

from ..tensors import contiguous, given
from . import _native


def unsupported(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return _native.unsupported(x, residual)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    x = x.contiguous()
    changed = residual is not None or dropout_p > 0.0
    out = torch.empty_like(x)
    total = torch.empty_like(x) if changed else None
    mean = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _native.C.layer_norm_forward(
        x,
        contiguous(weight),
        contiguous(bias),
        contiguous(residual),
        seed,
        out,
        total,
        mean,
        rstd,
        eps,
        dropout_p,
    )
    return out, given(total, x), mean, rstd


def backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    total = total.contiguous()
    grad_residual = torch.empty_like(total)
    grad_x = torch.empty_like(total) if dropout_p > 0.0 else None
    grad_weight = None if weight is None else torch.empty_like(weight)
    grad_bias = None if bias is None else torch.empty_like(bias)
    _native.C.layer_norm_backward(
        grad_out.contiguous(),
        contiguous(grad_sum),
        total,
        contiguous(weight),
        mean,
        rstd,
        seed,
        grad_residual,
        grad_x,
        grad_weight,
        grad_bias,
        dropout_p,
    )
    return grad_residual, given(grad_x, total), given(grad_weight, total), given(grad_bias, total)

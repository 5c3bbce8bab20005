"""Residual add, dropout and RMS norm: csrc/cpu/norm_forward.cpp and norm_backward.cpp."""

import torch
from torch import Tensor

from ..tensors import contiguous, given
from . import _native


def unsupported(
    x: Tensor,
    weight: Tensor | None,
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
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    x = x.contiguous()
    changed = residual is not None or dropout_p > 0.0
    out = torch.empty_like(x)
    total = torch.empty_like(x) if changed else None
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    _native.C.rms_norm_forward(
        x,
        contiguous(weight),
        contiguous(residual),
        seed,
        out,
        total,
        rstd,
        eps,
        dropout_p,
    )
    return out, given(total, x), rstd


def backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    total = total.contiguous()
    grad_residual = torch.empty_like(total)
    grad_x = torch.empty_like(total) if dropout_p > 0.0 else None
    grad_weight = None if weight is None else torch.empty_like(weight)
    _native.C.rms_norm_backward(
        grad_out.contiguous(),
        contiguous(grad_sum),
        total,
        contiguous(weight),
        rstd,
        seed,
        grad_residual,
        grad_x,
        grad_weight,
        dropout_p,
    )
    return grad_residual, given(grad_x, total), given(grad_weight, total)

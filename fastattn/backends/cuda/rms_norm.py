"""Residual add, dropout and RMS norm: csrc/cuda/norm_forward.cu and norm_backward.cu, through norm.py."""

from torch import Tensor

from .. import tensors
from . import norm


def unsupported(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return norm.unsupported(x, residual)


def forward(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    out, total, _, rstd = norm.forward(x, weight, None, residual, seed, eps, dropout_p, centred=False)
    return out, tensors.given(total, x), rstd


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
    grad_residual, grad_x, grad_weight, _ = norm.backward(
        grad_out, grad_sum, total, weight, None, None, rstd, seed, dropout_p
    )
    return grad_residual, tensors.given(grad_x, total), tensors.given(grad_weight, total)

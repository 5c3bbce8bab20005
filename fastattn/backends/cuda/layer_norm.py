"""Residual add, dropout and layer norm: csrc/cuda/norm_forward.cu and norm_backward.cu, through norm.py."""

from torch import Tensor

from .. import tensors
from . import norm


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
    return norm.unsupported(x, residual)


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
    out, total, mean, rstd = norm.forward(x, weight, bias, residual, seed, eps, dropout_p, centred=True)
    return out, tensors.given(total, x), tensors.given(mean, rstd), rstd


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
    grad_residual, *others = norm.backward(grad_out, grad_sum, total, weight, bias, mean, rstd, seed, dropout_p)
    grad_x, grad_weight, grad_bias = (tensors.given(grad, total) for grad in others)
    return grad_residual, grad_x, grad_weight, grad_bias

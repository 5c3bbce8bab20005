"""Linear with its activation and residual: csrc/cpu/linear.cpp."""

import torch
from torch import Tensor

from . import _native
from ._native import contiguous


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
        _native.matrix(x), weight, contiguous(bias), contiguous(residual), out, pre, activation
    )
    return out, x.new_empty(0) if pre is None else pre

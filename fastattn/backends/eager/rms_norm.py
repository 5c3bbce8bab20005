"""Residual add, dropout and RMS norm (Zhang and Sennrich, 2019), the definition.

    sum = residual + dropout(x)
    out = sum * rstd * weight,    rstd = 1 / sqrt(mean(sum^2) + eps), over the last dimension

Statistics in float32 (float64 for float64), whatever the dtype of x.
"""

import torch
from torch import Tensor

from .dropout import dropout


def forward(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, seed: Tensor | None, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = dropout(x, seed, dropout_p)
    if residual is not None:
        total = residual + total
    wide = total.to(accumulate)
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    out = wide * rstd
    if weight is not None:
        out = out * weight
    changed = residual is not None or seed is not None
    return out.to(total.dtype), total if changed else x.new_empty(0), rstd.flatten()

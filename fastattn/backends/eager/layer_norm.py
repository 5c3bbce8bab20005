"""Residual add, dropout and layer norm (Ba, Kiros and Hinton, 2016), the definition.

    sum = residual + dropout(x)
    out = (sum - mean) * rstd * weight + bias,    rstd = 1 / sqrt(variance + eps), over the last dimension

Statistics in float32 (float64 for float64), whatever the dtype of x.
"""

import torch
from torch import Tensor

from .dropout import dropout


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
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = dropout(x, seed, dropout_p)
    if residual is not None:
        total = residual + total
    wide = total.to(accumulate)
    mean = wide.mean(dim=-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    out = centred * rstd
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    changed = residual is not None or seed is not None
    return out.to(total.dtype), total if changed else x.new_empty(0), mean.flatten(), rstd.flatten()

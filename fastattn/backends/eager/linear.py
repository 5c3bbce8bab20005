"""out = activation(x . weight^T + bias) + residual, the definition."""

import torch.nn.functional as F
from torch import Tensor

from .activation import ACTIVATIONS


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    pre = F.linear(x, weight, bias)
    out = ACTIVATIONS[activation](pre)
    if residual is not None:
        out = out + residual
    return out, pre if save_pre and activation != "none" else x.new_empty(0)

"""The seed of a call's dropout, drawn from torch's default generator, so that torch.manual_seed governs it."""

import torch
from torch import Tensor

from . import _checks


def draw(dropout_p: float, device: torch.device) -> Tensor | None:
    """An int64 tensor of one element; None where nothing is dropped."""
    if type(dropout_p) is float and dropout_p == 0.0:
        return None
    _checks.probability("dropout_p", dropout_p)
    if dropout_p == 0.0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)

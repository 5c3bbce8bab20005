"""Which gradients a loss brings along: for every backend that finds them, and for the registered ops' fake tensors."""

import torch
from torch import Tensor


def found_with_the_loss(x: Tensor, needs: list[bool], reduction: str = "mean") -> list[bool]:
    """Of the gradients that are needed, those found in the forward, to be multiplied by what the loss receives.

    All of a reduced loss's. Not so in float16: before that multiplication, which a gradient scaler makes large, they would
    be too small for it.
    """
    found = reduction != "none" and x.dtype != torch.float16
    return [need and found for need in needs]

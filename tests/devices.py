"""Moves the arguments of a call to the device under test."""

from typing import Any

import torch
from torch import Tensor


def moved(tree: Any, device: torch.device) -> Any:
    """The same arguments on this device; what required a gradient does so there."""

    def move(x: Any) -> Any:
        return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return torch.utils._pytree.tree_map(move, tree)

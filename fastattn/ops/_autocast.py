"""Autocast for the ops whose time goes into matrix products. The norms keep their dtype."""

from typing import Any

import torch
from torch import Tensor


def active(x: Tensor) -> bool:
    """Whether autocast is on for the device of this tensor."""
    if not torch._C._is_any_autocast_enabled():  # the cheap question first: it is asked on every call
        return False
    return isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def cast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All tensors in autocast's dtype for their device; float64 and what is not floating stay, as torch's own do."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        y if not isinstance(y, Tensor) or not y.is_floating_point() or y.dtype == torch.float64 else y.to(dtype)
        for y in (x, *others)
    )

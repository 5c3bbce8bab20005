"""Losses of parts of a batch whose gradients are accumulated: each divided by what counts in all parts, not in its own."""

import torch
from torch import Tensor

from fastattn.ops import _checks


def over_items(total: Tensor, num_items_in_batch: float | Tensor) -> Tensor:
    """The sum of a part's losses over how many there are in the batch, a positive number or a tensor that holds one."""
    count = _count(num_items_in_batch)
    return total / (count.to(total.device, total.dtype) if isinstance(count, Tensor) else count)


def _count(x: float | Tensor) -> float | Tensor:
    name = "num_items_in_batch"
    if not isinstance(x, Tensor):
        value: float = _checks.number(name, x)
    else:
        _checks.tensor(name, x)
        if x.numel() != 1 or x.dtype == torch.bool or x.is_complex():
            raise ValueError(f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}; expected one number")
        if not _checks.readable(x):
            return x.detach().reshape(())
        value = _checks.number(name, x.item())
    if value <= 0:
        raise ValueError(f"{name} is {value}; expected a positive number: how many labels count in the whole batch")
    return value

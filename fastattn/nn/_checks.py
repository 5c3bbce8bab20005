"""Checks of the modules' inputs. They raise what torch.nn raises in the same place, and say more.

torch.nn raises AssertionError for what `MultiheadAttention` checks by hand and RuntimeError for what its kernels
refuse. What is no dense tensor at all is a TypeError.
"""

import torch
from torch import Tensor

from fastattn.ops._checks import tensor


def same_kind(name: str, x: Tensor, weight: Tensor | None) -> None:
    """x is floating and has the dtype (or autocast will give it the dtype) and the device of the weight."""
    tensor(name, x)
    if not x.is_floating_point():
        raise RuntimeError(f"{name} has dtype {x.dtype}; expected a floating dtype: convert it with {name}.float()")
    if weight is None:
        return
    if x.device != weight.device:
        raise RuntimeError(
            f"{name} is on {x.device} but the module's weights are on {weight.device}; move one with .to(device)"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise RuntimeError(
            f"{name} has dtype {x.dtype} but the module's weights have {weight.dtype}; convert one with .to(dtype), "
            "or run under torch.autocast"
        )


def features(name: str, x: Tensor, expected: int, what: str) -> None:
    tensor(name, x)
    if x.ndim == 0 or x.shape[-1] != expected:
        raise RuntimeError(f"{name} has shape {tuple(x.shape)}; expected its last dimension to be {what} = {expected}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise RuntimeError(f"{name} is on {x.device} but {other_name} is on {other.device}; move one with .to(device)")

"""Linear + cross entropy: one stretch of logits and several, a short row of them, and everything that a loss can have."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from .. import linear_cross_entropy


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "32000 classes", partial(_call, 512, 32000, dtype)
    yield "600 classes", partial(_call, 512, 600, dtype, reduction="none")
    yield "several stretches, every option", partial(_call, 8192, 65536, dtype, bias=True, options=(0.1, 1e-4, 30.0))


def _call(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    bias: bool = False,
    options: tuple[float, float, float] = (0.0, 0.0, 0.0),
    reduction: str = "mean",
) -> None:
    x, weight = (torch.empty(size, 2048, dtype=dtype, device="meta") for size in (rows, classes))
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    of_classes = torch.empty(classes, dtype=dtype, device="meta") if bias else None
    settings: tuple[Any, ...] = (-100, *options, reduction, [True, True, bias])
    arguments = x, weight, target, of_classes, of_classes
    loss, *_ = linear_cross_entropy.forward(*arguments, *settings)
    none = torch.empty(0, device="meta")
    linear_cross_entropy.backward(loss, *arguments, none, none, none, *settings)

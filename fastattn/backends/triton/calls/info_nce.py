"""InfoNCE: both widths of scores, one-sided and symmetric, in one stretch and in several."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import info_nce


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "600 pairs", partial(_call, 600, 0, False, dtype)
    yield "4096 pairs, symmetric", partial(_call, 4096, 0, True, dtype)
    yield "16384 pairs, negatives, symmetric", partial(_call, 16384, 1000, True, dtype)


def _call(pairs: int, extra: int, symmetric: bool, dtype: torch.dtype) -> None:
    query = torch.empty(pairs, 512, dtype=dtype, device="meta")
    negatives = torch.empty(extra, 512, dtype=dtype, device="meta") if extra else None
    temperature = torch.empty((), device="meta")
    settings = symmetric, [True, True, negatives is not None, True]
    info_nce.forward(query, query, negatives, temperature, *settings)
    none = torch.empty(0, device="meta")
    info_nce.backward(temperature, query, query, negatives, temperature, none, none, none, none, *settings)

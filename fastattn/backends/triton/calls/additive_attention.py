"""Additive attention: each width of values, one query, a few and many, with and without mask and dropout; backward."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import additive_attention


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "64 wide, mask, dropout", partial(_call, 8, 300, 64, torch.float32, 0.1, dtype)
    yield "128 wide", partial(_call, 8, 300, 128, None, 0.0, dtype)
    yield "256 wide, one query, in parts", partial(_call, 1, 1, 256, torch.bool, 0.0, dtype)
    yield "512 wide, a few queries", partial(_call, 8, 3, 512, None, 0.0, dtype)
    yield "1024 wide, mask, dropout", partial(_call, 8, 300, 1024, torch.bool, 0.1, dtype)


def _call(
    batch: int, queries: int, dim: int, mask_dtype: torch.dtype | None, dropout_p: float, dtype: torch.dtype
) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    keys, hidden = 500, 256
    mask = None if mask_dtype is None else empty(batch, queries, keys, dtype=mask_dtype)
    seed = empty(1, dtype=torch.int64) if dropout_p else None
    query, key = empty(batch, queries, dim), empty(batch, keys, dim)
    weight, v = empty(hidden, dim), empty(hidden)
    out, of_query, of_key = additive_attention.forward(query, key, key, weight, weight, v, mask, seed, dropout_p, True)
    needs = [True] * 6 + [mask_dtype == torch.float32]
    additive_attention.backward(out, query, key, key, weight, weight, v, mask, seed, of_query, of_key, dropout_p, needs)

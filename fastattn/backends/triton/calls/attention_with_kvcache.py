"""Attention to a cache: each width of the table, whole and in parts, contiguous and paged, few and many rows, and turned."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import attention_with_kvcache


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "64 wide, 1 query, in parts", partial(_call, 1, 8, 8, 1, 64, False, False, dtype)
    yield "128 wide, 8 heads a key head, paged", partial(_call, 8, 64, 8, 1, 128, True, False, dtype)
    yield "128 wide, 1 query, in parts, paged", partial(_call, 1, 8, 2, 1, 128, True, False, dtype)
    yield "128 wide, 64 rows, every feature", partial(_call, 8, 32, 8, 16, 128, False, True, dtype)
    yield (
        "128 wide, 64 rows, neighbours turned",
        partial(_call, 8, 32, 8, 16, 128, False, True, dtype, interleaved=True),
    )
    yield "256 wide", partial(_call, 8, 32, 8, 16, 256, False, False, dtype)
    yield "512 wide, in parts", partial(_call, 1, 16, 2, 1, 512, False, False, dtype)
    if dtype.itemsize == 2:
        yield "1024 wide", partial(_call, 8, 16, 8, 1, 1024, False, False, dtype)


def _call(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    dim: int,
    paged: bool,
    full: bool,
    dtype: torch.dtype,
    interleaved: bool = False,
) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, new = empty(batch, heads, queries, dim), empty(batch, kv_heads, queries, dim)
    cache = empty(1024, kv_heads, 16, dim) if paged else empty(batch, kv_heads, 4096, dim)
    table = empty(batch, 256, dtype=torch.int32) if paged else None
    lengths = empty(batch, dtype=torch.int32)
    slopes = empty(heads, dtype=torch.float32) if full else None
    cos = empty(batch, 1, queries, dim // 2, dtype=torch.float32) if paged or full else None
    window_left, softcap = (300, 30.0) if full else (-1, 0.0)
    attention_with_kvcache.forward(
        query, cache, cache, new, new, lengths, table, slopes, cos, cos, 0.1, window_left, 0, softcap, interleaved
    )

"""Attention of a few new queries to a key-value cache, contiguous or paged: csrc/cuda/decode.cu."""

import torch
from torch import Tensor

from ..attention_outputs import attention_outputs
from ..tensors import DTYPES, along, cache_capacity
from . import _native
from ._native import address

MOST_ROWS: int = 0 if _native.C is None else _native.C.decode_most_rows()
MOST_DIM: int = 0 if _native.C is None else _native.C.decode_most_dim()
MOST_KEYS = 2**30  # of a sequence: the kernel counts them in 32 bits


def unsupported(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    reason = _native.unsupported(query, k_cache, v_cache, k, v)
    if reason is None and cos is not None and sin is not None:
        reason = _native.unsupported(cos) or _native.unsupported(sin)
    if reason is not None:
        return reason
    rows, dims = query.shape[1] // k_cache.shape[1] * query.shape[2], (query.shape[3], v_cache.shape[3])
    if not 1 <= rows <= MOST_ROWS:
        return f"it takes 1 to {MOST_ROWS} queries of heads that share a key head, and there are {rows}"
    if min(dims) < 1 or max(dims) > MOST_DIM:
        return f"it takes head_dim and value_dim from 1 to {MOST_DIM}, and they are {dims[0]} and {dims[1]}"
    if any(cache.stride(3) != 1 and cache.shape[3] > 1 and cache.numel() for cache in (k_cache, v_cache)):
        return "the rows of the cache have gaps: its last dimension has a stride other than 1"
    if cache_capacity(k_cache, block_table) > MOST_KEYS:
        return f"it takes caches of at most {MOST_KEYS} keys a sequence"
    return None


def forward(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    query, cache_seqlens = along(query), cache_seqlens.contiguous()
    k, v, block_table, cos, sin = (None if x is None else along(x) for x in (k, v, block_table, cos, sin))
    batch, heads, queries, head_dim = query.shape
    kv_heads, value_dim = k_cache.shape[1], v_cache.shape[3]
    added = 0 if k is None else k.shape[2]
    capacity = cache_capacity(k_cache, block_table)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous().expand(batch, heads)
    out, lse = attention_outputs(query, v_cache)
    parts = _native.C.decode_parts(batch * kv_heads, capacity, _native.multiprocessors(query))
    partial_out = lse.new_empty(parts, batch, queries, heads, value_dim) if parts > 1 else None
    partial_lse = lse.new_empty(parts, batch, queries, heads) if parts > 1 else None
    pages = (0, 1) if block_table is None else (k_cache.shape[0], k_cache.shape[2])

    def rows(tensor: Tensor | None, name: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        where = address(tensor, name, query, shape, query.dtype, strided=True)
        return where, (0, 0, 0) if tensor is None else tensor.stride()[:3]

    rotary_dim = 0 if cos is None else cos.shape[-1]

    def angles(tensor: Tensor | None, name: str) -> tuple[int, int, tuple[int, int]]:
        if tensor is None:
            return 0, 0, (0, 0)
        tensor = tensor.expand(batch, 1, -1, -1)
        turned = (batch, 1, max(queries, added), min(rotary_dim, head_dim))  # what the kernel reads angles for
        where = address(tensor, name, query, turned, *DTYPES, strided=True)
        return where, DTYPES.index(tensor.dtype), (tensor.stride(0), tensor.stride(2))

    of_cache = (batch if block_table is None else k_cache.shape[0], kv_heads, k_cache.shape[2])
    of_table = (batch, 0 if block_table is None else block_table.shape[1])
    with torch.cuda.device_of(query):
        _native.C.attend_to_cache(
            DTYPES.index(query.dtype),
            (batch, heads, kv_heads, queries, added),
            (capacity, *pages),
            (head_dim, value_dim),
            *rows(query, "query", (batch, heads, queries, head_dim)),
            *rows(k_cache, "k_cache", (*of_cache, head_dim)),
            *rows(v_cache, "v_cache", (*of_cache, value_dim)),
            *rows(k, "k", (batch, kv_heads, added, head_dim)),
            *rows(v, "v", (batch, kv_heads, added, value_dim)),
            *angles(cos, "cos"),
            *angles(sin, "sin"),
            rotary_dim,
            interleaved,
            address(cache_seqlens, "cache_seqlens", query, (batch,), torch.int32),
            address(block_table, "block_table", query, of_table, torch.int32, strided=True),
            0 if block_table is None else block_table.stride(0),
            address(alibi_slopes, "alibi_slopes", query, (batch, heads), torch.float32, strided=True),
            0 if alibi_slopes is None else alibi_slopes.stride(0),
            scale,
            softcap,
            min(window_left, capacity + queries),
            min(window_right, capacity + queries),
            address(out.transpose(1, 2), "out", query, (batch, queries, heads, value_dim), query.dtype),
            address(lse, "lse", query, (batch, heads, queries), torch.float32),
            parts,
            address(partial_out, "partial_out", query, (parts, batch, queries, heads, value_dim), torch.float32),
            address(partial_lse, "partial_lse", query, (parts, batch, queries, heads), torch.float32),
            _native.stream(query),
        )
    return out, lse

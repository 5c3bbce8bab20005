"""Attention of new queries to a key-value cache, the definition: turn, append in place, then attend to what is valid."""

import torch
from torch import Tensor

from . import rotary_embedding
from .attention import attend, window


def _append(cache: Tensor, new: Tensor, position: Tensor, block_table: Tensor | None) -> None:
    """Writes new (batch, kv_heads, n, dim) at position (batch, n) of each sequence."""
    rows = new.transpose(1, 2).to(cache.dtype)
    if block_table is None:
        batch = torch.arange(cache.shape[0], device=cache.device)[:, None]
        cache[batch, :, position] = rows
    else:
        block_size = cache.shape[2]
        block = block_table.long().gather(1, position // block_size)
        cache[block, :, position % block_size] = rows


def _read(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """The cache as (batch, kv_heads, capacity, dim)."""
    if block_table is None:
        return cache
    return cache[block_table.long()].transpose(1, 2).flatten(2, 3)


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
    k_len = cache_seqlens.long()
    if k is not None and v is not None:
        if cos is not None and sin is not None:
            query, k = rotary_embedding.forward(query, k, cos, sin, interleaved)
        position = k_len[:, None] + torch.arange(k.shape[2], device=k.device)
        _append(k_cache, k, position, block_table)
        _append(v_cache, v, position, block_table)
        k_len = k_len + k.shape[2]
    key, value = _read(k_cache, block_table), _read(v_cache, block_table)

    k_len = k_len[:, None, None, None]
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)
    distance = i + (k_len - query.shape[2]) - j
    valid = j < k_len
    admitted = window(distance, window_left, window_right)
    allowed = valid if admitted is None else valid & admitted
    # What lies beyond the valid keys may be uninitialised, and zero times NaN is NaN.
    value = torch.where(valid.transpose(-1, -2), value, torch.zeros((), dtype=value.dtype, device=value.device))
    return attend(query, key, value, None, alibi_slopes, allowed, distance, None, scale, softcap, 0.0)

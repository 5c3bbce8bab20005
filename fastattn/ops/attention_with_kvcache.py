"""Attention of new queries to a key-value cache, for generation."""

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..backends.attention_outputs import attention_outputs
from ..backends.tensors import cache_capacity
from . import _autocast, _checks, _library


def attention_with_kvcache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Writes k and v at the end of each sequence's cache, in place, then attends to all of it. For inference.

    Args:
        query: (batch, heads, q, head_dim), the newest q positions of each sequence.
        k_cache, v_cache: (batch, kv_heads, capacity, dim), or paged (blocks, kv_heads, block_size, dim). Changed in place.
            Under autocast the other tensors are converted to the cache's dtype.
        k, v: (batch, kv_heads, new, dim), written at positions cache_seqlens[b] … cache_seqlens[b] + new - 1. Both or none.
        cache_seqlens: (batch,), int32, how many keys each sequence has before this call. It is not changed: add `new`
            afterwards.
        block_table: (batch, blocks_per_sequence), int32: position p of sequence b is at row p % block_size of block
            block_table[b, p // block_size].
        is_causal: query i sees the keys up to its own position, aligned to the bottom right: the last query sees all.
        scale, window, softcap, alibi_slopes: as in `attention`, aligned to the bottom right.
        cos, sin, interleaved: query and k are turned before, by the angles at the new tokens' positions, as `rotary_embedding`
            turns them. There must be as many queries as new keys. Neither tensor is changed: the cache gets the turned keys.
        return_lse: also return the logsumexp.

    Returns:
        (batch, heads, q, value_dim), stored as `attention` stores it; with return_lse a pair with lse (batch, heads, q).

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes or devices that do not fit; a cache too short for the new keys.
        RuntimeError: an input requires a gradient: the cache is changed in place, so there is none to give.

    Source: the interface follows flash_attn_with_kvcache (Dao et al.); paging Kwon et al., 2023; rotary positions Su et al.,
    2021.
    """
    if _autocast.active(query) and isinstance(k_cache, Tensor) and k_cache.is_floating_point():
        query, k, v = (_like_cache(x, k_cache) for x in (query, k, v))
    tensors = (query, k_cache, v_cache, k, v, cache_seqlens, cos, sin)
    plain = not _library.watched(*tensors, block_table, alibi_slopes)
    if not (plain and block_table is None and _library.fits("attention_with_kvcache_fits", *tensors)):
        _check_tensors(*tensors, block_table)
    if not type(is_causal) is type(return_lse) is type(interleaved) is bool:
        is_causal = _checks.flag("is_causal", is_causal)
        return_lse = _checks.flag("return_lse", return_lse)
        interleaved = _checks.flag("interleaved", interleaved)
    if _library.needs_grad(query, k_cache, v_cache, k, v, cos, sin):
        raise RuntimeError(
            "attention_with_kvcache changes its cache in place and has no gradient; call it under torch.no_grad(), or "
            "train with fastattn.attention"
        )
    batch, heads, _, head_dim = query.shape
    if alibi_slopes is not None:
        alibi_slopes = _checks.slopes(alibi_slopes, query, batch, heads)
    cos, sin = _checks.angles_with_heads(cos, sin)
    left, right = (-1, -1) if window is None else _checks.window_sides(window)
    args = (
        query,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens,
        block_table,
        alibi_slopes,
        cos,
        sin,
        _checks.softmax_scale(scale, head_dim),
        left,
        0 if is_causal else right,
        _checks.softcap_value(softcap),
        interleaved,
    )
    forward = _forward.unwatched if plain else _forward
    out, lse = forward(*args, dispatch.choose("attention_with_kvcache", args))
    if k is not None and not torch.compiler.is_compiling():
        # So that autograd notices if somebody saved the cache for a backward.
        torch.autograd.graph.increment_version((k_cache, v_cache))
    return (out, lse) if return_lse else out


def _like_cache(x: Any, cache: Tensor) -> Any:
    return x.to(cache.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _check_tensors(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    block_table: Tensor | None,
) -> None:
    _checks.floating("query", query)
    given: tuple[tuple[str, Any], ...] = (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v))
    for name, x in given:
        if x is not None or name.endswith("cache"):
            _checks.like(name, x, "query", query)
            _checks.rank(name, x, "(batch, kv_heads, seq, dim)", 4)
    _checks.rank("query", query, "(batch, heads, q, head_dim)", 4)
    if (k is None) != (v is None):
        raise ValueError("one of k and v is given without the other; pass both or none")
    _check_cache(query, k_cache, v_cache, block_table)
    batch, new = query.shape[0], 0
    if k is not None and v is not None:
        new = k.shape[2]
        expected = (batch, k_cache.shape[1], new)
        if k.shape != (*expected, query.shape[3]) or v.shape != (*expected, v_cache.shape[3]):
            raise ValueError(
                f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; expected {(*expected, query.shape[3])} and "
                f"{(*expected, v_cache.shape[3])}"
            )
    if cos is not None or sin is not None:
        _check_angles(cos, sin, query, k)
    check_lengths(query, k_cache, cache_seqlens, block_table, new)


def _check_angles(cos: Tensor | None, sin: Tensor | None, query: Tensor, k: Tensor | None) -> None:
    if cos is None or sin is None:
        raise ValueError("one of cos and sin is given without the other; pass both or none")
    _checks.angles(cos, sin, "query", query, query.shape)
    if k is None:
        raise ValueError("cos and sin turn new tokens, and there are none: pass k and v, or turn query before the call")
    if query.shape[2] != k.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} tokens and k {k.shape[2]}; with cos and sin, whose angles are for both, their numbers "
            f"must be equal"
        )


def _check_cache(query: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> None:
    batch, heads, _, head_dim = query.shape
    if k_cache.shape[:3] != v_cache.shape[:3] or k_cache.shape[3] != head_dim:
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} for head_dim {head_dim}; all but "
            f"the last dimension must be equal, and k_cache's last must be head_dim"
        )
    if head_dim == 0:
        raise ValueError("query and k_cache have head_dim 0; expected at least 1")
    kv_heads = k_cache.shape[1]
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"query has {heads} heads and k_cache {kv_heads}; query's must be a multiple of the cache's")
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(
                f"k_cache has batch {k_cache.shape[0]} but query has {batch}; or pass block_table if paged"
            )
        return
    _checks.tensor("block_table", block_table)
    if block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.shape[0] != batch:
        raise ValueError(
            f"block_table has dtype {block_table.dtype} and shape {tuple(block_table.shape)}; expected int32 "
            f"(batch, blocks_per_sequence) with batch {batch}"
        )
    if block_table.device != query.device:
        raise ValueError(f"block_table is on {block_table.device} but query is on {query.device}; move one")
    if _checks.readable(block_table) and block_table.numel():
        low, high = block_table.min().item(), block_table.max().item()
        if low < 0 or high >= k_cache.shape[0]:
            raise ValueError(
                f"block_table names blocks {low} to {high}; k_cache has {k_cache.shape[0]}, counted from 0"
            )


def check_lengths(query: Tensor, k_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, new: int) -> None:
    """That cache_seqlens says for each sequence of query (batch, …) how many keys its cache has, and leaves room for new ones."""
    batch = query.shape[0]
    _checks.tensor("cache_seqlens", cache_seqlens)
    if cache_seqlens.dtype != torch.int32 or cache_seqlens.shape != (batch,):
        raise ValueError(
            f"cache_seqlens has dtype {cache_seqlens.dtype} and shape {tuple(cache_seqlens.shape)}; expected int32 "
            f"({batch},), the number of keys in each sequence's cache"
        )
    if cache_seqlens.device != k_cache.device:
        raise ValueError(f"cache_seqlens is on {cache_seqlens.device} but k_cache is on {k_cache.device}; move one")
    if not _checks.readable(cache_seqlens) or batch == 0:
        return
    capacity = cache_capacity(k_cache, block_table)
    values = cache_seqlens.tolist()
    if min(values) < 0 or max(values) + new > capacity:
        raise ValueError(
            f"cache_seqlens runs from {min(values)} to {max(values)} and {new} keys are added, but the cache holds {capacity}; "
            f"make the cache longer"
        )


def _fake_forward(query, k_cache, v_cache, *rest):
    return attention_outputs(query, v_cache)


_forward = _library.define(
    "attention_with_kvcache",
    "(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor cache_seqlens, "
    "Tensor? block_table, Tensor? alibi_slopes, Tensor? cos, Tensor? sin, float scale, int window_left, int window_right, "
    "float softcap, bool interleaved) -> (Tensor out, Tensor lse)",
    _fake_forward,
)

"""Attention to a contiguous key-value cache: csrc/cpu/attention_decode.cpp, attention_forward.cpp for many queries."""

from torch import Tensor

from ..attention_outputs import attention_outputs
from . import _native


def unsupported(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    if block_table is not None:
        return "it has no paged caches; pass a contiguous cache, without block_table"
    return _native.unsupported(query, k_cache, v_cache, k, v)


def forward(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    out, lse = attention_outputs(query, v_cache)
    _native.C.attention_with_kvcache_forward(
        query,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens.contiguous(),
        block_table,
        alibi_slopes,
        out,
        lse,
        scale,
        window_left,
        window_right,
        softcap,
    )
    return out, lse

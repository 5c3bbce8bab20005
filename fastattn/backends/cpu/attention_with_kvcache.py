"""Attention to a contiguous key-value cache: csrc/cpu/attention_decode.cpp, attention_forward.cpp for many queries."""

from torch import Tensor

from ..attention_outputs import attention_outputs
from ..tensors import along
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
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    if block_table is not None:
        return "it has no paged caches; pass a contiguous cache, without block_table"
    reason = _native.unsupported(query, k_cache, v_cache, k, v)
    if reason is None and cos is not None and sin is not None:
        reason = _native.unsupported(cos) or _native.unsupported(sin)
    return reason


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
        None if cos is None else along(cos),
        None if sin is None else along(sin),
        out,
        lse,
        scale,
        window_left,
        window_right,
        softcap,
        interleaved,
    )
    return out, lse

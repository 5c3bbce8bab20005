"""One step of generation: append to the cache, attend to all of it. Against SDPA on the same cache."""

from dataclasses import replace

import torch

import fastattn

from .. import peers
from ..harness import FORWARD, OURS, Case, Peer, Problem
from ._inputs import random

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """One query a sequence."""
    if quick:
        return [_case(2, 4, 2, 64, 32)]
    return [
        _case(1, 32, 8, 4096, 128),
        _case(1, 32, 8, 4096, 128, dtype=HALF),
        _case(8, 12, 12, 512, 64),
    ]


def gpu_cases() -> list[Case]:
    """Few and many sequences, with 4096 to 32,768 tokens in the cache."""
    shapes = ((1, 32, 8, 32768, 128), (16, 32, 8, 8192, 128), (64, 32, 8, 4096, 128), (16, 16, 16, 4096, 64))
    return [replace(_case(*shape, dtype=HALF), compiled=False) for shape in shapes]


def _case(batch, heads, kv_heads, cached, head_dim, *, dtype=FLOAT) -> Case:
    shape = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "cached": cached, "head_dim": head_dim}
    flops = 4 * batch * heads * (cached + 1) * head_dim
    moved = 2 * batch * kv_heads * (cached + 1) * head_dim * dtype.itemsize
    return Case("attention_with_kvcache", shape, dtype, FORWARD, _build, flops, moved)


def _build(case: Case) -> Problem:
    batch, heads, kv_heads, cached, head_dim = case.shape.values()
    cache, new = (batch, kv_heads, cached + 64, head_dim), (batch, kv_heads, 1, head_dim)
    inputs = tuple(random((batch, heads, 1, head_dim), cache, cache, new, new, dtype=case.dtype))
    lengths = torch.full((batch,), cached, dtype=torch.int32)

    def ours(query, k_cache, v_cache, k, v):
        return fastattn.attention_with_kvcache(query, k_cache, v_cache, k, v, cache_seqlens=lengths)

    def with_attention(attention):
        def step(query, k_cache, v_cache, k, v):
            k_cache[:, :, cached : cached + 1] = k
            v_cache[:, :, cached : cached + 1] = v
            return attention(query, k_cache[:, :, : cached + 1], v_cache[:, :, : cached + 1])

        return step

    eager = Peer(with_attention(peers.eager_attention), inputs)
    sdpa = Peer(with_attention(peers.sdpa), inputs)
    return Problem({OURS: Peer(ours, inputs), "sdpa": sdpa, "eager": eager}, "sdpa", eager)

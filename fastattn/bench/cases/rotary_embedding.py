"""Rotary position embedding of queries and keys, against the formula in plain torch, as models write it."""

import torch
from torch import Tensor

import fastattn

from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """A decoder's prompt, in halves (Llama) and in neighbouring pairs (GPT-J), one token of it, and training."""
    if quick:
        return [_case(1, 4, 2, 32, 16, direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        _case(1, 32, 8, 2048, 128),
        _case(1, 32, 8, 2048, 128, dtype=HALF),
        _case(1, 32, 8, 2048, 128, "interleaved"),
        _case(8, 12, 12, 256, 64),
        _case(1, 32, 8, 1, 128),
        _case(1, 32, 8, 2048, 128, direction=TRAINING),
        _case(1, 32, 8, 2048, 128, direction=TRAINING, dtype=HALF),
    ]


def gpu_cases() -> list[Case]:
    """A decoder's prompts of 16,384 tokens."""
    return [_case(4, 32, 8, 4096, 128, dtype=HALF, direction=direction) for direction in (FORWARD, TRAINING)]


def _case(batch, heads, kv_heads, seq, head_dim, options="", *, dtype=FLOAT, direction=FORWARD) -> Case:
    """Two products and a sum for each value; queries, keys and the angles are read, queries and keys written."""
    values = batch * (heads + kv_heads) * seq * head_dim
    passes = 1 if direction == FORWARD else 2
    moved = (2 * values + 2 * seq * head_dim) * dtype.itemsize * passes
    shape = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "seq": seq, "head_dim": head_dim}
    return Case("rotary_embedding", shape, dtype, direction, _build, 3 * values * passes, moved, options)


def _build(case: Case) -> Problem:
    batch, heads, kv_heads, seq, head_dim = case.shape.values()
    interleaved = case.options == "interleaved"
    projected = random((batch, seq, heads, head_dim), (batch, seq, kv_heads, head_dim), dtype=case.dtype)
    inputs = tuple(x.transpose(1, 2) for x in projected)  # the layout a projection gives
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(seq) + 1.0, frequencies)
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else angles.repeat(1, 2)
    cos, sin = angles.cos().to(case.dtype), angles.sin().to(case.dtype)

    def turned(x: Tensor) -> Tensor:
        if interleaved:
            rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            first, second = x.chunk(2, dim=-1)
            rotated = torch.cat((-second, first), dim=-1)
        return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)

    def eager(query, key):
        return turned(query), turned(key)

    def ours(query, key):
        return fastattn.rotary_embedding(query, key, cos, sin, interleaved)

    return Problem({OURS: Peer(ours, inputs), "eager": Peer(eager, inputs)}, "eager", Peer(eager, inputs))

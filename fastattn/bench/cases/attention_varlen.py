"""Packed attention, against what models run without packing: eager and SDPA on the padded batch with its mask."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import fastattn

from .. import peers
from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import lengths, random

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """Batches of mixed length, from the longest down to a sixteenth of it."""
    if quick:
        return [_case(3, 2, 48, 32, direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        _case(32, 12, 256, 32),
        _case(32, 12, 256, 32, dtype=HALF),
        _case(16, 12, 512, 64),
        _case(16, 12, 512, 64, dtype=HALF),
        _case(16, 12, 512, 64, direction=TRAINING),
    ]


def gpu_cases() -> list[Case]:
    """A batch of mixed length, from 4096 tokens down to 256."""
    found = [_case(16, 16, 4096, 128, dtype=HALF, direction=direction) for direction in (FORWARD, TRAINING)]
    return [replace(case, compiled=False) for case in found]


def _case(batch, heads, longest, head_dim, *, dtype=FLOAT, direction=FORWARD) -> Case:
    sizes = lengths(batch, longest)
    shape = {"batch": batch, "heads": heads, "longest": longest, "tokens": sum(sizes), "head_dim": head_dim}
    flops = sum(n * n for n in sizes) * heads * head_dim * (4 if direction == FORWARD else 14)
    moved = 4 * sum(sizes) * heads * head_dim * dtype.itemsize * (1 if direction == FORWARD else 3)
    return Case("attention_varlen", shape, dtype, direction, _build, flops, moved)


def _build(case: Case) -> Problem:
    batch, heads, longest, tokens, head_dim = case.shape.values()
    sizes = torch.tensor(lengths(batch, longest))
    packed = tuple(random(*[(tokens, heads, head_dim)] * 3, dtype=case.dtype))
    ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
    present = torch.arange(longest) < sizes.unsqueeze(1)  # (batch, longest)

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(batch, longest, heads, head_dim)
        padded[present] = x
        return padded.transpose(1, 2)

    padded = tuple(map(pad, packed))

    def on_padded(attention: Callable) -> Peer:
        return Peer(
            functools.partial(attention, mask=present[:, None, None, :]),
            padded,
            common=lambda x: x.transpose(1, 2)[present],
            received=lambda grad: grad * present[:, None, :, None],
        )

    def ours(query, key, value):
        return fastattn.attention_varlen(query, key, value, ends, ends, longest, longest)

    eager = on_padded(peers.eager_attention)
    return Problem({OURS: Peer(ours, packed), "sdpa": on_padded(peers.sdpa), "eager": eager}, "sdpa", eager)

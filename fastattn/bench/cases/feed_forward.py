"""The feed-forward block, plain and gated, against its layers in plain torch."""

import torch
from torch.nn import functional as F

import fastattn

from .. import peers
from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """An encoder's block with GELU and a decoder's with a SiLU gate."""
    if quick:
        return [_case(32, 32, 64, "gelu", direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        _case(1024, 384, 1536, "gelu"),
        _case(1024, 768, 3072, "gelu"),
        _case(1024, 768, 3072, "gelu", dtype=HALF),
        _case(512, 1024, 2816, "silu gated"),
        _case(512, 768, 3072, "gelu", direction=TRAINING),
        _case(512, 768, 3072, "gelu", direction=TRAINING, dtype=HALF),
        _case(512, 1024, 2816, "silu gated", direction=TRAINING),
    ]


def gpu_cases() -> list[Case]:
    """An encoder's block, and a decoder's 4096 wide."""
    return [
        _case(tokens, dim, hidden, options, dtype=HALF, direction=direction)
        for direction in (FORWARD, TRAINING)
        for tokens, dim, hidden, options in ((16384, 1024, 4096, "gelu"), (8192, 4096, 11008, "silu gated"))
    ]


def _case(tokens, dim, hidden, options, *, dtype=FLOAT, direction=FORWARD) -> Case:
    matrices = 3 if "gated" in options else 2
    passes = 1 if direction == FORWARD else 3
    flops = 2 * matrices * tokens * dim * hidden * passes
    moved = (2 * tokens * dim + matrices * dim * hidden) * dtype.itemsize * passes
    shape = {"tokens": tokens, "dim": dim, "hidden": hidden}
    return Case("feed_forward", shape, dtype, direction, _build, flops, moved, options)


def _build(case: Case) -> Problem:
    tokens, dim, hidden = case.shape.values()
    activation = case.options.split()[0]
    gated = "gated" in case.options
    x, w1, b1, w2, b2, w_gate = random(
        (tokens, dim), (hidden, dim), (hidden,), (dim, hidden), (dim,), (hidden, dim), dtype=case.dtype
    )
    inputs = (x, w1 / dim**0.5, b1, w2 / hidden**0.5, b2, *([w_gate / dim**0.5] if gated else []))

    def eager(x, w1, b1, w2, b2, w_gate=None):
        up = F.linear(x, w1, b1)
        if w_gate is None:
            return F.linear(peers.eager_activation(up, activation), w2, b2)
        return F.linear(peers.eager_activation(F.linear(x, w_gate), activation) * up, w2, b2)

    def ours(x, w1, b1, w2, b2, w_gate=None):
        return fastattn.feed_forward(x, w1, b1, w2, b2, activation=activation, w_gate=w_gate)

    return Problem({OURS: Peer(ours, inputs), "eager": Peer(eager, inputs)}, "eager", Peer(eager, inputs))

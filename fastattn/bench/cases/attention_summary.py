"""Entropy, largest weight and distance of attention's weights, against plain torch, which forms the weights."""

import torch
from torch import Tensor

import fastattn

from ..harness import FORWARD, OURS, Case, Peer, Problem
from ._inputs import random

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """An encoder's batch and a long sequence, causal too."""
    if quick:
        return [_case(1, 2, 64, 32)]
    return [
        _case(8, 12, 512, 64),
        _case(8, 12, 512, 64, dtype=HALF),
        _case(1, 12, 2048, 64),
        _case(1, 12, 2048, 64, options="causal"),
        _case(1, 12, 2048, 64, options="causal", dtype=HALF),
    ]


def _case(batch, heads, seq, head_dim, *, options="", dtype=FLOAT) -> Case:
    shape = {"batch": batch, "heads": heads, "seq": seq, "head_dim": head_dim}
    flops = 2 * batch * heads * seq * seq * head_dim / (2 if options else 1)
    moved = batch * heads * seq * (2 * head_dim * dtype.itemsize + 20)
    return Case("attention_summary", shape, dtype, FORWARD, _build, flops, moved, options)


def _build(case: Case) -> Problem:
    batch, heads, seq, head_dim = case.shape.values()
    inputs = tuple(random(*[(batch, heads, seq, head_dim)] * 2, dtype=case.dtype))
    causal = case.options == "causal"

    def ours(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        found = fastattn.attention_summary(query, key, is_causal=causal)
        return found.entropy, found.max_weight, found.distance

    def eager(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        score = query @ key.mT * head_dim**-0.5
        place = torch.arange(seq, device=query.device)
        if causal:
            score = score.masked_fill(place > place[:, None], -torch.inf)
        weight = score.softmax(dim=-1, dtype=torch.promote_types(score.dtype, torch.float32))
        distance = (weight * (place - place[:, None]).abs()).sum(dim=-1)
        return torch.special.entr(weight).sum(dim=-1), weight.amax(dim=-1), distance

    return Problem({OURS: Peer(ours, inputs), "eager": Peer(eager, inputs)}, "eager", Peer(eager, inputs))

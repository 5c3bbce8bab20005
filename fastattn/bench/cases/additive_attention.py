"""Additive attention, against plain torch, which writes out the (queries, keys, hidden) tensor."""

import torch
from torch.nn import functional as F

import fastattn

from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import lengths, random

FLOAT, HALF = torch.float32, torch.bfloat16
TANH = 20  # operations that a float32 tanh takes, about: a polynomial or two, an exponential, a division


def cases(quick: bool = False) -> list[Case]:
    """A translation model's decoder in training, one step of it, and padded keys."""
    if quick:
        return [_case(2, 8, 16, 32, direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        _case(32, 1, 64, 512),
        _case(8, 64, 256, 256),
        _case(8, 64, 256, 256, dtype=HALF),
        _case(8, 64, 256, 256, "padded"),
        _case(8, 64, 256, 256, direction=TRAINING),
        _case(8, 64, 256, 256, direction=TRAINING, dtype=HALF),
    ]


def gpu_cases() -> list[Case]:
    """A translation model's decoder in training."""
    return [_case(32, 128, 512, 512, dtype=HALF, direction=direction) for direction in (FORWARD, TRAINING)]


def _case(batch, queries, keys, dim, options="", *, dtype=FLOAT, direction=FORWARD) -> Case:
    """For each query, key and hidden unit a sum, a tanh, a product and a sum; besides, two projections and the weighted sum
    of the values. The backward takes twice as much again, but for the tanh, which it computes once more."""
    seen = queries * sum(lengths(batch, keys)) if options == "padded" else batch * queries * keys
    products = 2 * batch * (queries + keys) * dim * dim + 2 * seen * dim
    passes, tanhs = (1, 1) if direction == FORWARD else (3, 2)
    flops = passes * (products + 3 * seen * dim) + tanhs * TANH * seen * dim
    tensors = batch * (2 * queries + 2 * keys) * dim + 2 * dim * dim  # query, out; key, value; the two matrices
    moved = tensors * dtype.itemsize * passes
    shape = {"batch": batch, "queries": queries, "keys": keys, "dim": dim}
    return Case("additive_attention", shape, dtype, direction, _build, flops, moved, options)


def _build(case: Case) -> Problem:
    batch, queries, keys, dim = case.shape.values()
    query, key, value, w_query, w_key, v = random(
        (batch, queries, dim), (batch, keys, dim), (batch, keys, dim), (dim, dim), (dim, dim), (dim,), dtype=case.dtype
    )
    inputs = (query, key, value, w_query / dim**0.5, w_key / dim**0.5, v / 8)
    mask = None
    if case.options == "padded":
        mask = (torch.arange(keys) < torch.tensor(lengths(batch, keys)).unsqueeze(1))[:, None, :]

    def eager(query, key, value, w_query, w_key, v):
        hidden = torch.tanh(F.linear(query, w_query).unsqueeze(2) + F.linear(key, w_key).unsqueeze(1))
        scores = hidden @ v
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return torch.softmax(scores, dim=-1) @ value

    def ours(query, key, value, w_query, w_key, v):
        return fastattn.additive_attention(query, key, value, w_query, w_key, v, mask)

    return Problem({OURS: Peer(ours, inputs), "eager": Peer(eager, inputs)}, "eager", Peer(eager, inputs))

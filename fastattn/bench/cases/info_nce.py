"""The contrastive loss InfoNCE, against the score matrix and its cross entropy in plain torch."""

import torch
from torch.nn import functional as F

import fastattn

from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random

FLOAT, HALF = torch.float32, torch.bfloat16
TEMPERATURE = 0.07


def cases(quick: bool = False) -> list[Case]:
    """Batches of sentence embeddings, one-sided and symmetric (CLIP)."""
    if quick:
        return [_case(32, 32, direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        _case(512, 384),
        _case(4096, 384),
        _case(4096, 384, "symmetric"),
        _case(4096, 384, dtype=HALF),
        _case(512, 384, direction=TRAINING),
        _case(4096, 384, direction=TRAINING),
        _case(4096, 384, "symmetric", direction=TRAINING),
        _case(4096, 384, direction=TRAINING, dtype=HALF),
    ]


def gpu_cases() -> list[Case]:
    """Batches as CLIP and sentence encoders have them."""
    return [
        _case(pairs, 768, options, dtype=HALF, direction=direction)
        for direction in (FORWARD, TRAINING)
        for pairs, options in ((4096, ""), (32768, "symmetric"))
    ]


def _case(pairs, dim, options="", *, dtype=FLOAT, direction=FORWARD) -> Case:
    """One product of all queries with all positives forward, two more for the gradients; the scores need not be moved."""
    passes = 1 if direction == FORWARD else 3
    flops = 2 * pairs * pairs * dim * passes
    moved = 2 * pairs * dim * dtype.itemsize * (1 if direction == FORWARD else 2)
    return Case("info_nce", {"pairs": pairs, "dim": dim}, dtype, direction, _build, flops, moved, options)


def _build(case: Case) -> Problem:
    pairs, dim = case.shape.values()
    query, noise = random((pairs, dim), (pairs, dim), dtype=torch.float32)
    # Unit vectors; a positive is its query and noise of the same size: cosines about 0.7.
    inputs = tuple(F.normalize(x, dim=-1).to(case.dtype) for x in (query, query + noise))
    symmetric = case.options == "symmetric"

    def eager(query, positive):
        logits = query @ positive.T / TEMPERATURE
        logits = logits if query.dtype == torch.float64 else logits.float()
        target = torch.arange(pairs, device=query.device)
        loss = F.cross_entropy(logits, target)
        return (loss + F.cross_entropy(logits.T, target)) / 2 if symmetric else loss

    def ours(query, positive):
        return fastattn.info_nce(query, positive, temperature=TEMPERATURE, symmetric=symmetric)

    return Problem({OURS: Peer(ours, inputs), "eager": Peer(eager, inputs)}, "eager", Peer(eager, inputs))

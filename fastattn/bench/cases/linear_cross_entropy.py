"""A language model's last linear layer and its loss, against the two in plain torch, which write out the logits."""

import torch
from torch.nn import functional as F

import fastattn

from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random

FLOAT, HALF = torch.float32, torch.bfloat16
IGNORED = 4  # every fourth token: a prompt, padding


def cases(quick: bool = False) -> list[Case]:
    """A large vocabulary, whose logits leave the caches by far, and a small one. A quarter of the tokens is ignored."""
    if quick:
        return [_case(32, 128, 32, direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        _case(tokens, words, dim, dtype=dtype, direction=direction)
        for direction in (FORWARD, TRAINING)
        for tokens, words, dim in ((512, 8000, 256), (2048, 32000, 384))
        for dtype in (FLOAT, HALF)
    ]


def gpu_cases() -> list[Case]:
    """A small vocabulary and one of 128,256 words, of models 1024 and 4096 wide."""
    return [
        _case(tokens, words, dim, dtype=HALF, direction=direction)
        for direction in (FORWARD, TRAINING)
        for tokens, words, dim in ((8192, 32000, 1024), (8192, 128256, 4096), (16384, 128256, 2048))
    ]


def _case(tokens, words, dim, *, dtype=FLOAT, direction=FORWARD) -> Case:
    """One product forward, two more for the gradients, of the tokens that are not ignored; the logits need not be moved, x and
    the weight must."""
    passes = 1 if direction == FORWARD else 3
    flops = 2 * (tokens - len(range(0, tokens, IGNORED))) * words * dim * passes
    moved = (tokens + words) * dim * dtype.itemsize * (1 if direction == FORWARD else 2)
    shape = {"tokens": tokens, "words": words, "dim": dim}
    return Case("linear_cross_entropy", shape, dtype, direction, _build, flops, moved)


def _build(case: Case) -> Problem:
    tokens, words, dim = case.shape.values()
    x, weight = random((tokens, dim), (words, dim), dtype=case.dtype)
    target = torch.arange(tokens) * 7919 % words
    target[::IGNORED] = -100

    def eager(x, weight):
        logits = F.linear(x, weight)
        # In float32, as transformers' loss takes them: the mean over many tokens is no matter for 8 bits.
        return F.cross_entropy(logits if x.dtype == torch.float64 else logits.float(), target)

    def ours(x, weight):
        return fastattn.linear_cross_entropy(x, weight, target)

    inputs = (x, weight / dim**0.5)
    return Problem({OURS: Peer(ours, inputs), "eager": Peer(eager, inputs)}, "eager", Peer(eager, inputs))

"""What a call costs beside its kernel: tensors so small that the kernel takes next to nothing.

Compare fastattn's time with the kernel's own ("backend": the backend's `forward` on arguments already checked) and with
torch's functions on the same tensors. In training the call includes a backward.
"""

import functools

import torch
from torch.nn import functional as F

import fastattn

from .. import peers
from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random


def cases(quick: bool = False) -> list[Case]:
    """Two tokens through each op."""
    builders = {"attention": _attention, "layer_norm": _layer_norm, "linear": _linear}
    chosen = ["attention"] if quick else list(builders)
    return [
        Case("overhead", {"tokens": 2, "dim": 16}, torch.float32, direction, builders[name], 64, 256, name)
        for name in chosen
        for direction in (FORWARD, TRAINING)
    ]


def _attention(case: Case) -> Problem:
    inputs = tuple(random(*[(1, 1, 2, 16)] * 3, dtype=case.dtype))
    eager = Peer(peers.eager_attention, inputs)
    others = {OURS: Peer(fastattn.attention, inputs), "sdpa": Peer(peers.sdpa, inputs), "eager": eager}
    settings = (None, None, None, 0.25, -1, -1, 0, 0.0, 0.0)
    return Problem(_with_backend(case, others, inputs, settings), "sdpa", eager)


def _layer_norm(case: Case) -> Problem:
    inputs = tuple(random((2, 16), (16,), (16,), dtype=case.dtype))
    eager = Peer(lambda x, weight, bias: F.layer_norm(x, (16,), weight, bias), inputs)
    others = {OURS: Peer(fastattn.layer_norm, inputs), "eager": eager}
    return Problem(_with_backend(case, others, inputs, (None, None, 1e-5, 0.0)), "eager", eager)


def _linear(case: Case) -> Problem:
    inputs = tuple(random((2, 16), (16, 16), (16,), dtype=case.dtype))
    eager = Peer(F.linear, inputs)
    others = {OURS: Peer(fastattn.linear, inputs), "eager": eager}
    return Problem(_with_backend(case, others, inputs, (None, "none", False)), "eager", eager)


def _with_backend(case: Case, others: dict[str, Peer], inputs: tuple, settings: tuple) -> dict[str, Peer]:
    """Adds the chosen backend's forward, called straight."""
    if case.direction == TRAINING:
        return others
    chosen = fastattn.explain(case.options, *inputs).backend
    forward = fastattn.dispatch.BACKENDS[chosen][case.options].forward
    return {**others, "backend": Peer(functools.partial(_first, forward, settings), inputs)}


def _first(forward, settings: tuple, *inputs):
    return forward(*inputs, *settings)[0]

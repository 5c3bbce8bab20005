"""What a call costs beside its kernel: tensors so small that the kernel takes next to nothing.

Compare fastattn's time with the kernel's own ("backend": the backend's `forward` on arguments already checked, allocations
included) and with torch's functions on the same tensors. "recorded" calls record a graph for a backward that does not
follow; in training it does.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F

import fastattn

from ...backends import BACKENDS
from .. import peers
from ..harness import BACKEND, FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random


def cases(quick: bool = False) -> list[Case]:
    """Two tokens through each op: without a graph, with one, and with its backward."""
    builders = {"attention": _attention, "layer_norm": _layer_norm, "linear": _linear}
    chosen = {"attention": _attention} if quick else builders
    return [
        Case("overhead", {"tokens": 2, "dim": 16}, torch.float32, direction, build, 0, 0, f"{name}{recorded}")
        for name, build in chosen.items()
        for direction, recorded in ((FORWARD, ""), (FORWARD, " recorded"), (TRAINING, ""))
    ]


def _attention(case: Case) -> Problem:
    inputs = random(*[(1, 1, 2, 16)] * 3, dtype=case.dtype)
    others: dict[str, Callable] = {OURS: fastattn.attention, "sdpa": peers.sdpa, "eager": peers.eager_attention}
    return _problem(case, others, "sdpa", inputs, (None, None, None, 0.25, -1, -1, 0, 0.0, 0.0))


def _layer_norm(case: Case) -> Problem:
    inputs = random((2, 16), (16,), (16,), dtype=case.dtype)
    others: dict[str, Callable] = {
        OURS: fastattn.layer_norm,
        "eager": lambda x, weight, bias: F.layer_norm(x, (16,), weight, bias),
    }
    return _problem(case, others, "eager", inputs, (None, None, 1e-5, 0.0))


def _linear(case: Case) -> Problem:
    inputs = random((2, 16), (16, 16), (16,), dtype=case.dtype)
    return _problem(case, {OURS: fastattn.linear, "eager": F.linear}, "eager", inputs, (None, "none", False))


def _problem(
    case: Case, calls: dict[str, Callable], baseline: str, inputs: list[torch.Tensor], settings: tuple
) -> Problem:
    """`settings` are what the backend's forward takes after the inputs."""
    op, *recorded = case.options.split()
    definition = Peer(calls["eager"], tuple(inputs))
    if case.direction == FORWARD:
        backend = fastattn.explain(op, *inputs).backend
        calls[BACKEND] = functools.partial(_first, BACKENDS[backend][op].forward, settings)
    others = {name: Peer(call, tuple(inputs)) for name, call in calls.items()}
    if recorded:
        leaves = tuple(x.requires_grad_() for x in inputs)
        others = {name: replace(peer, call=_recording(peer.call), inputs=leaves) for name, peer in others.items()}
        others[BACKEND] = Peer(calls[BACKEND], tuple(x.detach() for x in inputs))
    return Problem(others, baseline, definition)


def _recording(call: Callable) -> Callable:
    def recorded(*inputs):
        with torch.enable_grad():
            return call(*inputs)

    return recorded


def _first(forward: Callable, settings: tuple, *inputs):
    return forward(*inputs, *settings)[0]

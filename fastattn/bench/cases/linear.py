"""Linear with its activation, against F.linear and torch's own oneDNN linear."""

import functools

import torch
from torch.nn import functional as F

import fastattn

from .. import peers
from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """The projections of small and base encoders, and one token of a decoder."""
    if quick:
        return [_case(32, 32, 64, "gelu", direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        _case(1024, 384, 384),
        _case(1024, 384, 1536, "gelu"),
        _case(1024, 768, 3072, "gelu"),
        _case(1024, 768, 3072, "gelu", dtype=HALF),
        _case(1, 2048, 2048),
        _case(1024, 768, 3072, "gelu", direction=TRAINING),
        _case(1024, 768, 3072, "gelu", direction=TRAINING, dtype=HALF),
    ]


def gpu_cases() -> list[Case]:
    """The projections of a model 1024 and one 4096 wide, and one token."""
    return [
        _case(16384, 1024, 4096, "gelu", dtype=HALF),
        _case(8192, 4096, 4096, dtype=HALF),
        _case(8192, 4096, 16384, "gelu", dtype=HALF),
        _case(1, 8192, 8192, dtype=HALF),
        _case(16384, 1024, 4096, "gelu", direction=TRAINING, dtype=HALF),
        _case(8192, 4096, 16384, "gelu", direction=TRAINING, dtype=HALF),
    ]


def _case(rows, inner, outer, activation="none", *, dtype=FLOAT, direction=FORWARD) -> Case:
    flops = 2 * rows * inner * outer * (1 if direction == FORWARD else 3)
    moved = (rows * inner + inner * outer + rows * outer) * dtype.itemsize * (1 if direction == FORWARD else 3)
    return Case("linear", {"rows": rows, "in": inner, "out": outer}, dtype, direction, _build, flops, moved, activation)


def _build(case: Case) -> Problem:
    rows, inner, outer = case.shape.values()
    x, weight, bias = random((rows, inner), (outer, inner), (outer,), dtype=case.dtype)
    inputs = (x, weight / inner**0.5, bias)
    activation = case.options

    def eager(x, weight, bias):
        return peers.eager_activation(F.linear(x, weight, bias), activation)

    ours = functools.partial(fastattn.linear, activation=activation)
    others = {OURS: Peer(ours, inputs), "eager": Peer(eager, inputs)}
    onednn = peers.onednn_linear()
    if onednn is not None and case.device == "cpu" and case.direction == FORWARD:
        algorithm = "none" if activation == "gelu" else ""
        others["onednn"] = Peer(functools.partial(onednn, activation=activation, algorithm=algorithm), inputs)
    return Problem(others, "eager", Peer(eager, inputs))

"""Add + RMS norm, which gives the sum as well, against the two steps in plain torch."""

import torch
from torch.nn import functional as F

import fastattn

from .. import peers
from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random
from .layer_norm import gpu_norm_cases, norm_case

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """Widths of small decoders, and rows enough to leave the caches."""
    if quick:
        return [norm_case("rms_norm", _build, 32, 64, direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        norm_case("rms_norm", _build, rows, dim, dtype=dtype, direction=direction)
        for direction in (FORWARD, TRAINING)
        for rows, dim in ((256, 2048), (4096, 2048))
        for dtype in (FLOAT, HALF)
    ]


def gpu_cases() -> list[Case]:
    """Tensors of 32 to 512 MiB."""
    return gpu_norm_cases("rms_norm", _build)


def _build(case: Case) -> Problem:
    rows, dim = case.shape.values()
    x, residual, weight = random((rows, dim), (rows, dim), (dim,), dtype=case.dtype)

    def eager(x, residual, weight):
        total = residual + x
        return F.rms_norm(total, weight.shape, weight, 1e-6), total

    def ours(x, residual, weight):
        return fastattn.rms_norm(x, weight, eps=1e-6, residual=residual)

    def liger(x, residual, weight):
        return peers.liger_norm("liger_fused_add_rms_norm")(x, residual, weight, 1e-6)

    inputs = (x, residual, 1 + weight / 8)
    others = {OURS: Peer(ours, inputs), "eager": Peer(eager, inputs)}
    if case.device == "cuda":
        others["liger"] = Peer(liger, inputs)
    return Problem(others, "eager", Peer(eager, inputs))

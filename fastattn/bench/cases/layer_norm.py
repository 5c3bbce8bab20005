"""Add + layer norm, which gives the sum as well, against the two steps in plain torch."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

import fastattn

from .. import peers
from ..harness import FORWARD, OURS, TRAINING, Case, Peer, Problem
from ._inputs import random

FLOAT, HALF = torch.float32, torch.bfloat16


def cases(quick: bool = False) -> list[Case]:
    """Widths of small and of base encoders, and rows enough to leave the caches."""
    if quick:
        return [norm_case("layer_norm", _build, 32, 64, direction=direction) for direction in (FORWARD, TRAINING)]
    return [
        norm_case("layer_norm", _build, rows, dim, dtype=dtype, direction=direction)
        for direction in (FORWARD, TRAINING)
        for rows, dim in ((1024, 384), (8192, 768))
        for dtype in (FLOAT, HALF)
    ]


def gpu_cases() -> list[Case]:
    """Tensors of 32 to 512 MiB."""
    return gpu_norm_cases("layer_norm", _build)


def gpu_norm_cases(op: str, build: Callable[[Case], Problem]) -> list[Case]:
    """Rows of base and of large models, beyond what a GPU's cache holds."""
    return [
        norm_case(op, build, rows, dim, dtype=HALF, direction=direction)
        for direction in (FORWARD, TRAINING)
        for rows, dim in ((16384, 1024), (16384, 4096), (32768, 8192))
    ]


def norm_case(op, build, rows, dim, *, dtype=FLOAT, direction=FORWARD) -> Case:
    """A case of residual add and norm.

    It reads x and the residual and writes the norm and the sum; the backward reads the two gradients and the sum and
    writes one gradient.
    """
    values = rows * dim
    flops, tensors = (10 * values, 4) if direction == FORWARD else (25 * values, 8)
    return Case(op, {"rows": rows, "dim": dim}, dtype, direction, build, flops, tensors * values * dtype.itemsize)


def _build(case: Case) -> Problem:
    rows, dim = case.shape.values()
    x, residual, weight, bias = random((rows, dim), (rows, dim), (dim,), (dim,), dtype=case.dtype)

    def eager(x, residual, weight, bias):
        total = residual + x
        return F.layer_norm(total, weight.shape, weight, bias), total

    def ours(x, residual, weight, bias):
        return fastattn.layer_norm(x, weight, bias, residual=residual)

    def liger(x, residual, weight, bias):
        total = residual + x
        return peers.liger_norm("liger_layer_norm")(total, weight, bias, 1e-5), total

    inputs = (x, residual, 1 + weight / 8, bias / 8)
    others = {OURS: Peer(ours, inputs), "eager": Peer(eager, inputs)}
    if case.device == "cuda":
        others["liger"] = Peer(liger, inputs)
    return Problem(others, "eager", Peer(eager, inputs))

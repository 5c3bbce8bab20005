"""Attention whose keys are shared out between programs: how many parts there are, and the sum of what the parts found.

A part of the keys gives an output of its own, normalised by its own sum, and the logsumexp of its scores. Together,

    out = sum over parts of exp(lse_p - top) out_p / sum over parts of exp(lse_p - top),      top = max lse_p
    lse = top + log(sum over parts of exp(lse_p - top))

always in the parts' order. A part without keys has lse = -inf, and its output is not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .chips import chip_of, multiprocessors
from .configs import choose

_MOST_PARTS = 128


def count(programs: int, keys: int, block: int, device: torch.device) -> int:
    """Into how many parts the keys go, where each part takes so many programs.

    As many as run at once, two on each multiprocessor; but a part of fewer than two blocks of keys is not worth its sum.
    """
    room = 2 * multiprocessors(device) // max(programs, 1)
    return max(1, min(room, keys // (2 * block), _MOST_PARTS))


@triton.jit
def combine_parts(
    partial,  # (parts, rows, dim) float32
    partial_lse,  # (parts, rows) float32
    out,  # (rows, dim)
    lse,  # (rows / (queries heads), heads, queries) float32, or None; row = (batch * queries + i) * heads + head
    parts,
    rows,
    dim,
    queries,
    heads,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top = float("-inf")
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        found = tl.load(partial_lse + part.to(tl.int64) * rows + row, mask=part < parts, other=float("-inf"))
        top = tl.maximum(top, tl.max(found, axis=0))
    top = tl.where(top == float("-inf"), 0.0, top)

    for first in range(0, dim, BLOCK):
        column = first + tl.arange(0, BLOCK)
        total = 0.0
        weighted = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            at = part.to(tl.int64) * rows + row
            found = tl.load(partial_lse + at, mask=part < parts, other=float("-inf"))
            some = found != float("-inf")
            here = some[:, None] & (column < dim)
            weight = tl.where(some, tl.exp(found - top), 0.0)
            weighted += tl.sum(weight[:, None] * tl.load(partial + at[:, None] * dim + column, mask=here, other=0.0), 0)
            total += tl.sum(weight, axis=0)
        none = total == 0.0
        total = tl.where(none, 1.0, total)
        weighted /= total
        tl.store(out + row * dim + column, weighted.to(out.dtype.element_ty), mask=column < dim)
        if lse is not None:
            whole = tl.where(none, float("-inf"), top + tl.log(total))
            token = row // heads
            tl.store(lse + ((token // queries) * heads + row % heads) * queries + token % queries, whole)


def combine(partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor | None, queries: int, heads: int) -> None:
    """Fills out, whose memory is (rows, dim), and lse."""
    parts, rows, dim = partial.shape
    config = choose("combine_parts", chip_of(out.device), out.dtype, dim)
    launch(combine_parts, (rows,), partial, partial_lse, out, lse, parts, rows, dim, queries, heads, config=config)

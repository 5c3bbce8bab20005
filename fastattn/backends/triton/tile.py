"""Matrices whose rows are tokens and whose columns are features, of any strides: their tiles are loaded and stored with padding.

A tile's sides are powers of two. Columns from DIM on, and rows from `count` on, are zeros when loaded and left out when stored.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LEAST = 16  # what tl.dot asks of each side


class Rows(NamedTuple):
    """A matrix inside a kernel.

    Its columns, DIM, and those of its tiles, TILE, are not here: a variable's numbers are no constants to Triton. They come from
    the kernel's own arguments (`Heads` in attention_problem.py).

    Attributes:
        base: where its first element is.
        count: how many rows it has.
        batch, head, begin: where its first row is in its tensor (batch, heads, tokens, dim).
    """

    base: Any
    count: Any
    stride_row: Any
    stride_column: Any
    batch: Any
    head: Any
    begin: Any


def padded(dim: int) -> int:
    """The side of a tile that holds `dim` features."""
    return max(LEAST, triton.next_power_of_2(dim))


@triton.jit
def _places(matrix, row, heads):
    """Where the elements of the rows `row` are, and which of them there are."""
    column = tl.arange(0, heads.TILE)
    at = (
        matrix.base
        + row.to(tl.int64)[:, None] * matrix.stride_row
        + column[None, :].to(tl.int64) * matrix.stride_column
    )
    here = row[:, None] < matrix.count
    if heads.DIM != heads.TILE:
        here &= column[None, :] < heads.DIM
    return at, here


@triton.jit
def load_rows(matrix, row, heads):
    """(len(row), TILE): the rows `row` of the matrix."""
    at, here = _places(matrix, row, heads)
    return tl.load(at, mask=here, other=0.0)


@triton.jit
def load_tile(matrix, described, first, ROWS: tl.constexpr, heads):
    """(ROWS, TILE): the rows from `first` on, by the copy engine where its tensor is described (descriptors.py), or None."""
    if described is None:
        tile = load_rows(matrix, first + tl.arange(0, ROWS), heads)
    else:
        tile = described.load([matrix.batch, matrix.head, matrix.begin + first, 0]).reshape(ROWS, heads.TILE)
    return tile


@triton.jit
def store_rows(matrix, values, row, heads):
    """Stores a (len(row), TILE) tile to the rows `row` of the matrix, in its dtype."""
    at, here = _places(matrix, row, heads)
    tl.store(at, values.to(matrix.base.dtype.element_ty), mask=here)

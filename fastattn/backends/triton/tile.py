"""Tiles of a matrix whose rows are tokens and whose columns are features, of any strides: loaded and stored with padding.

A tile's sides are powers of two. Columns from DIM on, and rows from `rows` on, are zeros when loaded and left out when stored.
"""

import triton
import triton.language as tl

LEAST = 16  # what tl.dot asks of each side


def padded(dim: int) -> int:
    """The side of a tile that holds `dim` features."""
    return max(LEAST, triton.next_power_of_2(dim))


@triton.jit
def load_rows(base, row, rows, stride_row, stride_column, DIM: tl.constexpr, TILE: tl.constexpr):
    """(len(row), TILE): the rows `row` of the (rows, DIM) matrix at `base`."""
    column = tl.arange(0, TILE)
    at = base + row.to(tl.int64)[:, None] * stride_row + column[None, :].to(tl.int64) * stride_column
    here = row[:, None] < rows
    if DIM != TILE:
        here &= column[None, :] < DIM
    return tl.load(at, mask=here, other=0.0)


@triton.jit
def store_rows(base, values, row, rows, stride_row, stride_column, DIM: tl.constexpr, TILE: tl.constexpr):
    """Stores a (len(row), TILE) tile to the rows `row` of the (rows, DIM) matrix at `base`, in its dtype."""
    column = tl.arange(0, TILE)
    at = base + row.to(tl.int64)[:, None] * stride_row + column[None, :].to(tl.int64) * stride_column
    here = row[:, None] < rows
    if DIM != TILE:
        here &= column[None, :] < DIM
    tl.store(at, values.to(base.dtype.element_ty), mask=here)

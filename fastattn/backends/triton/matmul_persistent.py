"""The matrix product of matmul.py for the matrix units of sm_90 and sm_100: its operands come by the copy engine (TMA).

    out = dropout(activation(a . b + bias)) + residual

As many programs as multiprocessors, and each computes one tile of the output after the other, in the order of matmul.py's
picture. The loop over tiles and that over the depth are one to the compiler, so that the next tile's operands are on their way
while this tile's epilogue is computed and stored. On sm_100, where sums lie in tensor memory, loads, products and epilogue have
warps of their own.

What the copy engine cannot read (descriptors.py) goes to `matmul`, and so do elements of other than 16 bits, which the matrix
unit does not take in either order: no config for them is persistent.

Source: Triton's tutorial "Persistent Matmul".
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import precision
from .configs import Config
from .descriptors import describe, readable
from .matmul_parts import finish, finish_numbers, launch_persistent, tile_at


@triton.jit
def matmul_persistent(
    a,  # describes (rows, depth), or without A_ALONG its transpose
    b,  # describes (depth, columns), or with B_ALONG its transpose
    bias,  # (columns,) or None
    residual,  # (rows, columns) or None
    seed,  # (1,) int64, or None without dropout
    pre,  # (rows, columns), strides as out; or None
    out,  # (rows, columns)
    rows,
    columns,
    depth,
    stride_residual_row,
    stride_residual_column,
    stride_out_row,
    stride_out_column,
    threshold,
    inverse,
    programs,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    A_ALONG: tl.constexpr,  # whether its elements lie along the depth
    B_ALONG: tl.constexpr,
    SPECIALISED: tl.constexpr,  # whether some warps load, some multiply, and others finish and store
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_ROWS) * tl.cdiv(columns, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True, warp_specialize=SPECIALISED):
        tile_row, tile_column = tile_at(tile, rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
        first_row, first_column = tile_row * BLOCK_ROWS, tile_column * BLOCK_COLUMNS
        value = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, depth, BLOCK_DEPTH):
            if A_ALONG:
                a_tile = a.load([first_row, start])
            else:
                a_tile = a.load([start, first_row]).T
            if B_ALONG:
                b_tile = b.load([first_column, start]).T
            else:
                b_tile = b.load([start, first_column])
            value = tl.dot(a_tile, b_tile, value, input_precision=PRECISION)
        finish(
            value, bias, residual, seed, pre, out, first_row.to(tl.int64) + tl.arange(0, BLOCK_ROWS),
            first_column.to(tl.int64), rows, columns, stride_residual_row, stride_residual_column, stride_out_row,
            stride_out_column, threshold, inverse, ACTIVATION,
        )  # fmt: skip


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    config: Config,
    bias: Tensor | None,
    activation: str,
    pre: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    residual: Tensor | None,
) -> None:
    """As matmul.product, with a persistent config of config_for, which has seen that the copy engine can read a and b.

    bias is contiguous.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    block_rows, block_columns, block_depth = (
        config.tiles[name] for name in ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_DEPTH")
    )
    a_along, b_along = readable(a), not readable(b)
    described = (
        describe(a, (block_rows, block_depth)) if a_along else describe(a.t(), (block_depth, block_rows)),
        describe(b.t(), (block_columns, block_depth)) if b_along else describe(b, (block_depth, block_columns)),
    )
    launch_persistent(
        matmul_persistent,
        *described,
        bias,
        residual,
        seed,
        pre,
        out,
        rows,
        columns,
        depth,
        *finish_numbers(residual, out, dropout_p),
        rows=rows,
        columns=columns,
        config=config,
        ACTIVATION=activation,
        PRECISION=precision(a.dtype),
        A_ALONG=a_along,
        B_ALONG=b_along,
    )

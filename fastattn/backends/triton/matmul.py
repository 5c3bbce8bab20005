"""The matrix product with what follows it.

    pre = a . b + a2 . b2 + bias                    a2 . b2 and everything below only where asked for
    out = dropout(activation(pre)) + residual

A program computes one tile of the output; its accumulator is float32 and never leaves the registers (tensor memory on
sm_100) before it is finished, so bias, activation, dropout and residual cost no pass over memory.

                         columns                     programs count down a group of GROUP tiles, then
                     +---+---+---+                   to the next column: what runs at a time reads
        b (depth)    |   |BBB|   |                   few rows of a and few columns of b, from L2
                     +---+---+---+
    a   +--------+   +---+---+---+
        |        |   |   |   |   |
        +--------+   +---+---+---+
        |AAAAAAAA|   |   |OUT|   |                   BLOCK_ROWS x BLOCK_COLUMNS
        +--------+   +---+---+---+
          BLOCK_DEPTH at a time

Operands have any strides: a transpose is a view, and the matrix instructions take either order from shared memory.

Floor: 2 rows columns depth operations, and each operand and the output once through memory. A tile of R x C reads its operands
(1 / R + 1 / C) / 2 elements an operation, from L2 mostly; 128 x 256 in 16 bits is what keeps the tensor cores of sm_90 fed.

Few tiles and a long sum, as in a weight's gradient, leave multiprocessors idle. There the sum is cut in `splits` parts, which
go to a float32 buffer (splits, rows, columns) and are added in a fixed order, so that the bits do not depend on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import contiguous
from . import matmul_persistent
from ._launch import launch, precision
from .chips import chip_of, multiprocessors
from .configs import OFF_16_BYTES, Config, choose
from .descriptors import readable
from .matmul_parts import finish, finish_numbers, multiply, tile_at, tiles

# A part of a split sum is at least this long, for each costs a write and a read of the whole output.
LEAST_DEPTH_OF_A_SPLIT = 512


@triton.jit
def matmul(
    a,  # (rows, depth)
    b,  # (depth, columns)
    a2,  # (rows, depth), strides as a; or None
    b2,  # (depth, columns)
    bias,  # (columns,) or None
    residual,  # (rows, columns) or None
    seed,  # (1,) int64, or None without dropout
    pre,  # (rows, columns), strides as out; or None
    out,  # (rows, columns); (splits, rows, columns) float32 where the sum is split
    rows,
    columns,
    depth,
    depth_of_split,  # depth where the sum is not split
    stride_a_row,
    stride_a_depth,
    stride_b_depth,
    stride_b_column,
    stride_b2_depth,
    stride_b2_column,
    stride_out_split,
    stride_residual_row,
    stride_residual_column,
    stride_out_row,
    stride_out_column,
    threshold,
    inverse,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_ROWS) * tl.cdiv(columns, BLOCK_COLUMNS)
    split = tl.program_id(0) // tiles
    tile_row, tile_column = tile_at(tl.program_id(0) % tiles, rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    row = tile_row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_column = tile_column.to(tl.int64) * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    begin = split * depth_of_split
    end = tl.minimum(begin + depth_of_split, depth)

    value = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    value = multiply(
        value, a, b, row, column, rows, columns, begin, end,
        stride_a_row, stride_a_depth, stride_b_depth, stride_b_column, PRECISION, BLOCK_DEPTH,
    )  # fmt: skip
    if a2 is not None:
        value = multiply(
            value, a2, b2, row, column, rows, columns, begin, end,
            stride_a_row, stride_a_depth, stride_b2_depth, stride_b2_column, PRECISION, BLOCK_DEPTH,
        )  # fmt: skip

    finish(
        value, bias, residual, seed, pre, out + split.to(tl.int64) * stride_out_split, row, first_column, rows, columns,
        stride_residual_row, stride_residual_column, stride_out_row, stride_out_column, threshold, inverse, ACTIVATION,
    )  # fmt: skip


@triton.jit
def epilogue(
    multiplied,  # (rows, columns): a . b
    bias,
    residual,
    seed,
    pre,
    out,
    rows,
    columns,
    stride_residual_row,
    stride_residual_column,
    stride_out_row,
    stride_out_column,
    threshold,
    inverse,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """`finish` as a pass of its own, over a product that another library computed; parameters as matmul's."""
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_column = (tl.program_id(0) % across).to(tl.int64) * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(multiplied + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    finish(
        value, bias, residual, seed, pre, out, row, first_column, rows, columns, stride_residual_row,
        stride_residual_column, stride_out_row, stride_out_column, threshold, inverse, ACTIVATION,
    )  # fmt: skip


def flat(x: Tensor) -> Tensor:
    """The (rows, features) matrix of a tensor (…, features): a copy where the leading dimensions are no single one in memory."""
    return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def config_for(kernel: str, operands: tuple[Tensor, ...], rows: int, columns: int, most_splits: int = 1) -> Config:
    """The config of a product of this size: the table's width is the number of rows.

    Where its tiles, each split `most_splits` times, would leave multiprocessors idle, those for 64 rows are taken. Operands
    whose rows do not begin at multiples of 16 bytes are loaded element by element, and have a config of their own.
    """
    x = operands[0]
    chip = chip_of(x.device)
    if x.element_size() == 2 and not all(readable(matrix) or readable(matrix.t()) for matrix in operands):
        return choose(f"{kernel}{OFF_16_BYTES}", chip, x.dtype, rows)
    config = choose(kernel, chip, x.dtype, rows)
    if not config.library and rows > 64 and most_splits * tiles(config, rows, columns) < multiprocessors(x.device):
        return choose(kernel, chip, x.dtype, 64)
    return config


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    pre: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """out = dropout(activation(a . b + bias)) + residual, in the memory of `out`.

    Args:
        a, b: (rows, depth) and (depth, columns), any strides.
        out: (rows, columns), any strides without overlap.
        second: another a and b, whose product is added; this a has the strides of the first.
        pre: takes the value before the activation; strides as out's.
        residual: (rows, columns), any strides.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    a2, b2 = (None, b) if second is None else second
    plain = bias is None and activation == "none" and seed is None and residual is None and pre is None
    most_splits = max(depth // LEAST_DEPTH_OF_A_SPLIT, 1) if plain else 1
    config = config_for("matmul", (a, b, a2, b2) if a2 is not None else (a, b), rows, columns, most_splits)
    if config.library:
        multiplied = out if plain else a.new_empty((rows, columns))
        torch.mm(a, b, out=multiplied)
        if second is not None:
            multiplied.addmm_(*second)
        if not plain:
            finish_apart(multiplied, out, bias, activation, pre, seed, dropout_p, residual)
        return out
    splits = max(min(multiprocessors(a.device) // max(tiles(config, rows, columns), 1), most_splits), 1)
    bias = contiguous(bias)
    if config.persistent and splits == 1 and second is None:
        matmul_persistent.product(a, b, out, config, bias, activation, pre, seed, dropout_p, residual)
        return out
    depth_of_split = triton.cdiv(triton.cdiv(depth, splits), config.tiles["BLOCK_DEPTH"]) * config.tiles["BLOCK_DEPTH"]
    written = out if splits == 1 else a.new_empty((splits, rows, columns), dtype=torch.float32)
    launch(
        matmul,
        (splits * tiles(config, rows, columns),),
        a,
        b,
        a2,
        b2,
        bias,
        residual,
        seed,
        pre,
        written,
        rows,
        columns,
        depth,
        depth_of_split,
        *a.stride(),
        *b.stride(),
        *b2.stride(),
        0 if splits == 1 else written.stride(0),
        *finish_numbers(residual, written, dropout_p),
        config=config,
        ACTIVATION=activation,
        PRECISION=precision(a.dtype),
    )
    return out if splits == 1 else out.copy_(written.sum(0))


def finish_apart(
    multiplied: Tensor,
    out: Tensor,
    bias: Tensor | None,
    activation: str,
    pre: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    residual: Tensor | None,
) -> None:
    """What `product` does after a product, given (rows, columns) contiguous, in one pass over memory."""
    rows, columns = multiplied.shape
    config = choose("epilogue", chip_of(out.device), out.dtype, columns)
    launch(
        epilogue,
        (tiles(config, rows, columns),),
        multiplied,
        contiguous(bias),
        residual,
        seed,
        pre,
        out,
        rows,
        columns,
        *finish_numbers(residual, out, dropout_p),
        config=config,
        ACTIVATION=activation,
    )

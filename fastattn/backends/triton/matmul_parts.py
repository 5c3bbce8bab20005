"""What kernels of matrix products are made of (matmul.py, feed_forward.py, and their persistent twins)."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import dropout
from ._launch import launch
from .activation import activate
from .chips import multiprocessors
from .configs import Config


@triton.jit
def tile_at(program, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The tile row and tile column of a program, in the order of the picture."""
    down = tl.cdiv(rows, BLOCK_ROWS)
    of_group = GROUP * tl.cdiv(columns, BLOCK_COLUMNS)
    first = program // of_group * GROUP
    height = tl.minimum(down - first, GROUP)
    place = program % of_group
    return first + place % height, place // height


@triton.jit
def multiply(
    total,  # (BLOCK_ROWS, BLOCK_COLUMNS) float32, what the product is added to
    a,  # (rows, depth)
    b,  # (depth, columns)
    row,  # (BLOCK_ROWS,) int64
    column,  # (BLOCK_COLUMNS,) int64
    rows,
    columns,
    begin,
    end,
    stride_a_row,
    stride_a_depth,
    stride_b_depth,
    stride_b_column,
    PRECISION: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """total + a . b over begin <= depth < end. What lies outside of a and b counts as zero."""
    depth = tl.arange(0, BLOCK_DEPTH)
    at = (depth + begin).to(tl.int64)
    a_at = a + row[:, None] * stride_a_row + at[None, :] * stride_a_depth
    b_at = b + at[:, None] * stride_b_depth + column[None, :] * stride_b_column
    a_inside, b_inside = (row < rows)[:, None], (column < columns)[None, :]
    for start in range(begin, end, BLOCK_DEPTH):
        left = depth < end - start
        a_tile = tl.load(a_at, mask=a_inside & left[None, :], other=0.0)
        b_tile = tl.load(b_at, mask=b_inside & left[:, None], other=0.0)
        total = tl.dot(a_tile, b_tile, total, input_precision=PRECISION)
        a_at += BLOCK_DEPTH * stride_a_depth
        b_at += BLOCK_DEPTH * stride_b_depth
    return total


@triton.jit
def halves(value):
    """The left and the right half of a tile. What follows a large product takes one after the other, for want of registers."""
    rows: tl.constexpr = value.shape[0]
    half: tl.constexpr = value.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(value, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def finish(
    value,  # (BLOCK_ROWS, some columns) float32: a . b
    bias,
    residual,
    seed,
    pre,
    out,
    row,  # of value's rows
    first_column,  # of value
    rows,
    columns,
    stride_residual_row,
    stride_residual_column,
    stride_out_row,
    stride_out_column,
    threshold,
    inverse,
    ACTIVATION: tl.constexpr,
):
    """Everything after the product, and the stores."""
    width: tl.constexpr = value.shape[1]
    if width > 64:
        left, right = halves(value)
        finish(
            left, bias, residual, seed, pre, out, row, first_column, rows, columns, stride_residual_row,
            stride_residual_column, stride_out_row, stride_out_column, threshold, inverse, ACTIVATION,
        )  # fmt: skip
        finish(
            right, bias, residual, seed, pre, out, row, first_column + width // 2, rows, columns, stride_residual_row,
            stride_residual_column, stride_out_row, stride_out_column, threshold, inverse, ACTIVATION,
        )  # fmt: skip
    else:
        column = first_column + tl.arange(0, width)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * stride_out_row + column[None, :] * stride_out_column
        if bias is not None:
            value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        if pre is not None:
            tl.store(pre + at, value.to(pre.dtype.element_ty), mask=inside)
        value = activate(value, ACTIVATION)
        if seed is not None:
            kept = dropout.keep(dropout.row_key(tl.load(seed), row)[:, None], column[None, :], threshold)
            value = tl.where(kept, value * inverse, 0.0)
        if residual is not None:
            beside = residual + row[:, None] * stride_residual_row + column[None, :] * stride_residual_column
            value += tl.load(beside, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def tiles(config: Config, rows: int, columns: int) -> int:
    """How many tiles an output has."""
    return triton.cdiv(rows, config.tiles["BLOCK_ROWS"]) * triton.cdiv(columns, config.tiles["BLOCK_COLUMNS"])


def launch_persistent(kernel: Any, *args: Any, rows: int, columns: int, config: Config, **constants: Any) -> None:
    """Starts a kernel whose programs, one for each multiprocessor, go from tile to tile of a (rows, columns) output.

    Their number is the last of its arguments, and SPECIALISED one of its constants.
    """
    device = next(arg for arg in args if isinstance(arg, Tensor)).device
    programs = min(multiprocessors(device), tiles(config, rows, columns))
    launch(kernel, (programs,), *args, programs, config=config, SPECIALISED=config.specialised, **constants)


def finish_numbers(residual: Tensor | None, out: Tensor, dropout_p: float) -> tuple[int | float, ...]:
    """What a launcher passes for the parameters of `finish` from stride_residual_row to inverse; out's last two strides."""
    strides = (0, 0) if residual is None else residual.stride()
    return (*strides, *out.stride()[-2:], dropout.threshold(dropout_p), dropout.inverse(dropout_p))

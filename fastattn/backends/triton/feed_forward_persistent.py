"""The feed-forward network's own products for sm_90 and sm_100: their operands come by the copy engine.

As matmul_persistent.py is to matmul.py, so are these kernels to those of feed_forward.py: a program for each multiprocessor,
which goes from tile to tile, and the same epilogues.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .configs import Config
from .descriptors import describe
from .feed_forward_parts import finish_gated, through_hidden
from .matmul_parts import launch_persistent, tile_at

SIDES = ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_DEPTH")  # of a tile


@triton.jit
def gated_matmul_persistent(
    x,  # describes (rows, depth)
    w1,  # describes (columns, depth)
    w_gate,  # describes (columns, depth)
    b1,  # (columns,) or None
    seed,  # (1,) int64, or None without dropout
    pre,  # (rows, columns), contiguous; or None
    pre_gate,  # (rows, columns), contiguous; or None
    hidden,  # (rows, columns), contiguous
    rows,
    columns,
    depth,
    threshold,
    inverse,
    programs,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
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
        gate = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, depth, BLOCK_DEPTH):
            x_tile = x.load([first_row, start])
            value = tl.dot(x_tile, w1.load([first_column, start]).T, value, input_precision=PRECISION)
            gate = tl.dot(x_tile, w_gate.load([first_column, start]).T, gate, input_precision=PRECISION)
        row = first_row.to(tl.int64) + tl.arange(0, BLOCK_ROWS)
        finish_gated(
            value, gate, b1, seed, pre, pre_gate, hidden, row, first_column.to(tl.int64), rows, columns, threshold,
            inverse, ACTIVATION,
        )  # fmt: skip


@triton.jit
def hidden_backward_persistent(
    grad_out,  # describes (rows, depth)
    w2,  # describes (depth, columns)
    pre,  # (rows, columns), contiguous, as all that follow
    pre_gate,  # or None
    seed,  # (1,) int64, or None without dropout
    hidden,  # dropout(hidden); or None
    grad_pre,  # or None
    grad_gate,  # or None
    partial,  # (tile rows, columns) float32: sums of grad_pre over a tile's rows; or None
    rows,
    columns,
    depth,
    threshold,
    inverse,
    programs,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    SPECIALISED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_ROWS) * tl.cdiv(columns, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True, warp_specialize=SPECIALISED):
        tile_row, tile_column = tile_at(tile, rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
        first_row, first_column = tile_row * BLOCK_ROWS, tile_column * BLOCK_COLUMNS
        grad = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, depth, BLOCK_DEPTH):
            grad = tl.dot(
                grad_out.load([first_row, start]), w2.load([start, first_column]), grad, input_precision=PRECISION
            )
        row = first_row.to(tl.int64) + tl.arange(0, BLOCK_ROWS)
        sums = partial
        if partial is not None:
            sums = partial + tile_row.to(tl.int64) * columns
        through_hidden(
            grad, pre, pre_gate, seed, hidden, grad_pre, grad_gate, sums, row, first_column.to(tl.int64), rows, columns,
            threshold, inverse, ACTIVATION,
        )  # fmt: skip


def gated(x: Tensor, w1: Tensor, w_gate: Tensor, *others: Any, config: Config, **named: Any) -> None:
    """Launches gated_matmul_persistent for operands that the copy engine can read; `others` are its arguments from b1 on."""
    rows, columns, depth = (config.tiles[name] for name in SIDES)
    operands = describe(x, (rows, depth)), describe(w1, (columns, depth)), describe(w_gate, (columns, depth))
    launch_persistent(gated_matmul_persistent, *operands, *others, config=config, **named)


def backward(grad_out: Tensor, w2: Tensor, *others: Any, config: Config, **named: Any) -> None:
    """Launches hidden_backward_persistent for operands that the copy engine can read; `others` are its arguments from pre on."""
    rows, columns, depth = (config.tiles[name] for name in SIDES)
    operands = describe(grad_out, (rows, depth)), describe(w2, (depth, columns))
    launch_persistent(hidden_backward_persistent, *operands, *others, config=config, **named)

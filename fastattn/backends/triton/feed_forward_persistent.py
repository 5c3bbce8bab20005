"""The feed-forward network's own products for sm_90 and sm_100: their operands come by the copy engine.

As matmul_persistent.py is to matmul.py, so are these kernels to those of feed_forward.py: a program for each multiprocessor,
which goes from tile to tile, and the same epilogues.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .chips import multiprocessors
from .configs import Config
from .descriptors import describe
from .feed_forward_parts import finish_gated, through_hidden
from .matmul_parts import tile_at


@triton.jit
def gated_matmul_persistent(
    hidden,  # (rows, columns), contiguous
    x,  # describes (rows, depth)
    w1,  # describes (columns, depth)
    w_gate,  # describes (columns, depth)
    b1,  # (columns,) or None
    seed,  # (1,) int64, or None without dropout
    pre,  # (rows, columns), contiguous; or None
    pre_gate,  # (rows, columns), contiguous; or None
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
    pre,  # (rows, columns), contiguous, as all but grad_out and w2
    grad_out,  # describes (rows, depth)
    w2,  # describes (depth, columns)
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


def _sizes(config: Config, rows: int, columns: int, of: Tensor) -> tuple[int, int, int, int]:
    """The three sides of a tile, and the number of programs."""
    sides = tuple(config.tiles[name] for name in ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_DEPTH"))
    tiles = triton.cdiv(rows, sides[0]) * triton.cdiv(columns, sides[1])
    return (*sides, min(multiprocessors(of.device), tiles))


def gated(
    x: Tensor,
    w1: Tensor,
    w_gate: Tensor,
    written: tuple[Tensor | None, ...],
    numbers: tuple[int, int, int],
    dropped: tuple[int, float],
    config: Config,
    constants: dict[str, Any],
) -> None:
    """As gated_matmul's launch in feed_forward.py, for operands that the copy engine can read (descriptors.py).

    Args:
        written: b1, seed, pre, pre_gate and hidden.
        numbers: rows, columns and depth.
        dropped: dropout's threshold and inverse.
    """
    b1, seed, pre, pre_gate, hidden = written
    rows, columns, depth, programs = _sizes(config, numbers[0], numbers[1], x)
    launch(
        gated_matmul_persistent,
        (programs,),
        hidden,
        describe(x, (rows, depth)),
        describe(w1, (columns, depth)),
        describe(w_gate, (columns, depth)),
        b1,
        seed,
        pre,
        pre_gate,
        *numbers,
        *dropped,
        programs,
        config=config,
        SPECIALISED=config.specialised,
        **constants,
    )


def backward(
    grad_out: Tensor,
    w2: Tensor,
    others: tuple[Tensor | None, ...],
    numbers: tuple[int, int, int],
    dropped: tuple[int, float],
    config: Config,
    constants: dict[str, Any],
) -> None:
    """As hidden_backward's launch in feed_forward.py, for operands that the copy engine can read (descriptors.py).

    Args:
        others: the kernel's arguments from pre to partial.
        numbers: rows, columns and depth.
        dropped: dropout's threshold and inverse.
    """
    pre, *rest = others
    rows, columns, depth, programs = _sizes(config, numbers[0], numbers[1], grad_out)
    launch(
        hidden_backward_persistent,
        (programs,),
        pre,
        describe(grad_out, (rows, depth)),
        describe(w2, (depth, columns)),
        *rest,
        *numbers,
        *dropped,
        programs,
        config=config,
        SPECIALISED=config.specialised,
        **constants,
    )

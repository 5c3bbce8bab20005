"""The position-wise feed-forward network in three products forward and backward at most; parts of them are in matmul.py.

    hidden = activation(x . w1^T + b1)         or, gated,  hidden = activation(x . w_gate^T) * (x . w1^T + b1)
    out    = dropout(hidden) . w2^T + b2

Forward, activation, gate and dropout are the epilogue of the first product, in which the gated form multiplies a tile of x by a
tile of w1 and one of w_gate, so that x is loaded once and both values of an element meet in one thread's registers:

                             columns of w1^T   columns of w_gate^T
                               +---+             +---+
        x  |AAAAAAAA|    ->    |PRE|             |GAT|   ->   hidden = activation(gate) * pre
                               +---+             +---+

Backward, with pre (and gate) kept and hidden not,

    grad_hidden = dropout's mask of grad_out . w2
    grad_pre    = grad_hidden * activation'(pre)           gated: grad_hidden * activation(gate), and
                                                           grad_gate = grad_hidden * pre * activation'(gate)
    grad_x      = grad_pre . w1 + grad_gate . w_gate       one product, one accumulator
    grad_w1     = grad_pre^T . x,   grad_w_gate = grad_gate^T . x,   grad_w2 = grad_out^T . dropout(hidden)

The epilogue of the first product has a tile of pre at hand, so it writes grad_pre and grad_gate, sums grad_pre's columns for
grad_b1, and writes dropout(hidden) again for grad_w2: nothing is read twice for it, and grad_hidden is never written.

Floor: 6 (gated 9) times rows d_model dim_feedforward multiplications forward and backward together, twice that in operations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tensors
from . import _launch, dropout, feed_forward_persistent
from ._launch import launch, precision
from .descriptors import readable
from .feed_forward_parts import finish_gated, through_hidden
from .linear import product_like, through_activation
from .matmul import config_for, flat, product
from .matmul_parts import multiply, tile_at, tiles


@triton.jit
def gated_matmul(
    x,  # (rows, depth)
    w1,  # (columns, depth)
    w_gate,  # (columns, depth)
    b1,  # (columns,) or None
    seed,  # (1,) int64, or None without dropout
    pre,  # (rows, columns), contiguous; or None
    pre_gate,  # (rows, columns), contiguous; or None
    hidden,  # (rows, columns), contiguous
    rows,
    columns,
    depth,
    stride_x_row,
    stride_x_depth,
    stride_w1_column,
    stride_w1_depth,
    stride_gate_column,
    stride_gate_depth,
    threshold,
    inverse,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_row, tile_column = tile_at(tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    row = tile_row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_column = tile_column.to(tl.int64) * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    across = tl.arange(0, BLOCK_DEPTH)

    x_at = x + row[:, None] * stride_x_row + across.to(tl.int64)[None, :] * stride_x_depth
    w1_at = w1 + across.to(tl.int64)[:, None] * stride_w1_depth + column[None, :] * stride_w1_column
    gate_at = w_gate + across.to(tl.int64)[:, None] * stride_gate_depth + column[None, :] * stride_gate_column
    x_inside, w_inside = (row < rows)[:, None], (column < columns)[None, :]
    value = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    gate = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        left = across < depth - start
        x_tile = tl.load(x_at, mask=x_inside & left[None, :], other=0.0)
        w1_tile = tl.load(w1_at, mask=w_inside & left[:, None], other=0.0)
        gate_tile = tl.load(gate_at, mask=w_inside & left[:, None], other=0.0)
        value = tl.dot(x_tile, w1_tile, value, input_precision=PRECISION)
        gate = tl.dot(x_tile, gate_tile, gate, input_precision=PRECISION)
        x_at += BLOCK_DEPTH * stride_x_depth
        w1_at += BLOCK_DEPTH * stride_w1_depth
        gate_at += BLOCK_DEPTH * stride_gate_depth

    finish_gated(
        value, gate, b1, seed, pre, pre_gate, hidden, row, first_column, rows, columns, threshold, inverse, ACTIVATION
    )  # fmt: skip


@triton.jit
def hidden_backward(
    grad_out,  # (rows, depth)
    w2,  # (depth, columns)
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
    stride_grad_row,
    stride_grad_depth,
    stride_w2_depth,
    stride_w2_column,
    threshold,
    inverse,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_row, tile_column = tile_at(tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    row = tile_row.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_column = tile_column.to(tl.int64) * BLOCK_COLUMNS
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    grad = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    grad = multiply(
        grad, grad_out, w2, row, column, rows, columns, 0, depth,
        stride_grad_row, stride_grad_depth, stride_w2_depth, stride_w2_column, PRECISION, BLOCK_DEPTH,
    )  # fmt: skip
    if partial is not None:
        partial += tile_row.to(tl.int64) * columns

    through_hidden(
        grad, pre, pre_gate, seed, hidden, grad_pre, grad_gate, partial, row, first_column, rows, columns,
        threshold, inverse, ACTIVATION,
    )  # fmt: skip


def unsupported(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_pre: bool,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return _launch.unsupported(x, w1, b1, w2, b2, w_gate)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    leading, columns = x.shape[:-1], w1.shape[0]
    out = x.new_empty((*leading, w2.shape[0]))
    pre = x.new_empty((*leading, columns)) if save_pre else None
    pre_gate = x.new_empty((*leading, columns)) if save_pre and w_gate is not None else None
    hidden = hidden_of(flat(x), w1, b1, w_gate, seed, activation, dropout_p, pre, pre_gate)
    product(hidden, w2.t(), flat(out), bias=b2)
    return out, tensors.given(pre, x), tensors.given(pre_gate, x)


def hidden_of(
    tokens: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_gate: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    pre: Tensor | None = None,
    pre_gate: Tensor | None = None,
) -> Tensor:
    """dropout(hidden) (rows, columns) of tokens (rows, depth); pre and pre_gate (…, columns) are filled where given."""
    (rows, depth), columns = tokens.shape, w1.shape[0]
    hidden = tokens.new_empty((rows, columns))
    if w_gate is None:
        product(
            tokens,
            w1.t(),
            hidden,
            bias=b1,
            activation=activation,
            pre=None if pre is None else flat(pre),
            seed=seed,
            dropout_p=dropout_p,
        )
    else:
        config = config_for("gated_matmul", (tokens, w1, w_gate), rows, columns)
        others = (tensors.contiguous(b1), seed, pre, pre_gate, hidden, rows, columns, depth)
        dropped = (dropout.threshold(dropout_p), dropout.inverse(dropout_p))
        constants = {"ACTIVATION": activation, "PRECISION": precision(tokens.dtype)}
        if config.persistent and readable(tokens) and readable(w1) and readable(w_gate):
            feed_forward_persistent.gated(
                tokens, w1, w_gate, *others, *dropped, rows=rows, columns=columns, config=config, **constants
            )
        else:
            launch(
                gated_matmul,
                (tiles(config, rows, columns),),
                tokens,
                w1,
                w_gate,
                *others,
                *tokens.stride(),
                *w1.stride(),
                *w_gate.stride(),
                *dropped,
                config=config,
                **constants,
            )
    return hidden


def backward(
    grad_out: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2, needs_gate = needs
    received, tokens = flat(grad_out), flat(x)
    (rows, depth), columns = received.shape, w1.shape[0]
    gated = w_gate is not None

    hidden = x.new_empty((rows, columns)) if needs_w2 else None
    grad_pre = x.new_empty((rows, columns)) if needs_x or needs_w1 else None
    grad_gate = x.new_empty((rows, columns)) if gated and (needs_x or needs_gate) else None
    config = config_for("hidden_backward", (received, w2), rows, columns)
    tile_rows = triton.cdiv(rows, config.tiles["BLOCK_ROWS"])
    partial = x.new_empty((tile_rows, columns), dtype=torch.float32) if needs_b1 and b1 is not None else None
    without_product = grad_pre is None and grad_gate is None and partial is None
    if hidden is not None or not without_product:
        read = (pre.contiguous(), pre_gate.contiguous() if gated else None, seed)
        others = (*read, hidden, grad_pre, grad_gate, partial, rows, columns, 0 if without_product else depth)
        dropped = (dropout.threshold(dropout_p), dropout.inverse(dropout_p))
        constants = {"ACTIVATION": activation, "PRECISION": precision(x.dtype)}
        if config.persistent and readable(received) and readable(w2):
            feed_forward_persistent.backward(
                received, w2, *others, *dropped, rows=rows, columns=columns, config=config, **constants
            )
        else:
            launch(
                hidden_backward,
                (tiles(config, rows, columns),),
                received,
                w2,
                *others,
                *received.stride(),
                *w2.stride(),
                *dropped,
                config=config,
                **constants,
            )

    grad_w2 = None if hidden is None else product(received.t(), hidden, torch.empty_like(w2))
    del hidden
    grad_b2 = through_activation(received, None, "none", False, b2)[1] if needs_b2 else None
    grad_b1 = None if partial is None or b1 is None else torch.empty_like(b1).copy_(partial.sum(0))
    grad_w1 = product(grad_pre.t(), tokens, torch.empty_like(w1)) if needs_w1 and grad_pre is not None else None
    grad_w_gate = None
    if w_gate is not None and grad_gate is not None and needs_gate:
        grad_w_gate = product(grad_gate.t(), tokens, torch.empty_like(w_gate))
    grad_x = None
    if needs_x and grad_pre is not None:
        second = None if w_gate is None or grad_gate is None else (grad_gate, w_gate)
        grad_x = product_like(x, grad_pre, w1, second)
    grads = (grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_w_gate)
    return tuple(tensors.given(grad, x) for grad in grads)  # type: ignore[return-value]

"""What follows the products of the feed-forward network's kernels (feed_forward.py, feed_forward_persistent.py)."""

import triton
import triton.language as tl

from . import dropout
from .activation import activate, activate_backward
from .matmul_parts import halves


@triton.jit
def finish_gated(
    value,  # (BLOCK_ROWS, some columns) float32: x . w1^T
    gate,  # x . w_gate^T
    b1,
    seed,
    pre,
    pre_gate,
    hidden,
    row,  # of value's rows
    first_column,  # of value
    rows,
    columns,
    threshold,
    inverse,
    ACTIVATION: tl.constexpr,
):
    """hidden = dropout(activation(gate) * (value + b1)), and pre and pre_gate."""
    width: tl.constexpr = value.shape[1]
    if width > 32:
        left, right = halves(value)
        left_gate, right_gate = halves(gate)
        finish_gated(
            left, left_gate, b1, seed, pre, pre_gate, hidden, row, first_column, rows, columns,
            threshold, inverse, ACTIVATION,
        )  # fmt: skip
        finish_gated(
            right, right_gate, b1, seed, pre, pre_gate, hidden, row, first_column + width // 2, rows, columns,
            threshold, inverse, ACTIVATION,
        )  # fmt: skip
    else:
        column = first_column + tl.arange(0, width)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        if b1 is not None:
            value += tl.load(b1 + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        if pre is not None:
            tl.store(pre + at, value.to(pre.dtype.element_ty), mask=inside)
            tl.store(pre_gate + at, gate.to(pre_gate.dtype.element_ty), mask=inside)
        value = activate(gate, ACTIVATION) * value
        if seed is not None:
            kept = dropout.keep(dropout.row_key(tl.load(seed), row)[:, None], column[None, :], threshold)
            value = tl.where(kept, value * inverse, 0.0)
        tl.store(hidden + at, value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def through_hidden(
    grad,  # (BLOCK_ROWS, some columns) float32: grad_out . w2
    pre,
    pre_gate,
    seed,
    hidden,
    grad_pre,
    grad_gate,
    partial,  # the tile row's
    row,  # of grad's rows
    first_column,  # of grad
    rows,
    columns,
    threshold,
    inverse,
    ACTIVATION: tl.constexpr,
):
    """What the gradient of dropout(hidden) becomes: those of pre and of the gate, and their sums for b1; hidden once more."""
    width: tl.constexpr = grad.shape[1]
    if width > 32:
        left, right = halves(grad)
        through_hidden(
            left, pre, pre_gate, seed, hidden, grad_pre, grad_gate, partial, row, first_column, rows, columns,
            threshold, inverse, ACTIVATION,
        )  # fmt: skip
        through_hidden(
            right, pre, pre_gate, seed, hidden, grad_pre, grad_gate, partial, row, first_column + width // 2, rows, columns,
            threshold, inverse, ACTIVATION,
        )  # fmt: skip
    else:
        column = first_column + tl.arange(0, width)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        value = tl.load(pre + at, mask=inside, other=0.0).to(tl.float32)
        if pre_gate is not None:
            gate = tl.load(pre_gate + at, mask=inside, other=0.0).to(tl.float32)
            factor = activate(gate, ACTIVATION)
        if seed is not None:
            kept = dropout.keep(dropout.row_key(tl.load(seed), row)[:, None], column[None, :], threshold)
            grad = tl.where(kept, grad * inverse, 0.0)

        if hidden is not None:
            if pre_gate is not None:
                dropped = factor * value
            else:
                dropped = activate(value, ACTIVATION)
            if seed is not None:
                dropped = tl.where(kept, dropped * inverse, 0.0)
            tl.store(hidden + at, dropped.to(hidden.dtype.element_ty), mask=inside)
        if grad_gate is not None:
            through = activate_backward(grad * value, gate, ACTIVATION)
            tl.store(grad_gate + at, through.to(grad_gate.dtype.element_ty), mask=inside)
        if pre_gate is not None:
            grad = grad * factor
        else:
            grad = activate_backward(grad, value, ACTIVATION)
        if grad_pre is not None:
            tl.store(grad_pre + at, grad.to(grad_pre.dtype.element_ty), mask=inside)
        if partial is not None:
            tl.store(partial + column, tl.sum(tl.where(inside, grad, 0.0), axis=0), mask=column < columns)

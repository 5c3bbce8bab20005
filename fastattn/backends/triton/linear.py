"""Linear with its activation and residual: the products are in matmul.py.

    out = activation(x . weight^T + bias) + residual

Forward is one product with all else in its epilogue. Backward, with pre kept,

    grad_pre    = grad_out * activation'(pre)         one pass over memory, and its column sums are grad_bias
    grad_x      = grad_pre . weight
    grad_weight = grad_pre^T . x

Why grad_pre is written, and not computed where the products load grad_out: each product would read two tensors where it now
reads one, once for every tile column, and compute exponentials between load and matrix instruction, through registers. The
pass costs 3 rows columns elements of traffic, which at 4096 features is a twentieth of the time of the products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tensors
from . import _launch
from ._launch import launch
from .activation import activate_backward
from .chips import chip_of, multiprocessors
from .configs import choose
from .matmul import flat, product


@triton.jit
def activation_backward(
    grad_out,  # (rows, columns)
    pre,  # (rows, columns), contiguous; None without activation
    grad_pre,  # (rows, columns), contiguous; None if only the sums are wanted
    partial,  # (strips, columns) float32: sums over the rows of a strip; or None
    rows,
    columns,
    rows_of_strip,
    stride_row,
    stride_column,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(columns, COLUMNS)
    strip, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin = strip.to(tl.int64) * rows_of_strip
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows_of_strip, ROWS):
        row = begin + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(grad_out + row[:, None] * stride_row + column[None, :] * stride_column, mask=inside, other=0.0)
        value = value.to(tl.float32)
        at = row[:, None] * columns + column[None, :]
        if pre is not None:
            value = activate_backward(value, tl.load(pre + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
        if grad_pre is not None:
            tl.store(grad_pre + at, value.to(grad_pre.dtype.element_ty), mask=inside)
        sums += value
    if partial is not None:
        tl.store(partial + strip.to(tl.int64) * columns + column, tl.sum(sums, axis=0), mask=column < columns)


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, save_pre: bool
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return _launch.unsupported(x, weight, bias, residual)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    pre = torch.empty_like(out) if save_pre and activation != "none" else None
    product(
        flat(x),
        weight.t(),
        flat(out),
        bias=bias,
        activation=activation,
        pre=None if pre is None else flat(pre),
        residual=None if residual is None else flat(residual),
    )
    return out, tensors.given(pre, x)


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    grad_pre, grad_bias = through_activation(
        flat(grad_out),
        flat(pre) if activation != "none" else None,
        activation,
        needs[0] or needs[1],
        bias if needs[2] else None,
    )
    grad_x = product_like(x, grad_pre, weight) if needs[0] else None
    grad_weight = product(grad_pre.t(), flat(x), torch.empty_like(weight)) if needs[1] else None
    return tensors.given(grad_x, x), tensors.given(grad_weight, x), tensors.given(grad_bias, x)


def through_activation(
    grad_out: Tensor, pre: Tensor | None, activation: str, needed: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradient before the activation (if needed; grad_out itself without one), and the gradient of the bias, if given.

    Args:
        grad_out: (rows, columns), any strides.
        pre: (rows, columns), the values before the activation; None without one.
    """
    rows, columns = grad_out.shape
    grad_pre = grad_out.new_empty(grad_out.shape) if pre is not None and needed else None
    if grad_pre is None and bias is None:
        return grad_out, None
    config = choose("activation_backward", chip_of(grad_out.device), grad_out.dtype, columns)
    blocks = triton.cdiv(columns, config.tiles["COLUMNS"])
    # As many strips as keep every multiprocessor busy: their sums are the price.
    most = triton.cdiv(4 * multiprocessors(grad_out.device), max(blocks, 1))
    rows_of_strip = triton.cdiv(triton.cdiv(rows, most), config.tiles["ROWS"]) * config.tiles["ROWS"]
    strips = triton.cdiv(rows, max(rows_of_strip, 1))
    partial = None if bias is None else grad_out.new_empty((strips, columns), dtype=torch.float32)
    launch(
        activation_backward,
        (strips * blocks,),
        grad_out,
        None if pre is None else pre.contiguous(),
        grad_pre,
        partial,
        rows,
        columns,
        rows_of_strip,
        *grad_out.stride(),
        config=config,
        ACTIVATION=activation,
    )
    grad_bias = None if partial is None or bias is None else torch.empty_like(bias).copy_(partial.sum(0))
    return grad_out if grad_pre is None else grad_pre, grad_bias


def product_like(x: Tensor, a: Tensor, b: Tensor, second: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """a . b (and the second product, added) with the shape and the memory layout of x (…, features)."""
    grad = torch.empty_like(x)
    written = flat(grad) if grad.is_contiguous() or grad.ndim == 2 else x.new_empty((a.shape[0], b.shape[1]))
    product(a, b, written, second=second)
    return grad if grad.is_contiguous() or grad.ndim == 2 else grad.copy_(written.view(x.shape))

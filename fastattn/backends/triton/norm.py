"""Residual add, dropout and layer norm or RMS norm, forward and backward: the kernels of layer_norm.py and rms_norm.py.

    sum = residual + dropout(x)
    out = (sum - mean) * rstd * weight + bias        (RMS norm: no mean, no bias; rstd from the mean of squares)

Forward, a program takes ROWS rows whole, in registers: each tensor is read or written once, 2 to 4 tensors of b bytes an
element, and about ten operations on each. Memory bounds it: the floor is the copy of as many bytes.

    ROWS x BLOCK tile:   x, residual -> sum -> mean, rstd -> out

Backward, with n = (sum - mean) * rstd, the normed row, and g = grad_out * weight,

    grad_sum' = rstd * (g - mean(g) - n * mean(g * n)) + grad_sum       (RMS norm: without mean(g))
    grad_weight = sum over rows of grad_out * n,   grad_bias = sum over rows of grad_out

again one pass: 3 to 5 tensors an element. A few programs a multiprocessor go through the rows with a stride, each summing its
rows of grad_weight and grad_bias in float32 registers; they write (programs, dim) partial sums, which a last sum adds
up in a fixed order, so that the bits do not depend on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dropout
from ._launch import launch
from .chips import chip_of, multiprocessors
from .configs import choose

MOST_FEATURES = 16384


@triton.jit
def norm_forward(
    x,  # (rows, dim)
    residual,  # (rows, dim) or None
    weight,  # (dim,) or None
    bias,  # (dim,) or None
    seed,  # (1,) int64, or None without dropout
    out,  # (rows, dim)
    total,  # (rows, dim): residual + dropout(x); None where that is x
    mean,  # (rows,) float32; None for RMS norm
    rstd,  # (rows,) float32
    rows,
    dim,
    eps,
    threshold,
    inverse,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column[None, :] < dim
    here = (row[:, None] < rows) & inside
    at = row[:, None] * dim + column[None, :]

    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    if seed is not None:
        kept = dropout.keep(dropout.row_key(tl.load(seed), row)[:, None], column[None, :], threshold)
        value = tl.where(kept, value * inverse, 0.0)
        value = value.to(x.dtype.element_ty).to(tl.float32)  # as eager, whose dropout gives a tensor
    if residual is not None:
        value += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
    if total is not None:
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=here)
        value = rounded.to(tl.float32)

    if mean is not None:
        middle = tl.sum(value, axis=1) / dim
        tl.store(mean + row, middle, mask=row < rows)
        value = tl.where(inside, value - middle[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=1) / dim + eps)
    tl.store(rstd + row, scale, mask=row < rows)

    value = value * scale[:, None]
    if weight is not None:
        value *= tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=column < dim, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def norm_backward(
    grad_out,  # (rows, dim)
    grad_total,  # (rows, dim), what `total` received, or None
    total,  # (rows, dim)
    weight,  # (dim,) or None
    mean,  # (rows,) float32; None for RMS norm
    rstd,  # (rows,) float32
    seed,  # (1,) int64, or None without dropout
    grad_residual,  # (rows, dim)
    grad_x,  # (rows, dim), or None without dropout
    partial_weight,  # (programs, dim) float32, or None
    partial_bias,  # (programs, dim) float32, or None
    rows,
    dim,
    threshold,
    inverse,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < dim
    if weight is not None:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if partial_weight is not None:
        sum_weight = tl.zeros((BLOCK,), tl.float32)
    if partial_bias is not None:
        sum_bias = tl.zeros((BLOCK,), tl.float32)

    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        here = (row[:, None] < rows) & inside[None, :]
        at = row[:, None] * dim + column[None, :]

        received = tl.load(grad_out + at, mask=here, other=0.0).to(tl.float32)
        normed = tl.load(total + at, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        if mean is not None:
            normed -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.where(here, normed * scale, 0.0)
        if partial_weight is not None:
            sum_weight += tl.sum(received * normed, axis=0)
        if partial_bias is not None:
            sum_bias += tl.sum(received, axis=0)

        grad = received
        if weight is not None:
            grad = received * factor
        along = tl.sum(grad * normed, axis=1) / dim
        difference = grad - normed * along[:, None]
        if mean is not None:
            difference -= (tl.sum(grad, axis=1) / dim)[:, None]
        difference *= scale
        if grad_total is not None:
            difference += tl.load(grad_total + at, mask=here, other=0.0).to(tl.float32)
        tl.store(grad_residual + at, difference.to(grad_residual.dtype.element_ty), mask=here)
        if grad_x is not None:
            kept = dropout.keep(dropout.row_key(tl.load(seed), row)[:, None], column[None, :], threshold)
            dropped = tl.where(kept, difference * inverse, 0.0)
            tl.store(grad_x + at, dropped.to(grad_x.dtype.element_ty), mask=here)

    at = tl.program_id(0) * dim + column
    if partial_weight is not None:
        tl.store(partial_weight + at, sum_weight, mask=inside)
    if partial_bias is not None:
        tl.store(partial_bias + at, sum_bias, mask=inside)


def unsupported(x: Tensor) -> str | None:
    """Why the kernels cannot take rows of this length; None if they can."""
    if x.shape[-1] > MOST_FEATURES:
        return f"it keeps a row in registers, at most {MOST_FEATURES} features, and these have {x.shape[-1]}"
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """out, sum (None where that is x), mean (None unless centred), rstd."""
    x, dim = x.contiguous(), x.shape[-1]
    rows = x.shape[:-1].numel()
    changed = residual is not None or seed is not None
    out = torch.empty_like(x)
    total = torch.empty_like(x) if changed else None
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    config = choose("norm_forward", chip_of(x.device), x.dtype, dim)
    launch(
        norm_forward,
        (triton.cdiv(rows, config.tiles["ROWS"]),),
        x,
        None if residual is None else residual.contiguous(),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        seed,
        out,
        total,
        mean,
        rstd,
        rows,
        dim,
        eps,
        dropout.threshold(dropout_p),
        dropout.inverse(dropout_p),
        config=config,
    )
    return out, total, mean, rstd


def backward(
    grad_out: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """grad_residual, grad_x (None where that is equal), grad_weight and grad_bias (None where there is none)."""
    total, dim = total.contiguous(), total.shape[-1]
    rows = total.shape[:-1].numel()
    grad_residual = torch.empty_like(total)
    grad_x = torch.empty_like(total) if seed is not None else None
    config = choose("norm_backward", chip_of(total.device), total.dtype, dim)
    programs = min(triton.cdiv(rows, config.tiles["ROWS"]), 2 * multiprocessors(total.device))
    partial_weight, partial_bias = (rstd.new_empty(programs, dim) for _ in range(2))
    launch(
        norm_backward,
        (programs,),
        grad_out.contiguous(),
        None if grad_total is None else grad_total.contiguous(),
        total,
        None if weight is None else weight.contiguous(),
        mean,
        rstd,
        seed,
        grad_residual,
        grad_x,
        None if weight is None else partial_weight,
        None if bias is None else partial_bias,
        rows,
        dim,
        dropout.threshold(dropout_p),
        dropout.inverse(dropout_p),
        config=config,
    )
    grad_weight = None if weight is None else partial_weight.sum(0).to(weight.dtype)
    grad_bias = None if bias is None else partial_bias.sum(0).to(bias.dtype)
    return grad_residual, grad_x, grad_weight, grad_bias

"""Residual add, dropout and layer norm or RMS norm: csrc/cuda/norm_forward.cu and norm_backward.cu."""

import torch
from torch import Tensor

from ..tensors import DTYPES, contiguous
from . import _native
from ._native import address


def unsupported(x: Tensor, residual: Tensor | None) -> str | None:
    """Why the kernels cannot take this call; None if they can."""
    why = _native.unsupported(x, residual)
    if why is None and x.shape[-1] > _native.MOST_FEATURES:
        return f"it keeps a row in registers, at most {_native.MOST_FEATURES} features, and these have {x.shape[-1]}"
    return why


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
    x, residual = x.contiguous(), contiguous(residual)
    weight, bias = _one_dtype(contiguous(weight), contiguous(bias))
    out = torch.empty_like(x)
    total = torch.empty_like(x) if residual is not None or seed is not None else None
    rows, dim = x.shape[:-1].numel(), x.shape[-1]
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    parameter = next((given.dtype for given in (weight, bias) if given is not None), torch.float32)
    shape = tuple(x.shape)
    with torch.cuda.device_of(x):
        _native.C.norm_forward(
            DTYPES.index(x.dtype),
            DTYPES.index(parameter),
            rows,
            dim,
            address(x, "x", x, shape, x.dtype),
            address(residual, "residual", x, shape, x.dtype),
            address(weight, "weight", x, (dim,), x.dtype, torch.float32),
            address(bias, "bias", x, (dim,), x.dtype, torch.float32),
            address(out, "out", x, shape, x.dtype),
            address(total, "sum", x, shape, x.dtype),
            address(mean, "mean", x, (rows,), torch.float32),
            address(rstd, "rstd", x, (rows,), torch.float32),
            address(seed, "seed", x, (1,), torch.int64),
            eps,
            dropout_p,
            _native.stream(x),
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
    total, grad_out = total.contiguous(), grad_out.contiguous()
    grad_total, weight = contiguous(grad_total), contiguous(weight)
    grad_residual = torch.empty_like(total)
    grad_x = torch.empty_like(total) if seed is not None else None
    rows, dim = total.shape[:-1].numel(), total.shape[-1]
    number = DTYPES.index(total.dtype)
    programs = _native.C.norm_backward_programs(number, rows, dim, _native.multiprocessors(total))
    partial_weight = None if weight is None else rstd.new_empty(programs, dim)
    partial_bias = None if bias is None else rstd.new_empty(programs, dim)
    shape = tuple(total.shape)
    with torch.cuda.device_of(total):
        _native.C.norm_backward(
            number,
            0 if weight is None else DTYPES.index(weight.dtype),
            rows,
            dim,
            address(grad_out, "grad_out", total, shape, total.dtype),
            address(grad_total, "grad_sum", total, shape, total.dtype),
            address(total, "sum", total, shape, total.dtype),
            address(weight, "weight", total, (dim,), total.dtype, torch.float32),
            address(mean, "mean", total, (rows,), torch.float32),
            address(rstd, "rstd", total, (rows,), torch.float32),
            address(seed, "seed", total, (1,), torch.int64),
            address(grad_residual, "grad_residual", total, shape, total.dtype),
            address(grad_x, "grad_x", total, shape, total.dtype),
            programs,
            address(partial_weight, "partial_weight", total, (programs, dim), torch.float32),
            address(partial_bias, "partial_bias", total, (programs, dim), torch.float32),
            dropout_p,
            _native.stream(total),
        )
    grad_weight = None if weight is None or partial_weight is None else partial_weight.sum(0).to(weight.dtype)
    grad_bias = None if bias is None or partial_bias is None else partial_bias.sum(0).to(bias.dtype)
    return grad_residual, grad_x, grad_weight, grad_bias


def _one_dtype(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both parameters in one dtype, the wider one: the kernels have one for both."""
    if weight is None or bias is None or weight.dtype == bias.dtype:
        return weight, bias
    return weight.float(), bias.float()

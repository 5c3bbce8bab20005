"""Residual add, dropout and RMS norm in one pass."""

import torch
from torch import Tensor

from .. import dispatch
from ..backends import BACKENDS
from . import _checks, _library, _seed
from .layer_norm import norm_inputs

_eager = BACKENDS["eager"]["rms_norm"].forward


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm of residual + dropout(x) over the last dimension, in one pass over memory.

    Args:
        x: (…, dim), float32, bfloat16, float16 or float64.
        weight: (dim,), x's dtype or float32; None for 1.
        eps: added to the mean square; None for torch.finfo(x.dtype).eps, as in torch's.
        residual: x's shape; added before the norm. A residual of a wider dtype widens x to it.
        dropout_p: probability with which each element of x is zeroed before the sum.

    Returns:
        normed, x's shape; with a residual the pair (normed, sum) with sum = residual + dropout(x).
        Statistics are computed in float32 (float64 for float64), and the weight is applied before the result is rounded.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or values that do not fit.

    Source: Zhang and Sennrich, 2019.
    """
    x, residual = norm_inputs(x, residual)
    _checks.affine("weight", weight, x, x.shape[-1])
    eps = torch.finfo(x.dtype).eps if eps is None else _checks.not_negative("eps", eps)
    args = (x, weight, residual, _seed.draw(dropout_p, x.device), eps, float(dropout_p))
    backend = dispatch.choose("rms_norm", args)
    if backend == "eager":
        out, total = _eager(*args)[:2]
    elif _library.needs_grad(x, weight, residual):
        out, total = _library.record(_RMSNorm, *args, backend)[:2]
    else:
        out, total = _forward(*args, backend)[:2]
    return out if residual is None else (out, total)


def _fake_forward(x, weight, residual, seed, *rest):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
    rstd = x.new_empty(rows, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    changed = residual is not None or seed is not None
    return x.new_empty(x.shape), x.new_empty(x.shape) if changed else x.new_empty(0), rstd


def _fake_backward(grad_out, grad_sum, total, weight, rstd, seed, dropout_p, backend):
    grad_x = total.new_empty(total.shape) if dropout_p > 0.0 else total.new_empty(0)
    grad_weight = total.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return total.new_empty(total.shape), grad_x, grad_weight


_forward = _library.define(
    "rms_norm",
    "(Tensor x, Tensor? weight, Tensor? residual, Tensor? seed, float eps, float dropout_p) "
    "-> (Tensor out, Tensor sum, Tensor rstd)",
    _fake_forward,
)
_backward = _library.define(
    "rms_norm",
    "(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor rstd, Tensor? seed, float dropout_p) "
    "-> (Tensor grad_residual, Tensor grad_x, Tensor grad_weight)",
    _fake_backward,
    "backward",
)


@_library.differentiable(_forward)
class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, residual, seed, _, dropout_p, backend = inputs
        _, total, rstd = output
        ctx.mark_non_differentiable(rstd)
        changed = residual is not None or seed is not None
        ctx.save_for_backward(total if changed else x, weight, rstd, seed)
        ctx.settings = changed, residual is not None, dropout_p, backend

    @staticmethod
    def backward(ctx, grad_out, grad_sum, *_):
        total, weight, rstd, seed = ctx.saved_tensors
        changed, has_residual, dropout_p, backend = ctx.settings
        if grad_out is None:
            grad_out = torch.zeros_like(total)
        if not changed:
            grad_sum = None
        grad_residual, grad_x, grad_weight = _library.run_backward(
            _backward, grad_out, grad_sum, total, weight, rstd, seed, dropout_p, backend
        )
        return (
            grad_residual if dropout_p == 0.0 else grad_x,
            grad_weight if weight is not None else None,
            grad_residual if has_residual else None,
            *(None,) * 4,
        )

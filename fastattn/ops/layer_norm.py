"""Residual add, dropout and layer norm in one pass."""

import torch
from torch import Tensor

from .. import dispatch
from ..backends import BACKENDS
from . import _checks, _library, _seed

_eager = BACKENDS["eager"]["layer_norm"].forward


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of residual + dropout(x) over the last dimension, in one pass over memory.

    Args:
        x: (…, dim), float32, bfloat16, float16 or float64.
        weight, bias: (dim,), x's dtype or float32; None for 1 and 0.
        eps: added to the variance.
        residual: x's shape; added before the norm. A residual of a wider dtype widens x to it.
        dropout_p: probability with which each element of x is zeroed before the sum.

    Returns:
        normed, x's shape; with a residual the pair (normed, sum) with sum = residual + dropout(x), which is the next
        residual of a pre-norm Transformer. Statistics are computed in float32 (float64 for float64).

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes, devices or values that do not fit.

    Source: Ba, Kiros and Hinton, 2016.
    """
    x, residual = norm_inputs(x, residual)
    dim = x.shape[-1]
    _checks.affine("weight", weight, x, dim)
    _checks.affine("bias", bias, x, dim)
    args = (
        x,
        weight,
        bias,
        residual,
        _seed.draw(dropout_p, x.device),
        _checks.not_negative("eps", eps),
        float(dropout_p),
    )
    backend = dispatch.choose("layer_norm", args)
    if backend == "eager":
        out, total = _eager(*args)[:2]
    elif _library.needs_grad(x, weight, bias, residual):
        out, total = _library.record(_LayerNorm, *args, backend)[:2]
    else:
        out, total = _forward(*args, backend)[:2]
    return out if residual is None else (out, total)


def norm_inputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Checks a norm's x and residual and brings them to one dtype, the wider one (autocast mixes them)."""
    _checks.floating("x", x)
    if x.ndim == 0:
        raise ValueError("x has no dimensions; expected (…, dim)")
    if residual is None:
        return x, None
    _checks.floating("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)} but x has {tuple(x.shape)}; they must be equal")
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device} but x is on {x.device}; move one with .to(device)")
    if residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    return x, residual


def _fake_forward(x, weight, bias, residual, seed, *rest):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
    statistic = x.new_empty(rows, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    changed = residual is not None or seed is not None
    total = x.new_empty(x.shape) if changed else x.new_empty(0)
    return x.new_empty(x.shape), total, statistic, torch.empty_like(statistic)


def _fake_backward(grad_out, grad_sum, total, weight, bias, mean, rstd, seed, dropout_p, backend):
    grad_x = total.new_empty(total.shape) if dropout_p > 0.0 else total.new_empty(0)
    grad_weight = total.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    grad_bias = total.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return total.new_empty(total.shape), grad_x, grad_weight, grad_bias


_forward = _library.define(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, float eps, float dropout_p) "
    "-> (Tensor out, Tensor sum, Tensor mean, Tensor rstd)",
    _fake_forward,
)
_backward = _library.define(
    "layer_norm",
    "(Tensor grad_out, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor? seed, "
    "float dropout_p) -> (Tensor grad_residual, Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
    "backward",
)


@_library.differentiable(_forward)
class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, seed, _, dropout_p, backend = inputs
        _, total, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        changed = residual is not None or seed is not None
        ctx.save_for_backward(total if changed else x, weight, bias, mean, rstd, seed)
        ctx.settings = changed, residual is not None, dropout_p, backend

    @staticmethod
    def backward(ctx, grad_out, grad_sum, *_):
        total, weight, bias, mean, rstd, seed = ctx.saved_tensors
        changed, has_residual, dropout_p, backend = ctx.settings
        if grad_out is None:
            grad_out = torch.zeros_like(total)
        if not changed:
            grad_sum = None
        grad_residual, grad_x, grad_weight, grad_bias = _library.run_backward(
            _backward, grad_out, grad_sum, total, weight, bias, mean, rstd, seed, dropout_p, backend
        )
        return (
            grad_residual if dropout_p == 0.0 else grad_x,
            grad_weight if weight is not None else None,
            grad_bias if bias is not None else None,
            grad_residual if has_residual else None,
            *(None,) * 4,
        )

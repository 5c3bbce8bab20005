"""A linear layer with its activation and residual fused."""

import torch
from torch import Tensor

from .. import dispatch
from ..backends import BACKENDS
from ..backends.eager.activation import ACTIVATIONS
from . import _autocast, _checks, _library

_eager = BACKENDS["eager"]["linear"].forward


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x · weightᵀ + bias) + residual.

    Args:
        x: (…, in_features), float32, bfloat16, float16 or float64.
        weight: (out_features, in_features), any strides, so that a stored transpose is passed as `w.T` at no cost.
        bias: (out_features,).
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        residual: (…, out_features), added last.

    Returns:
        (…, out_features). For the backward only x, and with an activation the value before it, are kept.

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes, devices or an activation that do not fit.
    """
    if _autocast.active(x):
        x, weight, bias, residual = _autocast.cast(x, weight, bias, residual)
    matrix_product("weight", weight, "x", x)
    if bias is not None:
        vector("bias", bias, weight.shape[0], "out_features", x)
    if residual is not None:
        _checks.like("residual", residual, "x", x)
        if residual.shape != (*x.shape[:-1], weight.shape[0]):
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}; expected {(*x.shape[:-1], weight.shape[0])}, the output's"
            )
    name = activation_name(activation)
    recorded = _library.needs_grad(x, weight, bias, residual)
    args = (x, weight, bias, residual, name, recorded)
    backend = dispatch.choose("linear", args)
    if backend == "eager":
        return _eager(*args)[0]
    if recorded:
        return _library.record(_Linear, *args, backend)[0]
    return _forward(*args, backend)[0]


def activation_name(activation: str | None) -> str:
    name = "none" if activation is None else activation
    if not isinstance(name, str) or name not in ACTIVATIONS:
        known = ", ".join(repr(known) for known in ACTIVATIONS if known != "none")
        raise ValueError(f"activation is {activation!r}; expected None or one of {known}")
    return name


def matrix_product(name: str, weight: Tensor, x_name: str, x: Tensor) -> None:
    """Checks x (…, in) against weight (out, in)."""
    _checks.floating(x_name, x)
    _checks.like(name, weight, x_name, x)
    if x.ndim == 0:
        raise ValueError(f"{x_name} has no dimensions; expected (…, in_features)")
    if weight.ndim != 2:
        _checks.rank(name, weight, "(out_features, in_features)", 2)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{x_name} has {x.shape[-1]} features but {name} has shape {tuple(weight.shape)}; expected "
            f"(out_features, {x.shape[-1]})"
        )


def vector(name: str, bias: Tensor, size: int, meaning: str, x: Tensor) -> None:
    _checks.like(name, bias, "x", x)
    if bias.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(bias.shape)}; expected ({meaning},) = ({size},)")


def _fake_forward(x, weight, bias, residual, activation, save_pre, backend):
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    return out, torch.empty_like(out) if save_pre and activation != "none" else x.new_empty(0)


def _fake_backward(grad_out, x, weight, bias, pre, activation, needs, backend):
    inputs = (x, weight, bias)
    return tuple(torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))


_forward = _library.define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool save_pre) -> (Tensor out, Tensor pre)",
    _fake_forward,
)
_backward = _library.define(
    "linear",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor pre, str activation, bool[] needs) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
    "backward",
)


@_library.differentiable(_forward)
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, activation, _, backend = inputs
        pre = output[1]
        ctx.mark_non_differentiable(pre)
        ctx.save_for_backward(x, weight, bias, pre)
        ctx.settings = activation, backend

    @staticmethod
    def backward(ctx, grad_out, _):
        x, weight, bias, pre = ctx.saved_tensors
        activation, backend = ctx.settings
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        grads = _library.run_backward(_backward, grad_out, x, weight, bias, pre, activation, needs, backend)
        wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (*wanted, grad_out if ctx.needs_input_grad[3] else None, None, None, None)

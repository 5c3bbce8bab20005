"""The position-wise feed-forward network, plain or gated, as one op."""

import torch
from torch import Tensor

from .. import dispatch
from ..backends import BACKENDS
from . import _autocast, _checks, _library, _seed
from .linear import activation_name, matrix_product, vector

_eager = BACKENDS["eager"]["feed_forward"].forward


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    w_gate: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(hidden) · w2ᵀ + b2 with hidden = activation(x · w1ᵀ + b1).

    With w_gate it is gated (SwiGLU, GEGLU): hidden = activation(x · w_gateᵀ) ∘ (x · w1ᵀ + b1).

    Args:
        x: (…, d_model), float32, bfloat16, float16 or float64.
        w1, w_gate: (dim_feedforward, d_model), any strides.
        b1: (dim_feedforward,) or None.
        w2: (d_out, dim_feedforward), any strides.
        b2: (d_out,) or None.
        activation: "relu", "gelu", "gelu_tanh", "silu" or None.
        dropout_p: probability with which each element of hidden is zeroed.

    Returns:
        (…, d_out). For the backward x and the values before the activation are kept, and nothing else of
        size (tokens, dim_feedforward).

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes, devices or an activation that do not fit.

    Source: Vaswani et al., 2017; gated Shazeer, 2020.
    """
    if _autocast.active(x):
        x, w1, b1, w2, b2, w_gate = _autocast.cast(x, w1, b1, w2, b2, w_gate)
    tensors = (x, w1, b1, w2, b2, w_gate)
    plain = not _library.watched(*tensors)
    if not (plain and _library.fits("feed_forward_fits", *tensors)):
        _check_network(*tensors)
    name = activation_name(activation)
    recorded = _library.needs_grad(*tensors)
    args = (*tensors, _seed.draw(dropout_p, x.device), name, float(dropout_p), recorded)
    backend = dispatch.choose("feed_forward", args)
    if backend == "eager":
        return _eager(*args)[0]
    if recorded:
        record = _library.record_unwatched if plain else _library.record
        return record(_FeedForward, *args, backend)[0]
    forward = _forward.unwatched if plain else _forward
    return forward(*args, backend)[0]


def _check_network(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None
) -> None:
    matrix_product("w1", w1, "x", x)
    hidden = w1.shape[0]
    _checks.like("w2", w2, "x", x)
    if w2.ndim != 2:
        _checks.rank("w2", w2, "(d_out, dim_feedforward)", 2)
    outer, inner = w2.shape
    if inner != hidden:
        raise ValueError(
            f"w2 has shape {tuple(w2.shape)}; expected (d_out, {hidden}), as w1 has dim_feedforward {hidden}"
        )
    if b1 is not None:
        vector("b1", b1, hidden, "dim_feedforward", x)
    if b2 is not None:
        vector("b2", b2, outer, "d_out", x)
    if w_gate is not None:
        matrix_product("w_gate", w_gate, "x", x)
        if w_gate.shape[0] != hidden:
            raise ValueError(f"w_gate has shape {tuple(w_gate.shape)} but w1 has {tuple(w1.shape)}; they must be equal")


def _fake_forward(x, w1, b1, w2, b2, w_gate, seed, activation, dropout_p, save_pre, backend):
    pre = x.new_empty(*x.shape[:-1], w1.shape[0]) if save_pre else x.new_empty(0)
    gate = torch.empty_like(pre) if w_gate is not None else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], w2.shape[0]), pre, gate


def _fake_backward(grad_out, x, w1, b1, w2, b2, w_gate, pre, pre_gate, seed, activation, dropout_p, needs, backend):
    inputs = (x, w1, b1, w2, b2, w_gate)
    return tuple(torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))


_forward = _library.define(
    "feed_forward",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate, Tensor? seed, str activation, "
    "float dropout_p, bool save_pre) -> (Tensor out, Tensor pre, Tensor pre_gate)",
    _fake_forward,
)
_backward = _library.define(
    "feed_forward",
    "(Tensor grad_out, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate, Tensor pre, "
    "Tensor pre_gate, Tensor? seed, str activation, float dropout_p, bool[] needs) -> (Tensor grad_x, Tensor grad_w1, "
    "Tensor grad_b1, Tensor grad_w2, Tensor grad_b2, Tensor grad_w_gate)",
    _fake_backward,
    "backward",
)


@_library.differentiable(_forward)
class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w1, b1, w2, b2, w_gate, seed, activation, dropout_p, _, backend = inputs
        _, pre, pre_gate = output
        ctx.mark_non_differentiable(pre, pre_gate)
        ctx.save_for_backward(x, w1, b1, w2, b2, w_gate, pre, pre_gate, seed)
        ctx.settings = activation, dropout_p, backend

    @staticmethod
    def backward(ctx, grad_out, *_):
        activation, dropout_p, backend = ctx.settings
        needs = [bool(need) for need in ctx.needs_input_grad[:6]]
        grads = _library.run_backward(_backward, grad_out, *ctx.saved_tensors, activation, dropout_p, needs, backend)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 5)

"""Linear layers and the position-wise feed-forward network, with bias, activation, residual and dropout fused in."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops
from fastattn.backends.eager.activation import ACTIVATIONS as _FUNCTIONS

from . import _checks, _modules

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


# What a module of exactly this class computes, by the ops' names. A library's classes are added where it is integrated.
ACTIVATION_MODULES: dict[type, Callable[[Any], str | None]] = {
    nn.ReLU: lambda _: "relu",
    nn.GELU: lambda gelu: "gelu" if gelu.approximate == "none" else "gelu_tanh",
    nn.SiLU: lambda _: "silu",
}
_ACTIVATION_FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))

# Classes of linear layers, and how to read their weight, as (out, in), and bias; None where there is more to them.
LINEAR_MODULES: dict[type, Callable[[Any], tuple[Tensor, Tensor | None] | None]] = {
    nn.Linear: lambda linear: (linear.weight, linear.bias)
}


def activation_name(activation: str | Callable[[Tensor], Tensor]) -> str | None:
    """The name under which the ops know an activation, or None for a callable that they do not know."""
    if isinstance(activation, str):
        return activation if activation in ACTIVATIONS else None
    if isinstance(activation, nn.Module):
        read = ACTIVATION_MODULES.get(type(activation))
        return None if read is None or _modules.hooked(activation) else read(activation)
    return next((name for function, name in _ACTIVATION_FUNCTIONS if function is activation), None)


def _named(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    return activation


class Linear(nn.Linear):
    """`activation(input · weightᵀ + bias) + residual`, as `torch.nn.Linear` with the rest fused in.

    The state_dict and the initialisation are `torch.nn.Linear`'s.

    Args:
        in_features, out_features: sizes of the last dimension of the input and the output.
        bias: whether there is a bias.
        device, dtype: of the parameters.
        activation: None, "relu", "gelu" (with erf), "gelu_tanh" or "silu".
    """

    activation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = None if activation is None else _named(activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Applies the layer.

        Args:
            input: (…, in_features), in the weight's dtype or under autocast.
            residual: (…, out_features), added after the activation.

        Returns:
            (…, out_features).

        Raises:
            RuntimeError: a wrong last dimension, dtype or device.
        """
        _checks.features("input", input, self.in_features, "in_features")
        _checks.same_kind("input", input, self.weight)
        return ops.linear(input, self.weight, self.bias, self.activation, residual)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


LINEAR_MODULES[Linear] = lambda linear: (linear.weight, linear.bias) if linear.activation is None else None


class FeedForward(nn.Module):
    """The position-wise feed-forward network of a Transformer.

        out = dropout(activation(x · w1ᵀ + b1)) · w2ᵀ + b2                       plain
        out = dropout(activation(x · w_gateᵀ) ∘ (x · w1ᵀ + b1)) · w2ᵀ + b2        gated

    Gated with "silu" it is SwiGLU, with "gelu" GEGLU, with "relu" ReGLU. Its state_dict holds `linear1`, `linear2` and,
    where gated, `linear_gate`; parameters are initialised as `torch.nn.Linear`'s.

    Args:
        d_model: size of the last dimension of input and output.
        dim_feedforward: size of the hidden layer; None takes 4 · d_model.
        activation: "relu", "gelu" (with erf), "gelu_tanh" or "silu".
        gated: whether a gate multiplies the hidden layer.
        dropout: probability of dropping an element of the hidden layer in training.
        bias: whether linear1 and linear2 have a bias; the gate has none.
        device, dtype: of the parameters.

    Source: Vaswani et al., "Attention Is All You Need", 2017; Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * d_model if dim_feedforward is None else dim_feedforward
        self.activation = _named(activation)
        self.linear1 = nn.Linear(d_model, hidden, bias=bias, device=device, dtype=dtype)
        self.linear_gate = nn.Linear(d_model, hidden, bias=False, device=device, dtype=dtype) if gated else None
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the network to x (…, d_model); the result has x's shape.

        Raises:
            RuntimeError: a wrong last dimension, dtype or device.
        """
        first = weights(self.linear1)
        if first is not None:
            _checks.features("x", x, first[0].shape[1], "d_model")
            _checks.same_kind("x", x, first[0])
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2, self.linear_gate)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, gated={self.linear_gate is not None}"


def weights(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of a layer that is no more than these; None where it is adapted, quantised, parametrised, watched."""
    read = LINEAR_MODULES.get(type(linear))
    return None if read is None or _modules.hooked(linear) else read(linear)


def feed_forward(
    x: Tensor,
    linear1: nn.Module,
    activation: str | Callable[[Tensor], Tensor],
    dropout: nn.Module | None,
    linear2: nn.Module,
    gate: nn.Module | None = None,
) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), or gated linear2(dropout(activation(gate(x)) ∘ linear1(x))).

    One op where it knows all of them, else each in turn.
    """
    name, dropout_p = activation_name(activation), 0.0 if dropout is None else _modules.dropout_p(dropout)
    first, last = weights(linear1), weights(linear2)
    gated = (None, None) if gate is None else weights(gate)
    if name is not None and dropout_p is not None and first and last and gated and gated[1] is None:
        return ops.feed_forward(x, *first, *last, activation=name, w_gate=gated[0], dropout_p=dropout_p)
    if isinstance(activation, str):
        activation = _FUNCTIONS[activation]
    hidden = activation(_linear(x, linear1)) if gate is None else activation(_linear(x, gate)) * _linear(x, linear1)
    return _linear(hidden if dropout is None else dropout(hidden), linear2)


def _linear(x: Tensor, linear: nn.Module) -> Tensor:
    plain = weights(linear)
    return linear(x) if plain is None else ops.linear(x, *plain)

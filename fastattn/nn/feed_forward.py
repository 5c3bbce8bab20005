"""Linear layers and the position-wise feed-forward network, with bias, activation, residual and dropout fused in."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops

from . import _checks, _modules

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def activation_name(activation: str | Callable[[Tensor], Tensor]) -> str | None:
    """The name under which the ops know an activation, or None for a callable that they do not know."""
    if isinstance(activation, str):
        return activation if activation in ACTIVATIONS else None
    if activation in (F.relu, torch.relu) or type(activation) is nn.ReLU:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if activation is F.silu or type(activation) is nn.SiLU:
        return "silu"
    return None


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
        w1, w2 = self.linear1, self.linear2
        _checks.features("x", x, w1.in_features, "d_model")
        _checks.same_kind("x", x, w1.weight)
        return ops.feed_forward(
            x,
            w1.weight,
            w1.bias,
            w2.weight,
            w2.bias,
            activation=self.activation,
            w_gate=None if self.linear_gate is None else self.linear_gate.weight,
            dropout_p=self.dropout.p if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, gated={self.linear_gate is not None}"


def _plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer that is its weight and bias and nothing else: not adapted, quantised, parametrised or watched."""
    return type(linear) is nn.Linear and not _modules.hooked(linear)


def feed_forward(
    x: Tensor,
    linear1: nn.Module,
    activation: Callable[[Tensor], Tensor],
    dropout: nn.Module,
    linear2: nn.Module,
) -> Tensor:
    """linear2(dropout(activation(linear1(x)))): one op where it knows all four, else each in turn."""
    name, dropout_p = activation_name(activation), _modules.dropout_p(dropout)
    if name is not None and dropout_p is not None and _plain(linear1) and _plain(linear2):
        return ops.feed_forward(
            x,
            linear1.weight,
            linear1.bias,
            linear2.weight,
            linear2.bias,
            activation=name,
            dropout_p=dropout_p,
        )
    return _linear(dropout(activation(_linear(x, linear1))), linear2)


def _linear(x: Tensor, linear: nn.Module) -> Tensor:
    return ops.linear(x, linear.weight, linear.bias) if _plain(linear) else linear(x)

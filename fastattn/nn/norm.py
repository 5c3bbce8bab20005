"""Layer norm and RMS norm, with an optional residual and dropout computed in the same pass.

sum = residual + dropout(input)
out = norm(sum)
"""

from collections.abc import Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from fastattn import ops

from . import _checks, _modules

Normed = Tensor | tuple[Tensor, Tensor]


def _flat(x: Tensor | None, dims: int) -> Tensor | None:
    """The normalised dimensions as one, the last: what the ops work on."""
    return x if x is None or dims == 1 else x.flatten(-dims)


def _unflat(result: Normed, shape: torch.Size, dims: int) -> Normed:
    if dims == 1:
        return result
    return result.reshape(shape) if isinstance(result, Tensor) else (result[0].reshape(shape), result[1].reshape(shape))


def _is_mixed(parameter: Tensor | None, x: Tensor) -> bool:
    """A parameter narrower than x; the ops take one of x's dtype or float32."""
    return parameter is not None and parameter.dtype != x.dtype and parameter.dtype != torch.float32


def _check(input: Tensor, residual: Tensor | None, normalized_shape: tuple[int, ...]) -> None:
    _checks.tensor("input", input)
    if residual is not None:
        _checks.tensor("residual", residual)
    dims = len(normalized_shape)
    if dims == 0:
        raise RuntimeError("normalized_shape is (); expected at least one dimension to normalise over")
    if input.shape[-dims:] != normalized_shape:
        shape = ", ".join(str(size) for size in normalized_shape)
        raise RuntimeError(
            f"Given normalized_shape={list(normalized_shape)}, expected input with shape [*, {shape}], "
            f"but got input of size {list(input.shape)}"
        )
    if not input.is_floating_point():
        raise RuntimeError(f"input has dtype {input.dtype}; expected a floating dtype: convert it with input.float()")
    if residual is not None and residual.shape != input.shape:
        raise RuntimeError(
            f"residual has shape {tuple(residual.shape)} but input has {tuple(input.shape)}; they must be equal"
        )


class LayerNorm(nn.LayerNorm):
    r"""Layer normalisation over the last dimensions, as `torch.nn.LayerNorm`, with residual and dropout fused in.

    .. math:: sum = residual + dropout(input), \quad out = (sum - E[sum]) / \sqrt{Var[sum] + eps} \cdot weight + bias

    Statistics are computed in float32 (float64 for float64 inputs). The state_dict is `torch.nn.LayerNorm`'s.

    Args:
        normalized_shape: an int or a sequence of ints, the last dimensions of the input.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and a bias.
        bias: whether there is a bias, where there is a weight.
        device, dtype: of the parameters.
        dropout: probability of dropping an element of the input in training, before the residual is added.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    # Class attributes rather than state, so that a torch.nn.LayerNorm can become this class in place.
    dropout: float = 0.0
    adds_residual = True  # what add_norm asks for

    def __init__(
        self,
        normalized_shape: int | Sequence[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]
        _set_dropout(self, dropout)

    @overload
    def forward(self, input: Tensor, residual: None = None, *, dropout_p: float | None = None) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor, *, dropout_p: float | None = None) -> tuple[Tensor, Tensor]: ...

    def forward(self, input: Tensor, residual: Tensor | None = None, *, dropout_p: float | None = None) -> Normed:
        """Normalises input, or residual + dropout(input).

        Args:
            input: (…, *normalized_shape), float32, bfloat16, float16 or float64.
            residual: the shape of input; of two floating dtypes both become the wider, as in an addition.
            dropout_p: dropout's probability for this call, whatever the mode; None takes the module's in training, else
                0.

        Returns:
            The normalised tensor, in the shape and dtype of input (or residual's, if wider); with a residual the pair
                (normalised, sum).

        Raises:
            RuntimeError: a shape that does not end in normalized_shape, a residual of another shape, an integer input,
                parameters in neither input's dtype nor float32.
        """
        shape, weight, bias = (
            self.normalized_shape,
            self.weight,
            self.bias,
        )  # each look-up of a parameter takes its time
        _check(input, residual, shape)
        if _is_mixed(weight, input) or _is_mixed(bias, input):
            raise RuntimeError(
                f"input has dtype {input.dtype} but the norm's parameters have {weight.dtype}; expected input's "
                "dtype or float32: convert one with .to(dtype)"
            )
        p = (self.dropout if self.training else 0.0) if dropout_p is None else dropout_p
        dims = len(shape)
        if dims == 1:
            return ops.layer_norm(input, weight, bias, self.eps, residual, p)
        result = ops.layer_norm(
            cast(Tensor, _flat(input, dims)), _flat(weight, dims), _flat(bias, dims), self.eps, _flat(residual, dims), p
        )
        return _unflat(result, input.shape, dims)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", dropout={self.dropout}" if self.dropout else "")


class RMSNorm(nn.RMSNorm):
    r"""RMS normalisation over the last dimensions, as `torch.nn.RMSNorm`, with residual and dropout fused in.

    .. math:: sum = residual + dropout(input), \quad out = sum / \sqrt{E[sum^2] + eps} \cdot weight

    The mean square is computed in float32 (float64 for float64 inputs). The state_dict is `torch.nn.RMSNorm`'s.

    Args:
        normalized_shape: an int or a sequence of ints, the last dimensions of the input.
        eps: added to the mean square; None takes the machine epsilon of the dtype computed in.
        elementwise_affine: whether there is a weight.
        device, dtype: of the weight.
        dropout: probability of dropping an element of the input in training, before the residual is added.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    dropout: float = 0.0
    adds_residual = True  # what add_norm asks for

    def __init__(
        self,
        normalized_shape: int | Sequence[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)  # type: ignore[arg-type]
        _set_dropout(self, dropout)

    @overload
    def forward(self, x: Tensor, residual: None = None, *, dropout_p: float | None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor, *, dropout_p: float | None = None) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None, *, dropout_p: float | None = None) -> Normed:
        """Normalises x, or residual + dropout(x).

        Arguments, results and errors are those of `LayerNorm.forward`, but that x of too few dimensions is a ValueError
        and that a weight of any floating dtype is taken, as in torch.
        """
        _checks.tensor("x", x)
        if x.dim() < len(self.normalized_shape):
            raise ValueError(
                f"Input tensor must have at least {len(self.normalized_shape)} dimensions, but got {x.dim()}; "
                f"normalized_shape is {self.normalized_shape}"
            )
        _check(x, residual, self.normalized_shape)
        p = (self.dropout if self.training else 0.0) if dropout_p is None else dropout_p
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        dims = len(self.normalized_shape)
        weight: Tensor | None = self.weight
        if weight is not None and _is_mixed(weight, x):
            weight = weight.to(x.dtype)
        result = ops.rms_norm(cast(Tensor, _flat(x, dims)), _flat(weight, dims), eps, _flat(residual, dims), p)
        return _unflat(result, x.shape, dims)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", dropout={self.dropout}" if self.dropout else "")


def _set_dropout(module: LayerNorm | RMSNorm, dropout: float) -> None:
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout is {dropout}; expected a probability between 0 and 1")
    module.dropout = dropout


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor, dropout: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum) with sum = residual + dropout(x): one pass where norm and dropout are modules it knows.

    A hooked norm gets the sum alone: hooks are written for torch's norms, of one input and one output.
    """
    dropout_p = 0.0 if dropout is None else _modules.dropout_p(dropout)
    if dropout_p is not None and getattr(norm, "adds_residual", False) and not _modules.hooked(norm):
        return norm(x, residual, dropout_p=dropout_p)
    total = residual + (x if dropout is None else dropout(x))
    return norm(total), total

"""Linear + cross entropy: csrc/cpu/linear_cross_entropy.cpp."""

import torch
from torch import Tensor

from ..found_gradients import found_with_the_loss
from ..tensors import contiguous, given, gradient, rows
from . import _native


def unsupported(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: list[bool],
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    if x.numel() == 0 or weight.numel() == 0:
        return "it takes no empty x or weight"
    return _native.unsupported(x, weight, bias)


def forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    found = found_with_the_loss(x, needs, reduction)
    settings = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    grads = _run(x, weight, target, bias, class_weight, None, loss, settings, found)
    return loss, *grads


def backward(
    grad_loss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    found_x: Tensor,
    found_weight: Tensor,
    found_bias: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    if any(found.numel() for found in (found_x, found_weight, found_bias)):
        grad_x, grad_weight, grad_bias = (
            found * grad_loss if need else x.new_empty(0)
            for found, need in zip((found_x, found_weight, found_bias), needs, strict=True)
        )
        return grad_x, grad_weight, grad_bias
    settings = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    loss = torch.empty_like(grad_loss, memory_format=torch.contiguous_format)
    return _run(x, weight, target, bias, class_weight, grad_loss, loss, settings, needs)


def _run(x, weight, target, bias, class_weight, grad_loss, loss, settings, needs) -> tuple[Tensor, Tensor, Tensor]:
    """Fills `loss`; returns the gradients that are needed."""
    grads = gradient(x, needs[0]), gradient(weight, needs[1]), gradient(bias, needs[2])
    # The gradients themselves, or other tensors where these have their features apart: the kernel writes rows.
    written = [None if grad is None else contiguous(grad) for grad in grads]
    _native.C.linear_cross_entropy(
        rows(x.flatten(0, -2)),
        rows(weight),
        target.flatten().contiguous(),
        contiguous(bias),
        None if class_weight is None else class_weight.float().contiguous(),
        None if grad_loss is None else grad_loss.flatten().contiguous(),
        loss.view(-1),
        None if written[0] is None else written[0].flatten(0, -2),
        *written[1:],
        *settings,
    )
    for grad, rows_of_grad in zip(grads, written, strict=True):
        if grad is not None and rows_of_grad is not None and rows_of_grad is not grad:
            grad.copy_(rows_of_grad)
    return given(grads[0], x), given(grads[1], x), given(grads[2], x)

"""The contrastive loss InfoNCE: csrc/cpu/info_nce.cpp."""

import torch
from torch import Tensor

from ..found_gradients import found_with_the_loss
from ..tensors import contiguous, given, gradient, rows
from . import _native


def unsupported(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    symmetric: bool,
    needs: list[bool],
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    if query.numel() == 0:
        return "it takes no empty query"
    return _native.unsupported(query, positive, negatives)


def forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    symmetric: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    loss = query.new_empty((), dtype=torch.float32)
    found = found_with_the_loss(query, needs)
    of_query, of_positive, of_negatives, of_temperature = _run(
        query, positive, negatives, temperature, None, loss, symmetric, found
    )
    return loss, of_query, of_positive, of_negatives, of_temperature


def backward(
    grad_loss: Tensor,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    found_query: Tensor,
    found_positive: Tensor,
    found_negatives: Tensor,
    found_temperature: Tensor,
    symmetric: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    found = found_query, found_positive, found_negatives, found_temperature
    if any(grad.numel() for grad in found):
        grads = [grad * grad_loss if need else query.new_empty(0) for grad, need in zip(found, needs, strict=True)]
    else:
        loss = torch.empty_like(grad_loss)
        grads = _run(query, positive, negatives, temperature, grad_loss, loss, symmetric, needs)
    of_query, of_positive, of_negatives, of_temperature = grads
    return of_query, of_positive, of_negatives, of_temperature.to(temperature.dtype if needs[3] else query.dtype)


def _run(query, positive, negatives, temperature, grad_loss, loss, symmetric, needs) -> list[Tensor]:
    """Fills `loss`; returns the gradients that are needed, that of the temperature in float32."""
    grads = [gradient(tensor, need) for tensor, need in zip((query, positive, negatives), needs[:3], strict=True)]
    # The gradients themselves, or other tensors where these have their features apart: the kernel writes rows.
    written = [contiguous(grad) for grad in grads]
    of_temperature = torch.empty_like(temperature, dtype=torch.float32) if needs[3] else None
    _native.C.info_nce(
        rows(query),
        rows(positive),
        None if negatives is None else rows(negatives),
        # (Kernels take no tensor of more than 8 dimensions.)
        (temperature.reshape(()) if temperature.ndim else temperature).double(),
        grad_loss,
        loss,
        *written,
        None if of_temperature is None else of_temperature.view(()),
        symmetric,
    )
    for grad, rows_of_grad in zip(grads, written, strict=True):
        if grad is not None and rows_of_grad is not None and rows_of_grad is not grad:
            grad.copy_(rows_of_grad)
    return [given(grad, query) for grad in (*grads, of_temperature)]

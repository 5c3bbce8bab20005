"""Linear + cross entropy: products by the vendor's library (products.py), and in between the kernels of logits.py.

The (rows, classes) logits, N rows and V classes of dim d, never exist as a whole. Two ways lead there:

  - One kernel multiplies a tile of logits and reduces it at once, and no logit reaches memory. But a row's softmax needs a sweep
    over all classes before the first gradient, and the backward's two products sum along classes and along rows: each computes
    the logits once more. That is 10 N V d flops instead of 6, at the rate that Triton's products reach, to save 8 bytes of
    traffic a logit, which is a tenth of the time at d = 4096.
  - Here: a stretch of logits at a time is made by the vendor's library at its full rate, two kernels turn it into u in place,
    and two more products take u from there. Memory is what a stretch takes.

What a stretch should be is a matter of weight's gradient, (V, d), which is a sum over rows:

            by rows                     by classes
           +-----------+               +---+---+---+
      rows +-----------+               |   |   |   |     rows x classes, in PARTS stretches (stretches.py)
           +-----------+               |   |   |   |
           +-----------+               +---+---+---+

By rows, a stretch has all that its softmax needs, and logits are made once: 6 N V d flops. But each stretch adds to the whole
gradient of weight, in float32: 4 V d bytes more, read and written by every stretch. At d = 4096 the product of 1024 rows and the
traffic of its sums take an H100 about as long; loss kernels that take a few hundred rows at a time wait for these sums.

By classes, one product makes its part of weight's gradient, and what is summed is the gradient of x, (N, d). But a row's
softmax needs all stretches, so the logits of all but the last are made twice: 8 N V d flops, less the last stretch's 2.

        flops           memory beside inputs and gradients             N = 8k      N = 32k     (V = 128k, d = 4096, bfloat16)
  eager         6 N V d         12 N V, three float32 matrices                 12.9 GB     51.5 GB
  by rows       6 N V d         2 N V / PARTS + 4 V d                           2.4 GB      3.2 GB
  by classes    7.75 N V d      2 N V / PARTS + 4 N d                           0.4 GB      1.6 GB

Eager moves some 36 bytes a logit beside its products, a fifth of its time there; either way here moves 8 to 10. Counted so, by
rows takes 0.9 of eager's time and by classes 1.1. Rows are taken where the sums cost no memory (float32, whose gradient is summed
in place; a weight without gradient) or little: from 8 d rows on they are a twenty-fourth of eager's. Calls of few logits are one
stretch. Without gradients, 2 N V d flops, and classes are taken, whose products are the squarest.

Rows whose target is ignored take no part: the others are gathered, which has to wait for the GPU to count them. Where that
cannot be, in the capture of a CUDA graph, ignored rows are computed with, as zeros.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..found_gradients import found_with_the_loss
from ..tensors import contiguous, given, gradient, rows
from . import _launch, stretches
from .logits import CrossEntropy
from .products import Sum, multiply

ROWS_FOR_SUMS = 8  # times dim: from so many rows on, sums of weight's gradient in float32 are small beside the logits


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
    """Why the kernels cannot take this call; None if they can."""
    if x.numel() == 0 or weight.numel() == 0:
        return "it takes no empty x or weight"
    return _launch.unsupported(x, weight, bias)


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
    found = found_with_the_loss(x, needs, reduction)
    settings = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    loss = x.new_zeros(target.shape, dtype=torch.float32)
    grads = _run(x, weight, target, bias, class_weight, None, loss, settings, found)
    if reduction != "none":
        loss = loss.sum(dtype=torch.float64).float()
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
    found = found_x, found_weight, found_bias
    if any(grad.numel() for grad in found):
        grads = [grad * grad_loss if need else x.new_empty(0) for grad, need in zip(found, needs, strict=True)]
        return grads[0], grads[1], grads[2]
    settings = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    return _run(x, weight, target, bias, class_weight, grad_loss, None, settings, needs)


def can_wait(tensor: Tensor) -> bool:
    """Whether this process may ask for what a tensor holds: not in the capture of a CUDA graph, nor of a meta tensor."""
    return tensor.is_cpu or (tensor.is_cuda and not torch.cuda.is_current_stream_capturing())


def _run(x, weight, target, bias, class_weight, received, loss, settings, needs) -> tuple[Tensor, Tensor, Tensor]:
    """Fills `loss`, one element a row, if given; returns the gradients that are needed."""
    ignore_index, label_smoothing, z_loss, softcap, reduction = settings
    grads = gradient(x, needs[0]), gradient(weight, needs[1]), gradient(bias, needs[2])
    matrix, target = rows(x.flatten(0, -2)), target.flatten().contiguous()
    weights = None if class_weight is None else class_weight.float().contiguous()

    counted, place = target != ignore_index, None
    known = can_wait(target)
    if known:
        place = counted.nonzero().squeeze(1)
        place = None if place.numel() == target.numel() else place
    else:
        matrix = torch.where(counted.unsqueeze(1), matrix, torch.zeros_like(matrix))
    taken: Callable[[Tensor], Tensor] = (lambda of_rows: of_rows) if place is None else (lambda of_rows: of_rows[place])
    matrix, target = taken(matrix), taken(target)
    count = target.numel()

    if received is not None:
        received = received.flatten().contiguous()
        received = taken(received) if reduction == "none" else received
    losses = None if loss is None else loss.new_empty(count)
    mean = reduction == "mean"
    entropy = CrossEntropy(
        target,
        weights,
        None if known and weights is None else _totals(target, weights, weight.shape[0], ignore_index),
        received,
        losses,
        weight.shape[0],
        1.0 / count if mean and count else 1.0,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        mean,
    )
    # The gradients themselves, or other tensors where these have their features apart or are to be scattered.
    of_x, of_weight, of_bias = (contiguous(grad) for grad in grads)
    of_rows = None if of_x is None else of_x.flatten(0, -2) if place is None else torch.empty_like(matrix)
    sums = None if of_bias is None else torch.zeros_like(of_bias, dtype=torch.float64)
    if count:
        _sweep(matrix, rows(weight), bias, entropy, of_rows, of_weight, sums)
    elif of_weight is not None:
        of_weight.zero_()

    if of_x is not None and of_rows is not None and place is not None:
        of_x.zero_().flatten(0, -2)[place] = of_rows
    if of_bias is not None and sums is not None:
        of_bias.copy_(sums)
    if loss is not None and losses is not None:
        loss.view(-1)[slice(None) if place is None else place] = losses
        if mean and count == 0:
            loss.fill_(torch.nan)
    for grad, written in zip(grads, (of_x, of_weight, of_bias), strict=True):
        if grad is not None and written is not None and written is not grad:
            grad.copy_(written)
    return given(grads[0], x), given(grads[1], x), given(grads[2], x)


def _totals(target: Tensor, weights: Tensor | None, classes: int, ignore_index: int) -> Tensor:
    """Sums of the targets' weights, of all weights, and of the rows that count."""
    counted = target != ignore_index
    rows = counted.sum().double()
    if weights is None:
        return torch.stack((rows, torch.full_like(rows, classes), rows)).float()
    of_targets = weights[torch.where(counted, target, 0)] * counted
    return torch.stack((of_targets.sum(dtype=torch.float64), weights.sum(dtype=torch.float64), rows)).float()


def _sweep(x, weight, bias, entropy, grad_x, grad_weight, bias_sums) -> None:
    """Goes through the logits of rows that all count, stretch by stretch; a gradient that is None is not needed."""
    wanted = grad_x is not None or grad_weight is not None or bias_sums is not None
    sums_are_free = grad_weight is None or weight.dtype == torch.float32
    many_rows = x.shape[0] >= ROWS_FOR_SUMS * weight.shape[1]
    plan = stretches.by_rows if wanted and (sums_are_free or many_rows) else stretches.by_columns
    of_rows, of_classes = plan(x.shape[0], weight.shape[0])
    # Rows of logits begin at multiples of 128 bytes, whatever the number of classes: products of odd strides are slow.
    stride = -(-of_classes[0].stop // 64) * 64
    space = x.new_empty((of_rows[0].stop, stride))
    weight_sums = [None if grad_weight is None else Sum(grad_weight[c], len(of_rows)) for c in of_classes]

    def logits_of(r: slice, c: slice) -> Tensor:
        logits = space[: r.stop - r.start, : c.stop - c.start]
        multiply(x[r], weight[c].t(), logits, None if bias is None else bias[c])
        return logits

    for r in of_rows:
        terms = entropy.terms(r.stop - r.start)
        for c in of_classes:
            logits = logits_of(r, c)
            entropy.find_terms(logits, terms, r.start, c.start, c is of_classes[0], c is of_classes[-1])
        if not wanted:
            continue
        x_sums = None if grad_x is None else Sum(grad_x[r], len(of_classes))
        for c, weight_sum in reversed(list(zip(of_classes, weight_sums, strict=True))):
            if c is not of_classes[-1]:
                logits = logits_of(r, c)
            entropy.find_gradients(logits, terms, r.start, c.start, bias_sums)
            if x_sums is not None:
                x_sums.add(logits, weight[c])
            if weight_sum is not None:
                weight_sum.add(logits.t(), x[r])

"""The position-wise feed-forward network: csrc/cpu/feed_forward_forward.cpp and feed_forward_backward.cpp."""

from torch import Tensor

from ..tensors import contiguous, given, gradient, matrix, rows
from . import _native


def unsupported(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_pre: bool,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return _native.unsupported(x, w1, b1, w2, b2, w_gate)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    leading = x.shape[:-1]
    out = x.new_empty((*leading, w2.shape[0]))
    pre = x.new_empty((*leading, w1.shape[0])) if save_pre else None
    pre_gate = x.new_empty((*leading, w1.shape[0])) if save_pre and w_gate is not None else None
    _native.C.feed_forward_forward(
        matrix(x),
        w1,
        contiguous(b1),
        w2,
        contiguous(b2),
        w_gate,
        seed,
        out,
        pre,
        pre_gate,
        activation,
        dropout_p,
    )
    return out, given(pre, x), given(pre_gate, x)


def backward(
    grad_out: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    inputs = (x, w1, b1, w2, b2, w_gate)
    grads = [gradient(tensor, needed) for tensor, needed in zip(inputs, needs, strict=True)]
    grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_w_gate = grads
    written = contiguous(grad_x)  # another tensor where x has its features apart: the kernel writes rows
    _native.C.feed_forward_backward(
        rows(grad_out),
        matrix(x),
        w1,
        w2,
        w_gate,
        rows(pre),
        None if w_gate is None else rows(pre_gate),
        seed,
        written,
        grad_w1,
        grad_b1,
        grad_w2,
        grad_b2,
        grad_w_gate,
        activation,
        dropout_p,
    )
    if grad_x is not None and written is not None and written is not grad_x:
        grad_x.copy_(written)
    return (
        given(grad_x, x),
        given(grad_w1, x),
        given(grad_b1, x),
        given(grad_w2, x),
        given(grad_b2, x),
        given(grad_w_gate, x),
    )

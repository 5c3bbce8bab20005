"""Additive attention: csrc/cpu/additive_attention_forward.cpp and additive_attention_backward.cpp."""

from torch import Tensor

from ..additive_projections import projections
from ..tensors import contiguous, given, gradient, matrix
from . import _native


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    save: bool,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return _native.unsupported(query, key, value, w_query, w_key, v)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    out = query.new_empty((*query.shape[:2], value.shape[2]))
    kept = projections(query, key, w_query, save)
    _native.C.additive_attention_forward(
        _rows(query),
        _rows(key),
        value,
        w_query,
        w_key,
        v.contiguous(),
        attn_mask,
        seed,
        out,
        *(kept if save else (None, None)),
        dropout_p,
    )
    return out, *kept


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    projected_query: Tensor,
    projected_key: Tensor,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    tensors = query, key, value, w_query, w_key, v, attn_mask
    grads = [gradient(x, need) for x, need in zip(tensors, needs, strict=True)]
    # The gradients themselves, or other tensors where these lie in memory as the kernel does not write.
    written = [grad if i in (3, 4) else contiguous(grad) for i, grad in enumerate(grads)]
    _native.C.additive_attention_backward(
        grad_out,
        _rows(query),
        _rows(key),
        value,
        w_query,
        w_key,
        v.contiguous(),
        attn_mask,
        seed,
        projected_query,
        projected_key,
        *written,
        dropout_p,
    )
    for grad, found in zip(grads, written, strict=True):
        if grad is not None and found is not None and found is not grad:
            grad.copy_(found)
    return tuple(given(grad, query) for grad in grads)


def _rows(x: Tensor) -> Tensor:
    """(batch, rows, dim), with batch and rows as one dimension in memory."""
    return x if x.is_contiguous() or x.shape[0] == 1 else matrix(x).view(x.shape)

"""Additive attention: the projections are torch's products; the kernels are in additive_forward.py and additive_backward.py."""

import torch.nn.functional as F
from torch import Tensor

from ..additive_projections import projections
from ..tensors import given, gradient
from . import _launch, additive_backward, additive_forward


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
    return _launch.unsupported(query, key, value, w_query, w_key, v)


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
    of_query, of_key = F.linear(query, w_query).contiguous(), F.linear(key, w_key).contiguous()
    mask = additive_forward.spread(attn_mask, query.shape[0], query.shape[1], key.shape[1])
    out = additive_forward.forward(of_query, of_key, v.contiguous(), value, mask, seed, dropout_p)
    kept = projections(query, key, w_query, save)
    if save:
        for to, projected in zip(kept, (of_query, of_key), strict=True):
            to.copy_(projected.view(to.shape))
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
    grad_query, grad_key, grad_value, grad_w_query, grad_w_key, grad_v, grad_mask = grads
    batch, queries, _ = query.shape
    keys, hidden = key.shape[1], v.shape[0]
    grad_a, grad_b, found_v = additive_backward.backward(
        grad_out,
        projected_query.view(batch, queries, hidden),
        projected_key.view(batch, keys, hidden),
        v.contiguous(),
        value,
        additive_forward.spread(attn_mask, batch, queries, keys),
        seed,
        dropout_p,
        grad_value,
        grad_mask,
        needs[0] or needs[3] or needs[5],
        needs[1] or needs[4],
    )
    _through_projection(grad_a, query, w_query, grad_query, grad_w_query)
    _through_projection(grad_b, key, w_key, grad_key, grad_w_key)
    if grad_v is not None:
        grad_v.copy_(found_v)
    return tuple(given(grad, query) for grad in grads)


def _through_projection(
    grad: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None
) -> None:
    """From the gradient of x . weight^T to those of x and weight, with products in their dtype."""
    grad = grad.to(x.dtype)
    if grad_x is not None:
        grad_x.copy_(grad @ weight)
    if grad_weight is not None:
        grad_weight.copy_(grad.flatten(0, 1).T @ x.flatten(0, 1))

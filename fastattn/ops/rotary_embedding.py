"""Rotary position embedding of queries and keys."""

import torch
from torch import Tensor

from .. import dispatch
from ..backends import BACKENDS
from ..backends.tensors import along
from . import _checks, _library

_eager = BACKENDS["eager"]["rotary_embedding"].forward


def rotary_embedding(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Turns q and k by their positions' angles: x · cos + rotate(x) · sin.

    Args:
        q: (batch, heads, seq, head_dim), floating.
        k: (batch, kv_heads, seq, head_dim), same dtype and device.
        cos, sin: (seq, rotary_dim), (batch or 1, seq, rotary_dim) or (batch or 1, 1, seq, rotary_dim), floating, rotary_dim
            even and at most head_dim; each angle stands twice: halves repeated, [a, b, a, b], or, interleaved, neighbours
            repeated, [a, a, b, b].
        interleaved: rotate neighbouring pairs (GPT-J) and not the two halves (GPT-NeoX, Llama).

    Returns:
        (q, k) turned, shapes and dtypes unchanged. Dimensions beyond rotary_dim pass through.

    Raises:
        TypeError: wrong or mixed dtypes.
        ValueError: shapes or devices that do not fit.

    Source: Su et al., 2021 (RoFormer).
    """
    _checks.floating("q", q)
    _checks.like("k", k, "q", q)
    for name, x in (("q", q), ("k", k)):
        _checks.rank(name, x, "(batch, heads, seq, head_dim)", 4)
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; only the number of heads may differ")
    _checks.angles(cos, sin, "q", q, q.shape)
    args = (q, k, *_checks.angles_with_heads(cos, sin), _checks.flag("interleaved", interleaved))
    backend = dispatch.choose("rotary_embedding", args)
    if backend == "eager":
        return _eager(*args)
    # Here and not in the backend: the results get the strides of what the op receives, on fake tensors as well.
    args = (along(q), along(k), *args[2:])
    if _library.needs_grad(q, k):
        return _library.record(_RotaryEmbedding, *args, backend)
    return _forward(*args, backend)


def _fake(q, k, cos, sin, interleaved, backend):
    return torch.empty_like(q), torch.empty_like(k)


_forward = _library.define(
    "rotary_embedding",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor out_q, Tensor out_k)",
    _fake,
)
_backward = _library.define(
    "rotary_embedding",
    "(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    _fake,
    "backward",
)


@_library.differentiable(_forward)
class _RotaryEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, cos, sin, *settings = inputs
        ctx.mark_non_differentiable(*(out for x, out in zip((q, k), output, strict=True) if not x.requires_grad))
        ctx.save_for_backward(cos, sin)
        ctx.settings = settings

    @staticmethod
    def backward(ctx, *given):
        # A tensor without heads, in place of a gradient that there is not.
        none = next(grad for grad in given if grad is not None)[:, :0]
        grads = _library.run_backward(
            _backward, *(along(none if grad is None else grad) for grad in given), *ctx.saved_tensors, *ctx.settings
        )
        wanted = (None if grad is None else found for grad, found in zip(given, grads, strict=True))
        return (*wanted, None, None, None, None)

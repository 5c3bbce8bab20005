"""Rotary position embedding: csrc/cpu/rotary_embedding.cpp."""

import torch
from torch import Tensor

from ..tensors import along
from . import _native


def unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    reason = _native.unsupported(q, k) or _native.unsupported(cos) or _native.unsupported(sin)
    if reason is None and torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        reason = "it has no gradients for cos and sin; detach them if you need none"
    return reason


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    return _turn(q, k, cos, sin, interleaved, False)


def backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    return _turn(grad_q, grad_k, cos, sin, interleaved, True)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    _native.C.rotary_embedding(q, k, along(cos), along(sin), out_q, out_k, interleaved, inverse)
    return out_q, out_k

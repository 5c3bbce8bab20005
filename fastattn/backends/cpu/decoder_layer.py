"""A whole decoder layer on new tokens: csrc/cpu/decoder_layer.cpp."""

from typing import Any

import torch
from torch import Tensor

from ..tensors import along, contiguous
from . import _native


def unsupported(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *settings: Any,
) -> str | None:
    """Why the kernel cannot take this call; None if it can. (The norms may be float32 beside another dtype.)"""
    why = _native.unsupported(x, k_cache, v_cache, w_qkv, w_out, w1, w2)
    return why or (None if cos is None or sin is None else _native.unsupported(cos) or _native.unsupported(sin))


def forward(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    w_qkv: Tensor,
    b_qkv: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    activation: str,
    norm: str,
    eps1: float,
    eps2: float,
    scale: float,
) -> Tensor:
    """Arguments and result as in docs/architecture.md, "Normalised arguments"."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _native.C.decoder_layer_forward(
        x.contiguous(),
        k_cache,
        v_cache,
        cache_seqlens.contiguous(),
        w_qkv,
        contiguous(b_qkv),
        w_out,
        contiguous(b_out),
        contiguous(norm1_weight),
        contiguous(norm1_bias),
        w1,
        contiguous(b1),
        w2,
        contiguous(b2),
        w_gate,
        contiguous(norm2_weight),
        contiguous(norm2_bias),
        None if cos is None else along(cos),
        None if sin is None else along(sin),
        out,
        activation,
        norm,
        eps1,
        eps2,
        scale,
    )
    return out

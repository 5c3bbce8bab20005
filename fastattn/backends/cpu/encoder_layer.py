"""A whole encoder layer: csrc/cpu/encoder_layer.cpp."""

import torch
from torch import Tensor

from ..tensors import contiguous
from . import _native


def unsupported(
    x: Tensor,
    w_query: Tensor,
    b_query: Tensor | None,
    w_key: Tensor,
    b_key: Tensor | None,
    w_value: Tensor,
    b_value: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    max_seqlen: int,
    activation: str,
    eps1: float,
    eps2: float,
    scale: float,
    norm_first: bool,
) -> str | None:
    """Why the kernel cannot take this call; None if it can. (The norms may be float32 beside another dtype.)"""
    return _native.unsupported(x, w_query, w_key, w_value, w_out, w1, w2)


def forward(
    x: Tensor,
    w_query: Tensor,
    b_query: Tensor | None,
    w_key: Tensor,
    b_key: Tensor | None,
    w_value: Tensor,
    b_value: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    max_seqlen: int,
    activation: str,
    eps1: float,
    eps2: float,
    scale: float,
    norm_first: bool,
) -> Tensor:
    """Arguments and result as in docs/architecture.md, "Normalised arguments"."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _native.C.encoder_layer_forward(
        x.contiguous(),
        w_query,
        contiguous(b_query),
        w_key,
        contiguous(b_key),
        w_value,
        contiguous(b_value),
        w_out,
        contiguous(b_out),
        contiguous(norm1_weight),
        contiguous(norm1_bias),
        w1,
        contiguous(b1),
        w2,
        contiguous(b2),
        contiguous(norm2_weight),
        contiguous(norm2_bias),
        contiguous(cu_seqlens),
        out,
        heads,
        max_seqlen,
        activation,
        eps1,
        eps2,
        scale,
        norm_first,
    )
    return out

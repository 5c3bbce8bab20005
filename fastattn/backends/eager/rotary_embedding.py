"""Rotary position embedding (Su et al., 2021), the definition.

    rotated = x * cos + rotate(x) * sin
    rotate  = (-x2, x1) for the halves x1, x2 of the rotary dimensions (GPT-NeoX, Llama), or
              (-x1, x0, -x3, x2, …) for neighbouring pairs where interleaved (GPT-J)

cos and sin are (…, seq, rotary_dim); dimensions of x beyond rotary_dim pass through.
"""

import torch
from torch import Tensor


def _rotate(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _embed(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary_dim = cos.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = (turned * cos + _rotate(turned, interleaved) * sin).to(x.dtype)
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """q (batch, heads, seq, head_dim), k (batch, kv_heads, seq, head_dim)."""
    return _embed(q, cos, sin, interleaved), _embed(k, cos, sin, interleaved)

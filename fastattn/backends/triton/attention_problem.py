"""One call of attention, dense or packed, as its kernels take it: the parameters with which every one of them begins."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _launch, dropout
from .chips import chip_of
from .configs import Config, choose
from .tile import padded

WIDEST = 256


@dataclass(frozen=True)
class Problem:
    """Normalised arguments (docs/architecture.md) in one layout.

    Attributes:
        query, key, value: 4-D; packed tensors are (1, heads, tokens, dim).
        cu_seqlens_q, cu_seqlens_k: None for dense tensors.
        q_len, k_len: of every sequence, or the most that a packed one has.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    seed: Tensor | None
    q_len: int
    k_len: int
    scale: float
    window_left: int
    window_right: int
    diagonal: int
    softcap: float
    dropout_p: float

    @property
    def batch(self) -> int:
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    def config(self, kernel: str) -> Config:
        """The row of the table for the wider of head_dim and value_dim."""
        width = max(padded(self.query.shape[3]), padded(self.value.shape[3]))
        # Dropout's hashes and what is added to a score take registers, too: the tiles of the next width.
        _, _, of_query, of_key = _mask_strides(self.attn_mask)
        wide_mask = of_query is not None and of_key is not None
        if wide_mask or self.seed is not None or self.alibi_slopes is not None or self.softcap > 0.0:
            width *= 2
        return choose(kernel, chip_of(self.query.device), self.query.dtype, width)

    @property
    def _scaled(self) -> bool:
        """Whether a score has more to it than a positive factor (score.py)."""
        added = self.attn_mask is not None and self.attn_mask.is_floating_point()
        return added or self.alibi_slopes is not None or self.softcap > 0.0 or not self.scale > 0.0

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What every kernel begins with, in the order of its parameters."""
        mask, slopes = self.attn_mask, self.alibi_slopes
        if mask is not None and not mask.is_floating_point():
            mask = mask.view(torch.uint8)
        furthest = self.q_len + self.k_len + abs(self.diagonal)
        left, right = (None if w < 0 else min(w, furthest) for w in (self.window_left, self.window_right))
        return (
            self.query,
            self.key,
            self.value,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            mask,
            slopes,
            self.seed,
            *self.query.stride(),
            *self.key.stride(),
            *self.value.stride(),
            *_mask_strides(mask),
            None if slopes is None else (slopes.stride(0) if slopes.ndim == 2 else 0),
            None if slopes is None else slopes.stride(-1),
            self.heads,
            self.heads // max(self.kv_heads, 1),
            self.query.shape[2],
            self.q_len,
            self.k_len,
            self.diagonal,
            self.scale,
            math.log2(math.e) * (1.0 if self._scaled else self.scale),
            left,
            right,
            self.softcap if self.softcap > 0.0 else None,
            dropout.threshold(self.dropout_p),
            dropout.inverse(self.dropout_p),
        )

    @property
    def constants(self) -> dict[str, Any]:
        head_dim, value_dim = self.query.shape[3], self.value.shape[3]
        return {
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "HEAD_TILE": padded(head_dim),
            "VALUE_TILE": padded(value_dim),
            "SCALED": self._scaled,
            "PRECISION": _launch.precision(self.query.dtype),
        }


def _mask_strides(mask: Tensor | None) -> tuple[int | None, ...]:
    """Of batch, head, query and key: 0, or for the last two None, along which the mask is the same."""
    if mask is None:
        return (None,) * 4
    batch, head, query, key = (0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride(), strict=True))
    return batch, head, query or None, key or None


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take this call; None if they can."""
    why = _launch.unsupported(query, key, value)
    if why is None and max(query.shape[-1], value.shape[-1]) > WIDEST:
        why = (
            f"it keeps whole heads in registers, at most {WIDEST} features, and these have head_dim {query.shape[-1]} and "
            f"value_dim {value.shape[-1]}"
        )
    return why

"""One call of attention, dense or packed, and what its kernels are given of it: `Given`, with which every one of them begins."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _launch, dropout
from .chips import chip_of
from .configs import Config, choose
from .descriptors import describe, readable
from .tile import padded

WIDEST = 256


class Heads(NamedTuple):
    """A tensor (batch, heads, tokens, dim); packed ones are (1, heads, total, dim).

    Attributes:
        DIM, TILE: dim, and the side of a tile that holds as much (constexpr).
    """

    base: Any
    stride_batch: Any
    stride_head: Any
    stride_token: Any
    stride_dim: Any
    DIM: Any
    TILE: Any


class Mask(NamedTuple):
    """A mask (batch, heads, q, k), uint8 or floating; or its base is None.

    A stride is 0 where it is the same for all batch elements or heads, None where for all queries or keys.
    """

    base: Any
    stride_batch: Any
    stride_head: Any
    stride_query: Any
    stride_key: Any


class Slopes(NamedTuple):
    """ALiBi's slopes, (batch, heads) float32; or their base is None."""

    base: Any
    stride_batch: Any
    stride_head: Any


class Rules(NamedTuple):
    """How a score follows from a product (score.py).

    Attributes:
        window_left, window_right, softcap: or None.
        SCALED: whether a score has more to it than a positive factor (constexpr).
    """

    scale: Any
    factor: Any
    window_left: Any
    window_right: Any
    softcap: Any
    SCALED: Any


class Dropout(NamedTuple):
    """What of the weights is dropped (dropout.py).

    Attributes:
        seed: (1,) int64, or None.
        inverse: what a weight that is kept is multiplied by.
    """

    seed: Any
    threshold: Any
    inverse: Any


class Given(NamedTuple):
    """What attention's kernels begin with.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, or None for dense tensors.
        q_len, k_len, diagonal: of every sequence, or the most that a packed one has.
        heads, group: of queries, and how many of them share a head of keys.
        tokens_q, tokens_k: rows of a head of queries, and of keys.
        PRECISION: of products (constexpr).
    """

    query: Heads
    key: Heads
    value: Heads
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    q_len: Any
    k_len: Any
    diagonal: Any
    heads: Any
    group: Any
    tokens_q: Any
    tokens_k: Any
    rules: Rules
    mask: Mask
    slopes: Slopes
    dropout: Dropout
    PRECISION: Any


def heads_of(tensor: Tensor) -> Heads:
    """A 4-D tensor as a kernel takes it."""
    dim = tensor.shape[3]
    batch, head, token, feature = tensor.stride()
    return Heads(tensor, batch, head, token, feature, tl.constexpr(dim), tl.constexpr(padded(dim)))


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
        mask = self._mask
        wide_mask = mask.stride_query is not None and mask.stride_key is not None
        if wide_mask or self.seed is not None or self.alibi_slopes is not None or self.softcap > 0.0:
            width *= 2
        return choose(kernel, chip_of(self.query.device), self.query.dtype, width)

    def tiles(self, config: Config, rows: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
        """What describes these tensors in tiles of so many rows, where the config asks for the copy engine and it can read all.

        A tile that goes beyond a tensor's end has zeros there. But a tile at the end of a packed sequence has rows of the next
        one, and a weight of zero does not take out their NaN: kernels load it by addresses.
        """
        if not config.described or not all(map(readable, tensors)):
            return [None] * len(tensors)
        return [describe(tensor, (1, 1, rows, padded(tensor.shape[3]))) for tensor in tensors]

    @property
    def _scaled(self) -> bool:
        """Whether a score has more to it than a positive factor (score.py)."""
        added = self.attn_mask is not None and self.attn_mask.is_floating_point()
        return added or self.alibi_slopes is not None or self.softcap > 0.0 or not self.scale > 0.0

    @cached_property
    def _mask(self) -> Mask:
        mask = self.attn_mask
        if mask is None:
            return Mask(*(None,) * 5)
        if not mask.is_floating_point():
            mask = mask.view(torch.uint8)
        batch, head, query, key = (0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride(), strict=True))
        return Mask(mask, batch, head, query or None, key or None)

    @property
    def _slopes(self) -> Slopes:
        slopes = self.alibi_slopes
        if slopes is None:
            return Slopes(None, None, None)
        return Slopes(slopes, slopes.stride(0) if slopes.ndim == 2 else 0, slopes.stride(-1))

    @cached_property
    def given(self) -> Given:
        """What every kernel begins with."""
        furthest = self.q_len + self.k_len + abs(self.diagonal)
        left, right = (None if w < 0 else min(w, furthest) for w in (self.window_left, self.window_right))
        scaled = self._scaled
        factor = math.log2(math.e) * (1.0 if scaled else self.scale)
        softcap = self.softcap if self.softcap > 0.0 else None
        return Given(
            heads_of(self.query),
            heads_of(self.key),
            heads_of(self.value),
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.q_len,
            self.k_len,
            self.diagonal,
            self.heads,
            self.heads // max(self.kv_heads, 1),
            self.query.shape[2],
            self.key.shape[2],
            Rules(self.scale, factor, left, right, softcap, tl.constexpr(scaled)),
            self._mask,
            self._slopes,
            Dropout(self.seed, dropout.threshold(self.dropout_p), dropout.inverse(self.dropout_p)),
            tl.constexpr(_launch.precision(self.query.dtype)),
        )


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take this call; None if they can."""
    why = _launch.unsupported(query, key, value)
    if why is None and max(query.shape[-1], value.shape[-1]) > WIDEST:
        why = (
            f"it keeps whole heads in registers, at most {WIDEST} features, and these have head_dim {query.shape[-1]} and "
            f"value_dim {value.shape[-1]}"
        )
    return why

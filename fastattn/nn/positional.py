"""Positional encodings: sinusoidal, learnt, rotary, ALiBi and T5's relative bias."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import ops
from fastattn.ops import _checks

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MOST_KEPT = 1 << 20  # positions in a table that is kept; those far beyond are computed as they are asked for


class _AddedEncoding(nn.Module):
    """dropout(x + encoding of its positions), for a table (max_len, d_model), `weight`."""

    weight: Tensor

    def __init__(self, max_len: int, d_model: int, dropout: float, batch_first: bool) -> None:
        super().__init__()
        if max_len <= 0 or d_model <= 0:
            raise ValueError(f"max_len and d_model must be greater than 0, got {max_len} and {d_model}")
        self.max_len, self.d_model, self.batch_first = max_len, d_model, batch_first
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """Adds to x the encoding of positions offset, offset + 1, …

        Args:
            x: (S, d_model), (S, N, d_model), or (N, S, d_model) where batch_first; floating.
            offset: position of the first token, as when decoding behind a cache.
            positions: integer positions, (S,) or x's shape without its last dimension; instead of offset.

        Returns:
            x's shape and dtype.

        Raises:
            ValueError: a wrong last dimension, or positions outside 0 … max_len - 1.
            TypeError: x that is not floating, positions that are not integers.
        """
        _checks.floating("x", x)
        if x.device != self.weight.device:
            raise ValueError(f"x is on {x.device} but the encoding is on {self.weight.device}; move one")
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected 2 or 3 dimensions, the last d_model {self.d_model}"
            )
        sequence_first = x.dim() == 3 and not self.batch_first
        length = x.shape[0 if sequence_first else -2]
        if positions is None:
            offset = _checks.integer("offset", offset)
            if offset < 0 or offset + length > self.max_len:
                raise ValueError(
                    f"positions {offset} to {offset + length - 1} are asked for, but the encoding holds 0 to "
                    f"{self.max_len - 1}; make it with a larger max_len"
                )
            encoding = self.weight[offset : offset + length]
        else:
            _check_positions(positions, x, (length,), tuple(x.shape[:-1]))
            if _checks.readable(positions) and positions.numel():
                low, high = positions.min().item(), positions.max().item()
                if low < 0 or high >= self.max_len:
                    raise ValueError(f"positions holds {low} to {high}; the encoding holds 0 to {self.max_len - 1}")
            encoding = self.weight[positions.long()]  # (torch takes uint8 for a mask, and no shorter type at all)
        if sequence_first and encoding.dim() == 2:
            encoding = encoding.unsqueeze(1)
        return self.dropout(x + encoding.to(x.dtype))

    def extra_repr(self) -> str:
        return f"max_len={self.max_len}, d_model={self.d_model}, batch_first={self.batch_first}"


class SinusoidalPositionalEncoding(_AddedEncoding):
    """Adds sines and cosines of the position to x, then drops out.

        encoding[p, 2i] = sin(p / base^(2i / d_model)),  encoding[p, 2i + 1] = cos(p / base^(2i / d_model))

    The table is computed in float64 and is not part of the state_dict.

    Args:
        d_model: width of the model; odd widths end on a sine.
        max_len: how many positions.
        dropout: probability of dropout on the sum in training.
        batch_first: (N, S, E) instead of (S, N, E).
        base: the longest wavelength is 2π · base.
        device, dtype: of the table.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        dropout: float = 0.0,
        batch_first: bool = False,
        base: float = 10000.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(max_len, d_model, dropout, batch_first)
        position = torch.arange(max_len, dtype=torch.float64).unsqueeze(1)
        angle = position * torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(base) / d_model))
        table = torch.empty(max_len, d_model, dtype=torch.float64)
        table[:, 0::2] = torch.sin(angle)
        table[:, 1::2] = torch.cos(angle[:, : d_model // 2])
        self.register_buffer(
            "weight", table.to(device=device, dtype=dtype or torch.get_default_dtype()), persistent=False
        )


class LearnedPositionalEncoding(_AddedEncoding):
    """Adds a learnt vector of its position to each token, then drops out.

    The state_dict holds `weight` (max_len, d_model), as `torch.nn.Embedding`'s; it starts normal with deviation 0.02.

    Args:
        d_model: width of the model.
        max_len: how many positions.
        dropout: probability of dropout on the sum in training.
        batch_first: (N, S, E) instead of (S, N, E).
        device, dtype: of the parameter.

    Source: Gehring et al., "Convolutional Sequence to Sequence Learning", 2017; initialised as in BERT and GPT-2.
    """

    def __init__(
        self,
        d_model: int,
        max_len: int = 512,
        dropout: float = 0.0,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(max_len, d_model, dropout, batch_first)
        self.weight = nn.Parameter(torch.empty(max_len, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by angles that grow with their position, so that scores depend on distances.

        angle[p, i] = p / base^(2i / rotary_dim),   i = 0 … rotary_dim / 2 - 1

    Angles are computed in float64 and their cosines and sines kept in float32 whatever the model's dtype, so that late
    positions stay exact in bfloat16. There is no state_dict.

    Args:
        head_dim: width of a head.
        rotary_dim: how many of its features turn, even; None for all.
        base: 10000 in the paper; longer contexts take more.
        interleaved: turn neighbouring features (GPT-J) and not the two halves (GPT-NeoX, Llama).

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """

    def __init__(
        self, head_dim: int, rotary_dim: int | None = None, base: float = 10000.0, interleaved: bool = False
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim <= 0 or rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"rotary_dim is {rotary_dim}; expected an even number from 2 to head_dim = {head_dim}")
        self.head_dim, self.rotary_dim, self.base, self.interleaved = head_dim, rotary_dim, base, interleaved
        self._kept: tuple[int, Tensor, Tensor] | None = None

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for integer positions (seq,) or (batch, seq): (…, seq, rotary_dim) each, float32.

        Computed once, they serve every layer through `fastattn.ops.rotary_embedding`.
        """
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=positions.device) / self.rotary_dim
        angle = positions.to(torch.float64).unsqueeze(-1) * self.base**-exponent
        angle = angle.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angle, angle), dim=-1)
        return torch.cos(angle).float(), torch.sin(angle).float()

    def forward(
        self, query: Tensor, key: Tensor, offset: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotates query and key, which stand at the same positions.

        Args:
            query: (batch, heads, seq, head_dim), floating.
            key: (batch, kv_heads, seq, head_dim), same dtype and device.
            offset: position of the first token, as when decoding behind a cache.
            positions: integer positions (seq,) or (batch, seq); instead of offset.

        Returns:
            (query, key) turned, shapes and dtypes unchanged.

        Raises:
            TypeError: wrong or mixed dtypes.
            ValueError: shapes or devices that do not fit.
        """
        _checks.floating("query", query)
        if query.dim() != 4 or query.shape[-1] != self.head_dim:
            raise ValueError(
                f"query has shape {tuple(query.shape)}; expected (batch, heads, seq, {self.head_dim}), head_dim last"
            )
        length = query.shape[-2]
        offset = _checks.length("offset", offset)
        if positions is not None:
            _check_positions(positions, query, (length,), (query.shape[0], length))
            cos, sin = self.cos_sin(positions)
        elif torch.compiler.is_compiling():
            cos, sin = self.cos_sin(torch.arange(offset, offset + length, device=query.device))
        else:
            cos, sin = self._kept_cos_sin(offset, length, query.device)
        return ops.rotary_embedding(query, key, cos, sin, self.interleaved)

    def _kept_cos_sin(self, offset: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """A stretch of a table that grows by doubling, so that decoding does not compute it token by token."""
        end = offset + length
        if (
            end > _MOST_KEPT or torch._C._len_torch_dispatch_stack() > 0
        ):  # a mode may make tensors of its own, fake ones
            return self.cos_sin(torch.arange(offset, end, device=device))
        if self._kept is None or self._kept[0] < end or self._kept[1].device != device:
            size = max(64, 1 << (end - 1).bit_length()) if end else 64
            with torch.inference_mode(False):  # a table made for inference could not be used in training
                self._kept = (size, *self.cos_sin(torch.arange(size, device=device)))
        _, cos, sin = self._kept
        return cos[offset:end], sin[offset:end]

    def extra_repr(self) -> str:
        return f"{self.head_dim}, rotary_dim={self.rotary_dim}, base={self.base}, interleaved={self.interleaved}"


class ALiBi(nn.Module):
    """Attention with linear biases: each head takes slope · distance off its scores.

    `slopes` (num_heads,), float32, goes to `fastattn.ops.attention(..., alibi_slopes=)`, which never forms the bias.
    Calling the module forms it, for attention that takes a floating mask. There is no state_dict.

    Args:
        num_heads: number of heads. A power of two n has slopes 2^(-8/n), 2^(-16/n), …, 2^-8; other numbers take those
            of the power below and then every other one of the power above.
        device: of the slopes.

    Source: Press, Smith and Lewis, "Train Short, Test Long", 2022.
    """

    slopes: Tensor

    def __init__(self, num_heads: int, device: Any = None) -> None:
        super().__init__()
        if num_heads <= 0:
            raise ValueError(f"num_heads must be greater than 0, got {num_heads}")
        self.num_heads = num_heads
        below = 1 << (num_heads.bit_length() - 1)
        slopes = [2.0 ** (-8.0 * i / below) for i in range(1, below + 1)]
        slopes += [2.0 ** (-4.0 * i / below) for i in range(1, 2 * (num_heads - below), 2)]
        self.register_buffer("slopes", torch.tensor(slopes, dtype=torch.float32, device=device), persistent=False)

    def forward(self, query_len: int, key_len: int | None = None) -> Tensor:
        """The bias -slope · |i + key_len - query_len - j|, (num_heads, query_len, key_len), float32.

        The last query stands at the last key. For `MultiheadAttention` repeat it over the batch: `alibi(L, S).repeat(N,
        1, 1)`.
        """
        query_len = _checks.length("query_len", query_len)
        key_len = query_len if key_len is None else _checks.length("key_len", key_len)
        query = torch.arange(key_len - query_len, key_len, device=self.slopes.device)
        distance = query.unsqueeze(1) - torch.arange(key_len, device=self.slopes.device)
        return -self.slopes.float()[:, None, None] * distance.abs()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class RelativePositionBias(nn.Module):
    """T5's relative position bias: a learnt number a head for each bucket of distances, added to the scores.

    Half of the buckets hold one distance each, the other half logarithmically longer ranges up to max_distance, beyond
    which all distances share the last. The state_dict holds `relative_attention_bias.weight` (num_buckets, num_heads),
    as in Hugging Face's T5.

    Args:
        num_heads: number of heads.
        num_buckets: number of buckets; even where bidirectional.
        max_distance: where the last bucket begins.
        bidirectional: keys after the query have buckets of their own (encoder); else they share that of distance 0
            (decoder).
        device, dtype: of the parameter.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_side = num_buckets // 2 if bidirectional else num_buckets
        if one_side < 2 or max_distance <= one_side // 2:
            raise ValueError(
                f"num_buckets is {num_buckets} and max_distance {max_distance}; expected at least 2 buckets a side "
                f"and a max_distance above the {one_side // 2} distances that have their own"
            )
        self.num_heads, self.num_buckets = num_heads, num_buckets
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads, device=device, dtype=dtype)

    def bucket(self, relative_position: Tensor) -> Tensor:
        """The bucket, int64, of each integer relative position, key's minus query's."""
        buckets = self.num_buckets
        first = torch.zeros_like(relative_position, dtype=torch.int64)
        if self.bidirectional:
            buckets //= 2
            first = (relative_position > 0).long() * buckets
            distance = relative_position.abs()
        else:
            distance = (-relative_position).clamp(min=0)
        exact = buckets // 2
        # float32, as the reference implementation: it decides on which side of a boundary a distance falls.
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance.long(), far)

    def forward(self, query_len: int, key_len: int | None = None, offset: int = 0) -> Tensor:
        """The bias (1, num_heads, query_len, key_len), for the attn_mask of `fastattn.ops.attention`, which trains it.

        Args:
            query_len: number of queries.
            key_len: number of keys; None for query_len.
            offset: position of the first query, as when decoding behind a cache.
        """
        query_len = _checks.length("query_len", query_len)
        key_len = query_len if key_len is None else _checks.length("key_len", key_len)
        offset = _checks.integer("offset", offset)
        device = self.relative_attention_bias.weight.device
        # One column a diagonal, then each (query, key) picks its diagonal: query_len + key_len look-ups, not their
        # product.
        first, end = 1 - query_len - offset, key_len - offset
        diagonals = torch.arange(first, max(first, end), device=device)
        by_diagonal = self.relative_attention_bias(self.bucket(diagonals)).T
        query = torch.arange(query_len - 1, -1, -1, device=device)
        return by_diagonal[:, query.unsqueeze(1) + torch.arange(key_len, device=device)].unsqueeze(0)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"


def _check_positions(positions: Tensor, x: Tensor, *shapes: tuple[int, ...]) -> None:
    _checks.tensor("positions", positions)
    if positions.device != x.device:
        raise ValueError(f"positions is on {positions.device} but the tokens are on {x.device}; move one")
    if positions.dtype not in _INTEGERS:
        raise TypeError(f"positions has dtype {positions.dtype}; expected integers: convert it with positions.long()")
    if tuple(positions.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(f"positions has shape {tuple(positions.shape)}; expected {wanted}")

"""Self-attention with grouped queries, over whichever tokens its `Tokens` describes.

Whole       (batch, seq): every token there is
Packed      (1, tokens): sequences of different lengths, end to end
Prompts     as Packed, and keys and values are put into a cache
Continued   (batch, new): the tokens behind those in a cache
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastattn import ops
from fastattn._watch import ops_of
from fastattn.nn import Linear
from fastattn.nn.packed_sequences import PackedSequences

from .cache import KeyValueCache

Angles = tuple[Tensor, Tensor] | None  # of the tokens, as `RotaryEmbedding.cos_sin` gives them


@dataclass(frozen=True)
class Whole:
    """Sequences of one length; bias (1, heads, seq, seq) is added to the scores."""

    causal: bool
    bias: Tensor | None = None

    def positions(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], device=x.device)

    def attend(
        self,
        module: "SelfAttention",
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: Angles,
        dropout_p: float,
        scale: float | None,
    ) -> Tensor:
        query, key = _turn(query, key, angles)
        out = ops_of(module).attention(query, key, value, self.bias, dropout_p, self.causal, scale, enable_gqa=True)
        return cast(Tensor, out)


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end; bias (1, heads, max_seqlen, max_seqlen) is added to the scores."""

    causal: bool
    sequences: PackedSequences
    bias: Tensor | None = None

    def positions(self, x: Tensor) -> Tensor:
        starts = self.sequences.cu_seqlens
        tokens = torch.arange(x.shape[1], device=x.device)
        lengths = starts.diff()
        return (tokens - starts[:-1].repeat_interleave(lengths, output_size=x.shape[1])).unsqueeze(0)

    def attend(
        self,
        module: "SelfAttention",
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: Angles,
        dropout_p: float,
        scale: float | None,
    ) -> Tensor:
        query, key = _turn(query, key, angles)
        return _attend_packed(
            module, query, key, value, self.sequences, self.sequences, dropout_p, self.causal, scale, self.bias
        )


@dataclass(frozen=True, kw_only=True)
class Prompts(Packed):
    """Sequences laid end to end, whose keys and values go into a cache."""

    cache: KeyValueCache

    def attend(
        self,
        module: "SelfAttention",
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: Angles,
        dropout_p: float,
        scale: float | None,
    ) -> Tensor:
        query, key = _turn(query, key, angles)
        self.cache.write_packed(module.layer, key, value, self.sequences)
        return super().attend(module, query, key, value, None, dropout_p, scale)


@dataclass(frozen=True)
class Continued:
    """New tokens of sequences whose earlier ones are in a cache.

    bias (1, heads, 1, tokens) is added to the scores of one new token; the sequences then are of one length, tokens - 1.
    """

    cache: KeyValueCache
    bias: Tensor | None = None

    def positions(self, x: Tensor) -> Tensor:
        return self.cache.lengths.unsqueeze(1) + torch.arange(x.shape[1], device=x.device)

    def attend(
        self,
        module: "SelfAttention",
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: Angles,
        dropout_p: float,
        scale: float | None,
    ) -> Tensor:
        cache = self.cache
        keys, values = cache.keys[module.layer], cache.values[module.layer]
        if self.bias is None:
            cos, sin = (None, None) if angles is None else angles
            out = ops_of(module).attention_with_kvcache(
                query, keys, values, key, value, cache_seqlens=cache.lengths, scale=scale, cos=cos, sin=sin
            )
            return cast(Tensor, out)
        query, key = _turn(query, key, angles)
        end = cache.longest + 1
        keys[:, :, cache.longest : end], values[:, :, cache.longest : end] = key, value
        out = ops_of(module).attention(query, keys[:, :, :end], values[:, :, :end], self.bias, scale=scale)
        return cast(Tensor, out)


Tokens = Whole | Packed | Continued


@dataclass(frozen=True)
class Memory:
    """What cross-attention attends to: an encoder's hidden states (batch, seq, d_model), all of them; or, packed,
    (1, tokens, d_model), with where the queries' and the keys' sequences begin."""

    hidden: Tensor
    queries: PackedSequences | None = None
    keys: PackedSequences | None = None

    def attend(self, cross: "CrossAttention", query: Tensor, dropout_p: float) -> Tensor:
        key, value = cross.keys_and_values(self.hidden)
        if self.queries is None or self.keys is None:
            return cast(Tensor, ops_of(cross).attention(query, key, value, None, dropout_p, False, cross.scale))
        return _attend_packed(cross, query, key, value, self.queries, self.keys, dropout_p, False, cross.scale, None)


@dataclass(frozen=True)
class Remembered:
    """The same, whose keys and values are in a cache: `CrossAttention.remember` put them there. For inference."""

    cache: KeyValueCache

    def attend(self, cross: "CrossAttention", query: Tensor, dropout_p: float) -> Tensor:
        keys, values = self.cache.keys[cross.layer], self.cache.values[cross.layer]
        out = ops_of(cross).attention_with_kvcache(
            query, keys, values, cache_seqlens=self.cache.lengths, is_causal=False, scale=cross.scale
        )
        return cast(Tensor, out)


def _turn(query: Tensor, key: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    return (query, key) if angles is None else ops.rotary_embedding(query, key, *angles)


def _attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: PackedSequences,
    keys: PackedSequences,
    dropout_p: float,
    causal: bool,
    scale: float | None,
    bias: Tensor | None,
) -> Tensor:
    """Tensors (1, heads, tokens, head_dim), as the other kinds of attention have them."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    starts = (queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen)
    out = ops_of(module).attention_varlen(q, k, v, *starts, dropout_p, causal, scale, attn_mask=bias)
    return cast(Tensor, out).transpose(0, 1).unsqueeze(0)


class SelfAttention(nn.Module):
    """Projection to queries, keys and values in one product, attention, and the projection back.

    The state_dict holds `qkv` ((heads + 2 · kv_heads) · head_dim rows: queries, keys, values, head after head) and `out`.

    Args:
        layer: number of the layer, its place in a cache.
        d_model, heads, kv_heads, head_dim: sizes; heads is a multiple of kv_heads.
        bias: whether the projections have a bias.
        dropout: probability of dropping an attention weight in training.
        scale: factor of the scores; None for 1 / sqrt(head_dim).

    Source: Vaswani et al., 2017; grouped queries Ainslie et al., 2023; rotary positions Su et al., 2021.
    """

    def __init__(
        self,
        layer: int,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool,
        dropout: float,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.head_dim, self.dropout, self.scale = layer, head_dim, dropout, scale
        self.heads = [heads, kv_heads, kv_heads]
        self.qkv = Linear(d_model, sum(self.heads) * head_dim, bias)
        self.out = Linear(heads * head_dim, d_model, bias)

    def forward(self, x: Tensor, tokens: Tokens, angles: Angles = None) -> Tensor:
        """x (batch, seq, d_model) to the same."""
        projected = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = projected.split(self.heads, dim=1)
        out = tokens.attend(self, query, key, value, angles, self.dropout if self.training else 0.0, self.scale)
        return self.out(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of a decoder's tokens to an encoder's.

    The state_dict holds `query`, `key_value` (2 · heads · head_dim rows: keys, values, head after head) and `out`.

    Args:
        layer: number of the layer, its place in a cache.
        d_model, heads, head_dim: sizes.
        bias: whether the projections have a bias.
        dropout: probability of dropping an attention weight in training.
        scale: factor of the scores; None for 1 / sqrt(head_dim).

    Source: Vaswani et al., 2017.
    """

    def __init__(
        self,
        layer: int,
        d_model: int,
        heads: int,
        head_dim: int,
        bias: bool,
        dropout: float,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.head_dim, self.dropout, self.scale = layer, head_dim, dropout, scale
        self.query = Linear(d_model, heads * head_dim, bias)
        self.key_value = Linear(d_model, 2 * heads * head_dim, bias)
        self.out = Linear(heads * head_dim, d_model, bias)

    def keys_and_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of an encoder's hidden states (batch, seq, d_model): (batch, heads, seq, head_dim) each."""
        key, value = self.key_value(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).chunk(2, dim=1)
        return key, value

    def remember(self, hidden: Tensor, cache: KeyValueCache, sequences: PackedSequences) -> None:
        """Puts the keys and values of packed hidden states (1, tokens, d_model) into a cache."""
        cache.write_packed(self.layer, *self.keys_and_values(hidden), sequences)

    def forward(self, x: Tensor, memory: Memory | Remembered) -> Tensor:
        """x (batch, seq, d_model), or packed (1, tokens, d_model), to the same."""
        query = self.query(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        out = memory.attend(self, query, self.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).flatten(2))

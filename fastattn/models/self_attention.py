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
from fastattn.nn import Linear
from fastattn.nn.packed_sequences import PackedSequences

from .cache import KeyValueCache


@dataclass(frozen=True)
class Whole:
    """Sequences of one length."""

    causal: bool

    def positions(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], device=x.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        out = ops.attention(query, key, value, dropout_p=dropout_p, is_causal=self.causal, enable_gqa=True)
        return cast(Tensor, out)


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end."""

    causal: bool
    sequences: PackedSequences

    def positions(self, x: Tensor) -> Tensor:
        starts = self.sequences.cu_seqlens
        tokens = torch.arange(x.shape[1], device=x.device)
        lengths = starts.diff()
        return (tokens - starts[:-1].repeat_interleave(lengths, output_size=x.shape[1])).unsqueeze(0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        starts, longest = self.sequences.cu_seqlens, self.sequences.max_seqlen
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        out = ops.attention_varlen(q, k, v, starts, starts, longest, longest, dropout_p, self.causal)
        return cast(Tensor, out).transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class Prompts(Packed):
    """Sequences laid end to end, whose keys and values go into a cache."""

    cache: KeyValueCache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        self.cache.write_packed(layer, key.squeeze(0).transpose(0, 1), value.squeeze(0).transpose(0, 1), self.sequences)
        return super().attend(layer, query, key, value, dropout_p)


@dataclass(frozen=True)
class Continued:
    """New tokens of sequences whose earlier ones are in a cache."""

    cache: KeyValueCache

    def positions(self, x: Tensor) -> Tensor:
        return self.cache.lengths.unsqueeze(1) + torch.arange(x.shape[1], device=x.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        cache = self.cache
        out = ops.attention_with_kvcache(
            query, cache.keys[layer], cache.values[layer], key, value, cache_seqlens=cache.lengths
        )
        return cast(Tensor, out)


Tokens = Whole | Packed | Continued


class SelfAttention(nn.Module):
    """Projection to queries, keys and values in one product, attention, and the projection back.

    The state_dict holds `qkv` ((heads + 2 · kv_heads) · head_dim rows: queries, keys, values, head after head) and `out`.

    Args:
        layer: number of the layer, its place in a cache.
        d_model, heads, kv_heads, head_dim: sizes; heads is a multiple of kv_heads.
        bias: whether the projections have a bias.
        dropout: probability of dropping an attention weight in training.

    Source: Vaswani et al., 2017; grouped queries Ainslie et al., 2023; rotary positions Su et al., 2021.
    """

    def __init__(
        self, layer: int, d_model: int, heads: int, kv_heads: int, head_dim: int, bias: bool, dropout: float
    ) -> None:
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, head_dim, dropout
        self.heads = [heads, kv_heads, kv_heads]
        self.qkv = Linear(d_model, sum(self.heads) * head_dim, bias)
        self.out = Linear(heads * head_dim, d_model, bias)

    def forward(self, x: Tensor, tokens: Tokens, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (batch, seq, d_model) to the same; angles are the cosines and sines of `RotaryEmbedding.cos_sin`."""
        projected = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = projected.split(self.heads, dim=1)
        if angles is not None:
            query, key = ops.rotary_embedding(query, key, *angles)
        out = tokens.attend(self.layer, query, key, value, self.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).flatten(2))

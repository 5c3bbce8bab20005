"""Multi-head attention, a drop-in for `torch.nn.MultiheadAttention`.

q, k, v = split(in_proj(query)), split(in_proj(key)), split(in_proj(value))        heads of head_dim each
out     = out_proj(merge(softmax(q · kᵀ / √head_dim + masks) · v))
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops
from fastattn._watch import ops_of, watched

from . import _checks, masks


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on `fastattn.ops.attention`.

    The constructor, the initialisation, the state_dict, the arguments and the results are torch's. Masks mean what they
    mean in torch.nn: True is masked out, floats are added to the scores. Differences:

    - A query whose every key is masked gets zeros (before out_proj's bias), and zero gradients; torch gives NaN.
    - Boolean masks and is_causal are never expanded to (N · num_heads, L, S) floats.
    - A boolean mask and a floating one may be mixed without a warning.
    - There is no separate inference path with rules of its own: is_causal without attn_mask is an error in every mode,
      and nested tensors are not taken.

    `need_weights=True`, torch's default, has to form the (L, S) weights in plain torch: pass `need_weights=False` where
    the weights are not used.

    Args:
        embed_dim: width of the model, split over the heads.
        num_heads: number of heads; divides embed_dim.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have a bias.
        add_bias_kv: append a learnt key and value to every sequence.
        add_zero_attn: append a key and value of zeros to every sequence.
        kdim, vdim: features of key and value; None for embed_dim.
        batch_first: (N, L, E) instead of (L, N, E).
        device, dtype: of the parameters.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from query to key and value.

        Args:
            query: (L, E) unbatched, (L, N, E), or (N, L, E) where batch_first.
            key: (S, kdim), (S, N, kdim) or (N, S, kdim).
            value: (S, vdim), (S, N, vdim) or (N, S, vdim).
            key_padding_mask: (N, S), or (S) unbatched: bool, True where the key is padding, or floating, added to the
                scores.
            need_weights: also return the attention weights, which is slower and takes memory for them.
            attn_mask: (L, S), or (N · num_heads, L, S): bool, True where attention is forbidden, or floating, added.
            average_attn_weights: return the weights' mean over the heads.
            is_causal: a promise that attn_mask is the causal mask, so that it need not be read. Needs attn_mask.

        Returns:
            The output, in query's layout, and the weights or None: (N, L, S), per head (N, num_heads, L, S), unbatched
            without N. In training the returned weights have gone through dropout.

        Raises:
            AssertionError: ranks, feature sizes or masks that do not fit one another.
            RuntimeError: shapes of masks, dtypes or devices that do not fit; is_causal without attn_mask.
        """
        sizes = self._check(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use "
                "`torch.nn.Transformer.generate_square_subsequent_mask` to create this mask."
            )
        q, k, v = (self._split_heads(x, sizes.batched) for x in self._project(query, key, value))
        appended = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
            appended += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            appended += 1

        # The hint replaces the mask where torch lets it: alone with padding it is still causal, but not with appended
        # keys.
        causal = is_causal and not need_weights and (key_padding_mask is None or appended == 0)
        if attn_mask is not None:
            attn_mask = (
                attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (sizes.batch, self.num_heads))
            )
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(sizes.batch, 1, 1, sizes.key_len)
        mask = masks.merge(None if causal else attn_mask, key_padding_mask, query.dtype)
        if mask is not None and appended:
            mask = F.pad(mask, (0, appended), value=mask.dtype == torch.bool)

        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = attention_with_weights(q, k, v, mask, dropout_p)
            if watched(self):
                ops_of(self).look(q, k, mask, False, None)
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if sizes.batched else weights.squeeze(0)
        else:
            out = cast(Tensor, ops_of(self).attention(q, k, v, mask, dropout_p, causal))
        return self._project_out(self._merge_heads(out, sizes.batched)), weights

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Self-attention over sequences laid end to end, without padding or masks.

        Args:
            x: (total, E), the tokens of all sequences.
            cu_seqlens: (sequences + 1,), int32, where each begins, ending at total.
            max_seqlen: the longest sequence.

        Returns:
            (total, E).

        Raises:
            ValueError: the module has kdim, vdim, add_bias_kv or add_zero_attn.
        """
        if not self._qkv_same_embed_dim or self.bias_k is not None or self.add_zero_attn:
            raise ValueError("packed sequences need a module without kdim, vdim, add_bias_kv and add_zero_attn")
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in self._project(x, x, x))
        dropout_p = self.dropout if self.training else 0.0
        out = ops_of(self).attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p)
        return self._project_out(cast(Tensor, out).flatten(-2))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, E) each; the products of one input are one product."""
        embed_dim, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is None:
            b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
            return (
                ops.linear(query, self.q_proj_weight, b_q),
                ops.linear(key, self.k_proj_weight, b_k),
                ops.linear(value, self.v_proj_weight, b_v),
            )
        if query is key and key is value:
            q, k, v = ops.linear(query, weight, bias).chunk(3, dim=-1)
            return q, k, v
        if key is value:
            w_q, w_kv = weight.split([embed_dim, 2 * embed_dim])
            b_q, b_kv = (None, None) if bias is None else bias.split([embed_dim, 2 * embed_dim])
            k, v = ops.linear(key, w_kv, b_kv).chunk(2, dim=-1)
            return ops.linear(query, w_q, b_q), k, v
        w_q, w_k, w_v = weight.chunk(3)
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        return ops.linear(query, w_q, b_q), ops.linear(key, w_k, b_k), ops.linear(value, w_v, b_v)

    def _project_out(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.out_proj.weight, self.out_proj.bias)

    def _split_heads(self, x: Tensor, batched: bool) -> Tensor:
        """(N, heads, length, head_dim), a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge_heads(self, x: Tensor, batched: bool) -> Tensor:
        """Back to the layout of the inputs: a view, or one copy where the sequence comes first."""
        if not batched:
            return x.squeeze(0).transpose(0, 1).flatten(-2)
        return x.transpose(1, 2).flatten(-2) if self.batch_first else x.permute(2, 0, 1, 3).flatten(-2)

    def _append(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (N, heads, S, head_dim) with the learnt (1, 1, E) as position S."""
        row = bias.to(x.dtype).view(1, self.num_heads, 1, self.head_dim).expand(x.shape[0], -1, -1, -1)
        return torch.cat([x, row], dim=2)

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> masks.Sizes:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if isinstance(x, Tensor) and x.is_nested:
                raise AssertionError(
                    "MultiheadAttention does not take nested tensors; pad them and pass key_padding_mask, or lay them "
                    "end to end and call forward_packed"
                )
            _checks.tensor(name, x)
        if query.dim() not in (2, 3):
            raise AssertionError(
                f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
            )
        batched = query.dim() == 3
        kind = "batched (3-D)" if batched else "unbatched (2-D)"
        if key.dim() != query.dim() or value.dim() != query.dim():
            raise AssertionError(
                f"For {kind} `query`, expected `key` and `value` to be {query.dim()}-D"
                f" but found {key.dim()}-D and {value.dim()}-D tensors respectively"
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key shape {tuple(key.shape)} does not match value shape {tuple(value.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {tuple(key.shape[:-1])} do not match value's {tuple(value.shape[:-1])}"
            )
        for name, x, dim in (("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != dim:
                error = RuntimeError if self._qkv_same_embed_dim else AssertionError
                raise error(f"{name} has {x.shape[-1]} features, shape {tuple(x.shape)}; expected {dim}")
        weight = self.out_proj.weight
        _checks.same_kind("query", query, weight)
        if key is not query:
            _checks.same_kind("key", key, weight)
        if value is not key:
            _checks.same_kind("value", value, weight)

        batch_dim, length_dim = (0, 1) if self.batch_first and batched else (1, 0)
        batch = query.shape[batch_dim] if batched else 1
        if batched and key.shape[batch_dim] != batch:
            raise RuntimeError(f"key has batch size {key.shape[batch_dim]} but query has {batch}; they must be equal")
        sizes = masks.Sizes(batched, batch, query.shape[length_dim], key.shape[length_dim], self.num_heads)
        masks.check(sizes, query, key_padding_mask, attn_mask)
        return sizes


def attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """The attention and its weights (N, heads, L, S), dropout applied, in plain torch. A row with no key has weights 0.

    Arguments as `ops.attention`'s.
    """
    score = (query * math.sqrt(1.0 / query.shape[-1])) @ key.mT
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask
        nothing = (score == -torch.inf).all(dim=-1, keepdim=True)
        weights = torch.softmax(score.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    else:
        weights = torch.softmax(score, dim=-1)
    weights = F.dropout(weights, dropout_p)
    return weights.to(value.dtype) @ value, weights

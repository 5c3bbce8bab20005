"""Additive attention as a module."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import ops
from fastattn.ops import _checks
from fastattn.ops.additive_attention import check_mask

from . import masks


class AdditiveAttention(nn.Module):
    r"""Additive attention: a one-layer network scores each query against each key.

    .. math:: score_{ij} = v^\top \tanh(W_{query} \, query_i + W_{key} \, key_j), \quad
              out = dropout(softmax(score)) \cdot value

    Parameters: `w_query` (hidden_dim, query_dim), `w_key` (hidden_dim, key_dim), initialised by Xavier's uniform rule,
        and `v`
    (hidden_dim,), uniform within ±1/√hidden_dim. As in the paper there is no bias.

    Args:
        query_dim: features of the queries.
        key_dim: features of the keys; None for query_dim.
        hidden_dim: width of the scoring network; None for query_dim.
        dropout: probability of dropping an attention weight in training.
        device, dtype: of the parameters.

    Source: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        key_dim = query_dim if key_dim is None else key_dim
        hidden_dim = query_dim if hidden_dim is None else hidden_dim
        if min(query_dim, key_dim, hidden_dim) <= 0:
            raise ValueError(
                f"query_dim, key_dim and hidden_dim must be greater than 0, got {query_dim}, {key_dim} and {hidden_dim}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is {dropout}; expected a probability between 0 and 1")
        self.dropout = dropout
        self.w_query = nn.Parameter(torch.empty(hidden_dim, query_dim, device=device, dtype=dtype))
        self.w_key = nn.Parameter(torch.empty(hidden_dim, key_dim, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.w_query)
        nn.init.xavier_uniform_(self.w_key)
        bound = 1.0 / math.sqrt(self.v.numel())
        nn.init.uniform_(self.v, -bound, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends from query to key and value. Masks mean what they mean in torch.nn.

        Args:
            query: (…, L, query_dim).
            key: (…, S, key_dim), with query's leading dimensions.
            value: (…, S, value_dim), with query's leading dimensions; None for key.
            key_padding_mask: (…, S): bool, True where the key is padding, or floating, added to the scores.
            attn_mask: broadcastable to (…, L, S): bool, True where attention is forbidden, or floating, added.

        Returns:
            (…, L, value_dim). A query whose every key is masked gets zeros.

        Raises:
            TypeError: wrong or mixed dtypes.
            ValueError: shapes or devices that do not fit.
        """
        _checks.floating("query", query)
        _checks.tensor("key", key)
        if query.ndim < 2 or key.ndim < 2:
            raise ValueError(
                f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; expected (…, L, query_dim) and "
                f"(…, S, key_dim)"
            )
        if attn_mask is not None:
            check_mask("attn_mask", attn_mask, query, (*query.shape[:-1], key.shape[-2]))
        if key_padding_mask is not None:
            check_mask("key_padding_mask", key_padding_mask, query, tuple(key.shape[:-1]))
            if key_padding_mask.shape != key.shape[:-1]:
                raise ValueError(
                    f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; expected {tuple(key.shape[:-1])}"
                )
        padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(-2)
        mask = masks.merge(attn_mask, padding, query.dtype)
        p = self.dropout if self.training else 0.0
        return ops.additive_attention(
            query, key, key if value is None else value, self.w_query, self.w_key, self.v, mask, p
        )

    def extra_repr(self) -> str:
        hidden_dim, query_dim = self.w_query.shape
        return f"query_dim={query_dim}, key_dim={self.w_key.shape[1]}, hidden_dim={hidden_dim}, dropout={self.dropout}"

"""Additive attention (Bahdanau, Cho and Bengio, 2015), the definition.

    s   = v . tanh(w_query . query + w_key . key)               (batch, q, k)
    out = dropout(softmax(s)) . value

A row whose every key is masked gives zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import apply, keep_mask
from .softmax import masked_softmax


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"; the projections are a backward kernel's."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    projected_query = F.linear(query, w_query).unsqueeze(-2)
    projected_key = F.linear(key, w_key).unsqueeze(-3)
    score = (torch.tanh(projected_query + projected_key) @ v).to(accumulate)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        score = score + attn_mask
    elif attn_mask is not None:
        score = score.masked_fill(~attn_mask, -torch.inf)
    weight, _ = masked_softmax(score)
    if seed is not None:
        rows = torch.arange(score.shape[:-1].numel(), device=score.device).reshape(score.shape[:-1])
        weight = apply(weight, keep_mask(seed, rows, score.shape[-1], dropout_p), dropout_p)
    none = query.new_empty(0)
    return weight.to(value.dtype) @ value, none, none

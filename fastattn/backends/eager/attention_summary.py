"""How attention spreads its weights, in a few numbers a query: the definition.

    p          = softmax(s), s as in attention.py, in float32                (batch, heads, q, k)
    entropy    = -sum_j p log p                                              in nats
    max_weight = max_j p;   argmax = the first key of the greatest score
    distance   = sum_j p |i + diagonal - j|                                  in tokens

A query that sees no key: 0, 0, -1, 0. One whose weights are NaN: NaN, NaN, -1, NaN.
"""

import torch
from torch import Tensor

from ..attention_outputs import summary_outputs
from .attention import scores, window
from .softmax import masked_softmax

# Scores at a time, so that memory does not grow with the matrix of them.
_MOST_SCORES = 1 << 19


def forward(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    outputs = summary_outputs(query)
    batch, heads, q_len, _ = query.shape
    k_len = key.shape[2]
    query, key = (x if x.dtype == torch.float64 else x.float() for x in (query, key))
    j = torch.arange(k_len, device=query.device)
    rows = max(1, _MOST_SCORES // max(batch * heads * k_len, 1))
    for first in range(0, q_len, rows):
        part = slice(first, min(first + rows, q_len))
        distance = torch.arange(part.start, part.stop, device=query.device)[:, None] + diagonal - j
        mask = attn_mask if attn_mask is None or attn_mask.shape[2] == 1 else attn_mask[:, :, part]
        allowed = window(distance, window_left, window_right)
        score = scores(query[:, :, part], key, mask, alibi_slopes, allowed, distance, scale, softcap)
        for out, found in zip(outputs, _summary(score, distance), strict=True):
            out[:, :, part] = found
    return outputs


def _summary(score: Tensor, distance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, lse = masked_softmax(score)
    entropy = torch.special.entr(weight).sum(dim=-1)
    mean_distance = (weight * distance.abs()).sum(dim=-1)
    if score.shape[-1] == 0:
        return entropy, entropy, torch.full_like(entropy, -1, dtype=torch.int64), mean_distance
    argmax = score.argmax(dim=-1).masked_fill(~(lse > -torch.inf), -1)  # where lse is NaN, too
    return entropy, weight.amax(dim=-1), argmax, mean_distance

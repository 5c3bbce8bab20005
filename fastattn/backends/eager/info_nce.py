"""The contrastive loss InfoNCE (van den Oord et al., 2018) with in-batch negatives, the definition.

    logits = query . [positive; negatives]^T / temperature      (n, n + m)
    loss   = mean_i -log softmax(logits[i])[i]

and where symmetric (CLIP, Radford et al., 2021) the mean of that and of the same from each positive to all queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    symmetric: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query (n, dim), positive (n, dim), negatives (m, dim), temperature one element; the loss a float32 (float64) scalar."""
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    target = torch.arange(query.shape[0], device=query.device)
    candidates = positive if negatives is None else torch.cat((positive, negatives))
    logits = (query @ candidates.mT).to(accumulate) / temperature.to(accumulate).reshape(())
    loss = F.cross_entropy(logits, target)
    if symmetric:
        loss = (loss + F.cross_entropy(logits[:, : query.shape[0]].mT, target)) / 2
    none = query.new_empty(0)
    return loss, none, none, none, none

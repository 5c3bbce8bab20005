"""Softmax of scores, some of which take no part, the definition.

A key whose score is -inf has weight zero, and its score gradient zero, even in a row that holds NaN. A row of nothing but
-inf ends as zeros in both directions.
"""

import torch
from torch import Tensor


def masked_softmax(score: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, and the logsumexp of each row (-inf where no key takes part), over the last dimension."""
    # By hand, for the sake of those rows. The first masked_fill changes no score: it ends the gradient of those that it fills.
    excluded = score == -torch.inf
    score = score.masked_fill(excluded, -torch.inf)
    if score.shape[-1] == 0:
        top = score.new_zeros((*score.shape[:-1], 1))
    else:
        top = score.detach().amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight = torch.exp(score - top)
    total = weight.sum(dim=-1, keepdim=True)
    none = total == 0.0
    total = total.masked_fill(none, 1.0)
    lse = (top + torch.log(total)).masked_fill(none, -torch.inf).squeeze(-1)
    return (weight / total).masked_fill(excluded, 0.0), lse

"""What additive attention keeps for its backward, without the values: for a backend that fills it, and for fake tensors."""

import torch
from torch import Tensor


def projections(query: Tensor, key: Tensor, w_query: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """The projected queries (batch * q, hidden) and keys (batch * k, hidden) in float32; empty where nothing is kept."""
    if not save:
        return query.new_empty(0), query.new_empty(0)
    hidden = w_query.shape[0]
    rows = (x.shape[0] * x.shape[1] for x in (query, key))
    of_query, of_key = (query.new_empty((count, hidden), dtype=torch.float32) for count in rows)
    return of_query, of_key

"""What attention returns, without the values: for every backend that fills it, and for the registered ops' fake tensors."""

import torch
from torch import Tensor


def attention_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """out (batch, heads, q, value_dim), whose memory is (batch, q, heads, value_dim), and lse (batch, heads, q)."""
    batch, heads, q_len, _ = query.shape
    dim = value.shape[3]
    row = heads * dim
    out = torch.empty_strided(
        (batch, heads, q_len, dim), (q_len * row, dim, row, 1), dtype=query.dtype, device=query.device
    )
    return out, query.new_empty((batch, heads, q_len), dtype=lse_dtype(query))


def packed_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """out (total_q, heads, value_dim) and lse (heads, total_q)."""
    total_q, heads, _ = query.shape
    return query.new_empty((total_q, heads, value.shape[2])), query.new_empty((heads, total_q), dtype=lse_dtype(query))


def lse_dtype(query: Tensor) -> torch.dtype:
    """The sums are taken in float32, and so is lse; float64 has it in float64."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def summary_outputs(query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """entropy, max_weight, argmax (int64) and distance, each (batch, heads, q)."""
    shape, dtype = query.shape[:3], lse_dtype(query)
    entropy, max_weight, distance = (query.new_empty(shape, dtype=dtype) for _ in range(3))
    return entropy, max_weight, query.new_empty(shape, dtype=torch.int64), distance

"""A language model's last layer and its loss, the definition.

    logits = x . weight^T + bias;    logits = softcap * tanh(logits / softcap) where softcap > 0
    loss   = F.cross_entropy(logits, target, class_weight, ignore_index, label_smoothing) + z_loss * lse^2

lse is the logsumexp of a row of logits; the z-loss (PaLM, Chowdhery et al., 2022) skips ignored rows, and its mean is
over the others. Losses in float32 (float64 for float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (…, dim), weight (vocabulary, dim), target (…) int64; the loss, (…) where reduction is "none"."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = F.linear(x, weight, bias).to(accumulate).flatten(0, -2)
    if softcap > 0.0:
        logits = softcap * torch.tanh(logits / softcap)
    flat = target.flatten()
    scale = None if class_weight is None else class_weight.to(accumulate)
    loss = F.cross_entropy(logits, flat, scale, None, ignore_index, None, reduction, label_smoothing)
    if z_loss > 0.0:
        counted = flat != ignore_index
        penalty = z_loss * torch.logsumexp(logits, dim=-1).square()
        penalty = torch.where(counted, penalty, torch.zeros((), dtype=accumulate, device=x.device))
        if reduction == "mean":
            loss = loss + penalty.sum() / counted.sum()
        else:
            loss = loss + (penalty.sum() if reduction == "sum" else penalty)
    none = x.new_empty(0)
    return loss.reshape(target.shape) if reduction == "none" else loss, none, none, none

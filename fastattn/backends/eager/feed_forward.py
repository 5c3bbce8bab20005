"""The position-wise feed-forward network, the definition.

hidden = activation(x . w1^T + b1)                         or, gated (Shazeer, 2020),
hidden = activation(x . w_gate^T) * (x . w1^T + b1)
out    = dropout(hidden) . w2^T + b2
"""

import torch.nn.functional as F
from torch import Tensor

from .activation import ACTIVATIONS
from .dropout import dropout


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    empty = x.new_empty(0)
    pre = F.linear(x, w1, b1)
    if w_gate is None:
        pre_gate, hidden = empty, ACTIVATIONS[activation](pre)
    else:
        pre_gate = F.linear(x, w_gate)
        hidden = ACTIVATIONS[activation](pre_gate) * pre
    out = F.linear(dropout(hidden, seed, dropout_p), w2, b2)
    return (out, pre, pre_gate) if save_pre else (out, empty, empty)

"""A layer of a Transformer's encoder (Vaswani et al., 2017), without dropout, the definition.

norm_first False (BERT):   h = norm1(x + attention(x));   out = norm2(h + w2 . activation(w1 . h))
norm_first True:           h = x + attention(norm1(x));   out = h + w2 . activation(w1 . norm2(h))
attention(x) = w_out . softmax(scale * (w_query . x) . (w_key . x)^T) . (w_value . x), head by head; all with biases
"""

import torch.nn.functional as F
from torch import Tensor

from . import attention, attention_varlen, layer_norm
from .activation import ACTIVATIONS


def forward(
    x: Tensor,
    w_query: Tensor,
    b_query: Tensor | None,
    w_key: Tensor,
    b_key: Tensor | None,
    w_value: Tensor,
    b_value: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: int,
    max_seqlen: int,
    activation: str,
    eps1: float,
    eps2: float,
    scale: float,
    norm_first: bool,
) -> Tensor:
    """x (batch, seq, width), or (1, tokens, width) with cu_seqlens; arguments as in docs/architecture.md."""

    def attend(x: Tensor) -> Tensor:
        query, key, value = (
            F.linear(x, weight, bias).unflatten(-1, (heads, -1))
            for weight, bias in ((w_query, b_query), (w_key, b_key), (w_value, b_value))
        )
        if cu_seqlens is None:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            out = attention.forward(query, key, value, None, None, None, scale, -1, -1, 0, 0.0, 0.0)[0].transpose(1, 2)
        else:
            ends = (cu_seqlens, cu_seqlens, None, None, None, max_seqlen, max_seqlen)
            out = attention_varlen.forward(query[0], key[0], value[0], *ends, scale, -1, -1, 0.0, 0.0)[0].unsqueeze(0)
        return F.linear(out.flatten(-2), w_out, b_out)

    def feed_forward(x: Tensor) -> Tensor:
        return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)

    def norm1(x: Tensor) -> Tensor:
        return layer_norm.forward(x, norm1_weight, norm1_bias, None, None, eps1, 0.0)[0]

    def norm2(x: Tensor) -> Tensor:
        return layer_norm.forward(x, norm2_weight, norm2_bias, None, None, eps2, 0.0)[0]

    if norm_first:
        h = x + attend(norm1(x))
        return h + feed_forward(norm2(h))
    h = norm1(x + attend(x))
    return norm2(h + feed_forward(h))

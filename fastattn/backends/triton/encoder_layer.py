"""A whole encoder layer: the kernels of its parts one after the other.

norm_first False (BERT):   h = norm1(x + attention(x));   out = norm2(h + w2 . activation(w1 . h))
norm_first True:           h = x + attention(norm1(x));   out = h + w2 . activation(w1 . norm2(h))

Biases, the activation and both residual adds are epilogues of the products, so that a layer's passes over memory are those of
the six products, of attention and of two norms. The heads are views of the projections.
"""

from torch import Tensor

from . import _launch, attention, attention_varlen, norm
from .matmul import flat, product


def unsupported(
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
) -> str | None:
    """Why the kernel cannot take this call; None if it can. (The norms may be float32 beside another dtype.)"""
    why = _launch.unsupported(x, w_query, w_key, w_value, w_out, w1, w2) or norm.unsupported(x)
    if why is not None:
        return why
    query = w_query.new_empty((1, heads, 0, w_query.shape[0] // heads))
    return attention.unsupported(query, query, query, None, None, None, scale, -1, -1, 0, 0.0, 0.0)


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
    """Arguments and result as in docs/architecture.md, "Normalised arguments"."""

    def project(tokens: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        out = tokens.new_empty((tokens.shape[0], weight.shape[0]))
        return product(tokens, weight.t(), out, bias=bias, residual=residual)

    def attend(tokens: Tensor) -> Tensor:
        weights = ((w_query, b_query), (w_key, b_key), (w_value, b_value))
        query, key, value = (
            project(tokens, *weight).view(*x.shape[:2], heads, w_query.shape[0] // heads) for weight in weights
        )
        if cu_seqlens is None:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            out = attention.forward(query, key, value, None, None, None, scale, -1, -1, 0, 0.0, 0.0)[0].transpose(1, 2)
        else:
            ends = (cu_seqlens, cu_seqlens, None, None, None, max_seqlen, max_seqlen)
            out = attention_varlen.forward(query[0], key[0], value[0], *ends, scale, -1, -1, 0.0, 0.0)[0]
        return out.reshape(tokens.shape[0], w_out.shape[1])

    def feed_forward(tokens: Tensor, residual: Tensor) -> Tensor:
        hidden = tokens.new_empty((tokens.shape[0], w1.shape[0]))
        product(tokens, w1.t(), hidden, bias=b1, activation=activation)
        return project(hidden, w2, b2, residual)

    def norm1(tokens: Tensor) -> Tensor:
        return norm.forward(tokens, norm1_weight, norm1_bias, None, None, eps1, 0.0, centred=True)[0]

    def norm2(tokens: Tensor) -> Tensor:
        return norm.forward(tokens, norm2_weight, norm2_bias, None, None, eps2, 0.0, centred=True)[0]

    tokens = flat(x)
    if norm_first:
        h = project(attend(norm1(tokens)), w_out, b_out, tokens)
        out = feed_forward(norm2(h), h)
    else:
        h = norm1(project(attend(tokens), w_out, b_out, tokens))
        out = norm2(feed_forward(h, h))
    return out.view(x.shape)

"""The other implementations: plain torch, its fused functions, oneDNN and torch.compile.

The plain-torch functions (`eager_…`) are what a model without fused kernels runs; in float64 they are the definition
that every peer is checked against. They are written independently of fastattn's own eager backend.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

COMPILE = "torch.compile"


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """(batch, heads, q, head_dim) attention with the (q, k) matrix in memory; bool mask, causal from the top left."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """`F.scaled_dot_product_attention` with the arguments of `eager_attention`."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=grouped)


def eager_activation(x: Tensor, activation: str) -> Tensor:
    """One of fastattn's activations in plain torch."""
    functions = {"none": lambda t: t, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    return F.gelu(x, approximate="tanh") if activation == "gelu_tanh" else functions[activation](x)


@functools.cache
def onednn_linear() -> Callable | None:
    """torch's own oneDNN linear with an activation, `f(x, weight, bias, activation, algorithm)`; None without it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return None
    pointwise = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation="none", algorithm="") -> Tensor:
        return pointwise(x, weight, bias, activation, [], algorithm)

    return linear


@functools.cache
def compile_unavailable() -> str | None:
    """Why torch.compile does not work on this machine (it needs a C++ compiler); None if it does."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.zeros(64))
    except Exception as error:  # whatever the compiler stack raises: it is the answer, not a failure
        return str(error).strip().splitlines()[0]
    return None


def compiled(call: Callable) -> Callable:
    """torch.compile for one case: fixed shapes, and none of the earlier cases' compiled code."""
    torch.compiler.reset()
    return torch.compile(call, dynamic=False)

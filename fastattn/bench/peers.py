"""The other implementations: plain torch, its fused functions, oneDNN and torch.compile.

The plain-torch functions (`eager_…`) are what a model without fused kernels runs; in float64 they are the definition
that every peer is checked against. They are written independently of fastattn's own eager backend.
"""

import functools
import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

COMPILE = "torch.compile"


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """(batch, heads, q, head_dim) attention with the (q, k) matrix in memory; bool or additive mask, causal from the top left."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, dim=-1) @ value


def attention_by_head(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """`eager_attention`, one head after another, each computed again for its gradient: where all scores fill no memory."""
    groups = query.shape[1] // key.shape[1]
    batches = []
    for b in range(query.shape[0]):
        of_head = [
            tuple(x[b : b + 1, i : i + 1] for x, i in ((query, h), (key, h // groups), (value, h // groups)))
            for h in range(query.shape[1])
        ]
        batches.append(
            torch.cat([checkpoint(eager_attention, *x, None, causal, use_reentrant=False) for x in of_head], 1)
        )
    return torch.cat(batches)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """`F.scaled_dot_product_attention` with the arguments of `eager_attention`."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=grouped)


# The backends of SDPA that a GPU may have. torch chooses one of them by itself, which the peer "sdpa" is.
SDPA_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}


def sdpa_of(backend: SDPBackend) -> Callable:
    """`sdpa` on one backend, an error where that cannot take the call."""

    def call(*args, **kwargs):
        with sdpa_kernel(backend):
            return sdpa(*args, **kwargs)

    return call


def flash_attn(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """The package flash-attn, where it is installed."""
    function = importlib.import_module("flash_attn").flash_attn_func
    return function(*(x.transpose(1, 2) for x in (query, key, value)), causal=causal).transpose(1, 2)


def flex(query: Tensor, key: Tensor, value: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
    """Causal FlexAttention, compiled; a query sees `window` keys before it, and scores are capped, where those are not 0."""
    score = None if not softcap else lambda s, b, h, q, k: softcap * torch.tanh(s / softcap)
    seq, groups = query.shape[2], query.shape[1] // key.shape[1]
    attend, block_mask = _flex(seq, window, str(query.device))
    return attend(query, key, value, score_mod=score, block_mask=block_mask, enable_gqa=groups > 1)


@functools.cache
def _flex(seq: int, window: int, device: str) -> tuple[Callable, object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b, h, q, k):
        return (q >= k) & (q - k <= window) if window else q >= k

    return torch.compile(flex_attention, dynamic=False), create_block_mask(sees, None, None, seq, seq, device=device)


def liger_norm(name: str) -> Callable:
    """Liger-Kernel's fused norm function of this name, where the package is installed."""
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


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

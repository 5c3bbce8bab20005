"""What the tests of bad input share: a good call of each op and module with every tensor it takes, and wrong tensors."""

import linecache
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import nn

T = torch.randn
B = torch.bool
NAN, INF, HUGE = math.nan, math.inf, 2**70


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def off(*shape: int) -> Tensor:
    """A boolean mask of False."""
    return torch.zeros(shape, dtype=B)


# Every tensor that the op takes, by name, in sizes that differ from one another.
GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "attention": lambda: {
        "query": T(2, 4, 3, 8),
        "key": T(2, 2, 5, 8),
        "value": T(2, 2, 5, 6),
        "attn_mask": T(2, 4, 3, 5),
        "alibi_slopes": torch.rand(4),
        "enable_gqa": True,
    },
    "attention_varlen": lambda: {
        "query": T(5, 4, 8),
        "key": T(7, 2, 8),
        "value": T(7, 2, 6),
        "cu_seqlens_q": ints(0, 2, 5),
        "cu_seqlens_k": ints(0, 3, 7),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
        "attn_mask": T(2, 4, 3, 4),
        "alibi_slopes": torch.rand(2, 4),
    },
    "attention_with_kvcache": lambda: {
        "query": T(2, 4, 2, 8),
        "k_cache": T(2, 2, 6, 8),
        "v_cache": T(2, 2, 6, 7),
        "k": T(2, 2, 2, 8),
        "v": T(2, 2, 2, 7),
        "cache_seqlens": ints(3, 0),
        "alibi_slopes": torch.rand(4),
        "cos": T(2, 2, 6),
        "sin": T(2, 2, 6),
    },
    "attention_summary": lambda: {
        "query": T(2, 4, 3, 8),
        "key": T(2, 2, 5, 8),
        "attn_mask": T(2, 4, 3, 5),
        "alibi_slopes": torch.rand(4),
        "enable_gqa": True,
    },
    "encoder_layer": lambda: {
        "x": T(1, 5, 8),
        **{name: T(12, 8) for name in ("w_query", "w_key", "w_value")},
        **{name: T(12) for name in ("b_query", "b_key", "b_value")},
        "w_out": T(8, 12),
        "w1": T(7, 8),
        "b1": T(7),
        "w2": T(8, 7),
        **{name: T(8) for name in ("b_out", "b2", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")},
        "heads": 3,
        "cu_seqlens": ints(0, 2, 5),
        "max_seqlen": 3,
    },
    "decoder_layer": lambda: {
        "x": T(2, 2, 8),
        "k_cache": T(2, 2, 6, 4),
        "v_cache": T(2, 2, 6, 4),
        "w_qkv": T(32, 8),
        "b_qkv": T(32),
        "w_out": T(8, 16),
        **{name: T(7, 8) for name in ("w1", "w_gate")},
        "b1": T(7),
        "w2": T(8, 7),
        **{name: T(8) for name in ("b_out", "b2", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")},
        "cache_seqlens": ints(3, 0),
        "cos": T(2, 2, 4),
        "sin": T(2, 2, 4),
    },
    "additive_attention": lambda: {
        "query": T(2, 3, 4),
        "key": T(2, 5, 6),
        "value": T(2, 5, 2),
        "w_query": T(7, 4),
        "w_key": T(7, 6),
        "v": T(7),
        "attn_mask": T(2, 3, 5),
    },
    "layer_norm": lambda: {"x": T(3, 6), "weight": T(6), "bias": T(6), "residual": T(3, 6)},
    "rms_norm": lambda: {"x": T(3, 6), "weight": T(6), "residual": T(3, 6)},
    "linear": lambda: {"x": T(3, 4), "weight": T(6, 4), "bias": T(6), "residual": T(3, 6)},
    "feed_forward": lambda: {
        "x": T(3, 4),
        "w1": T(6, 4),
        "b1": T(6),
        "w2": T(5, 6),
        "b2": T(5),
        "w_gate": T(6, 4),
    },
    "rotary_embedding": lambda: {"q": T(2, 4, 5, 8), "k": T(2, 2, 5, 8), "cos": T(2, 5, 6), "sin": T(2, 5, 6)},
    "linear_cross_entropy": lambda: {
        "x": T(3, 4),
        "weight": T(6, 4),
        "target": torch.tensor([0, 5, -100]),
        "bias": T(6),
        "class_weight": torch.rand(6),
    },
    "info_nce": lambda: {
        "query": T(4, 6),
        "positive": T(4, 6),
        "negatives": T(3, 6),
        "temperature": torch.tensor([0.5]),
    },
}


def call(op: str, **changed: Any) -> Any:
    """The good call with some arguments changed."""
    return getattr(fastattn, op)(**{**GOOD[op](), **changed})


class Packed(torch.nn.Module):
    """Calls forward_packed."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **arguments: Any) -> Any:
        return self.module.forward_packed(**arguments)


class Inference(torch.nn.Module):
    """Calls a module for inference, where TransformerEncoder leaves the padding out."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module.eval()

    @torch.no_grad()
    def forward(self, **arguments: Any) -> Any:
        return self.module(**arguments)


# Modules of fastattn.nn, and their arguments.
MODULES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], dict[str, Any]]]] = {
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: {
            "query": T(2, 3, 8),
            "key": T(2, 5, 8),
            "value": T(2, 5, 8),
            "key_padding_mask": off(2, 5),
            "attn_mask": T(4, 3, 5),
            "need_weights": False,
        },
    ),
    "AdditiveAttention": (
        lambda: nn.AdditiveAttention(4, 6, 5),
        lambda: {
            "query": T(2, 3, 4),
            "key": T(2, 5, 6),
            "value": T(2, 5, 7),
            "key_padding_mask": off(2, 5),
            "attn_mask": T(3, 5),
        },
    ),
    "Linear": (lambda: nn.Linear(4, 6), lambda: {"input": T(3, 4), "residual": T(3, 6)}),
    "FeedForward": (lambda: nn.FeedForward(4, 6, gated=True), lambda: {"x": T(3, 4)}),
    "LayerNorm": (lambda: nn.LayerNorm((3, 4)), lambda: {"input": T(2, 3, 4), "residual": T(2, 3, 4)}),
    "RMSNorm": (lambda: nn.RMSNorm(4), lambda: {"x": T(2, 3, 4), "residual": T(2, 3, 4)}),
    "SinusoidalPositionalEncoding": (
        lambda: nn.SinusoidalPositionalEncoding(4, 10),
        lambda: {"x": T(3, 2, 4), "positions": torch.tensor([0, 1, 2])},
    ),
    "LearnedPositionalEncoding": (
        lambda: nn.LearnedPositionalEncoding(4, 10),
        lambda: {"x": T(3, 2, 4), "positions": torch.tensor([0, 1, 9])},
    ),
    "RotaryEmbedding": (
        lambda: nn.RotaryEmbedding(4),
        lambda: {"query": T(2, 2, 3, 4), "key": T(2, 1, 3, 4), "positions": torch.tensor([0, 1, 2])},
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
        lambda: {"src": T(2, 3, 8), "src_mask": off(3, 3), "src_key_padding_mask": off(2, 3)},
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 12, batch_first=True),
        lambda: {
            "tgt": T(2, 3, 8),
            "memory": T(2, 4, 8),
            "tgt_mask": off(3, 3),
            "memory_mask": T(3, 4),
            "tgt_key_padding_mask": off(2, 3),
            "memory_key_padding_mask": off(2, 4),
        },
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1).eval(),
        lambda: {"src": T(2, 3, 8), "mask": off(3, 3), "src_key_padding_mask": off(2, 3)},
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 1),
        lambda: {"tgt": T(2, 3, 8), "memory": T(2, 4, 8), "tgt_mask": off(3, 3), "memory_mask": T(3, 4)},
    ),
    "Transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 12, batch_first=True),
        lambda: {
            "src": T(2, 3, 8),
            "tgt": T(2, 4, 8),
            "src_mask": off(3, 3),
            "tgt_mask": off(4, 4),
            "memory_mask": T(4, 3),
            "src_key_padding_mask": off(2, 3),
            "tgt_key_padding_mask": off(2, 4),
            "memory_key_padding_mask": off(2, 3),
        },
    ),
    "MultiheadAttention packed": (
        lambda: Packed(nn.MultiheadAttention(8, 2)),
        lambda: {"x": T(5, 8), "cu_seqlens": ints(0, 2, 5), "max_seqlen": 3},
    ),
    "TransformerEncoderLayer packed": (
        lambda: Packed(nn.TransformerEncoderLayer(8, 2, 12)),
        lambda: {"src": T(5, 8), "cu_seqlens": ints(0, 2, 5), "max_seqlen": 3},
    ),
    "TransformerEncoder packed": (
        lambda: Inference(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)),
        lambda: {"src": T(2, 3, 8), "src_key_padding_mask": off(2, 3)},
    ),
}


def _longer(dim: int) -> Callable[[Tensor], Tensor]:
    """One more in this dimension."""

    def change(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[dim] += 1
        return torch.zeros(shape, dtype=x.dtype)

    return change


def _nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([x[0], x[0]] if x.ndim > 1 else [x, x], layout=layout)


# Each takes a good tensor and makes a wrong one; IndexError or RuntimeError where that cannot be.
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "none": lambda x: None,
    "text": lambda x: "text",
    "number": lambda x: 1.5,
    "integers": lambda x: x.to(torch.int32 if x.dtype == torch.int64 else torch.int64),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "nested": lambda x: _nested(x, torch.strided),
    "jagged": lambda x: _nested(x, torch.jagged),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "one dimension more": lambda x: x[None],
    "one dimension less": lambda x: x[0],
    "no dimension": lambda x: x.flatten()[0],
    "nine dimensions more": lambda x: x[(None,) * 9],
    **{f"dimension {dim} longer": _longer(dim) for dim in range(4)},
}


def raised_by_fastattn(error: BaseException, *others: str) -> bool:
    """Whether a `raise` in fastattn, or a check in its extension, made this error; not torch, Python or numpy.

    A file of one of the `others`' names counts as fastattn's.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    file = trace.tb_frame.f_code.co_filename
    if "/fastattn/" not in file and not file.endswith(others):
        return False
    line = linecache.getline(file, trace.tb_lineno).strip()
    return line.startswith("raise ") or "_native.C." in line

"""Dimensions of size zero, in every op and module: empty results, zeros, or the documented error."""

from typing import Any

import pytest
import torch
from bad_arguments import MODULES, T, raised_by_fastattn
from samples import leaves, tensors
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.backends import OPS

pytestmark = pytest.mark.kernel

SIZES = {
    "attention": {"batch": 2, "heads": 4, "kv_heads": 2, "q": 3, "k": 5, "head_dim": 8, "value_dim": 6},
    "attention_varlen": {"batch": 2, "heads": 4, "kv_heads": 2, "q": 3, "k": 5, "head_dim": 8, "value_dim": 6},
    "attention_with_kvcache": {
        "batch": 2,
        "heads": 4,
        "kv_heads": 2,
        "q": 3,
        "k": 5,
        "head_dim": 8,
        "value_dim": 6,
        "new": 2,
    },
    "attention_summary": {"batch": 2, "heads": 4, "kv_heads": 2, "q": 3, "k": 5, "head_dim": 8},
    "additive_attention": {"batch": 2, "q": 3, "k": 5, "query_dim": 4, "key_dim": 6, "value_dim": 2, "hidden": 7},
    "layer_norm": {"rows": 3, "dim": 6},
    "rms_norm": {"rows": 3, "dim": 6},
    "linear": {"rows": 3, "inner": 4, "outer": 6},
    "feed_forward": {"rows": 3, "inner": 4, "hidden": 6, "outer": 5},
    "rotary_embedding": {"batch": 2, "heads": 4, "kv_heads": 2, "seq": 5, "head_dim": 8, "rotary_dim": 6},
    "linear_cross_entropy": {"rows": 3, "inner": 4, "vocabulary": 6},
    "info_nce": {"n": 4, "m": 3, "dim": 6},
    "encoder_layer": {"batch": 2, "seq": 3, "width": 4, "inner": 6, "hidden": 5},
    "decoder_layer": {"batch": 2, "new": 2, "width": 4, "kv_heads": 2, "head_dim": 3, "hidden": 5, "capacity": 4},
}
INFERENCE = ("attention_with_kvcache", "attention_summary", "encoder_layer", "decoder_layer")
EMPTY_IS_AN_ERROR = {("attention", "kv_heads"), ("attention", "head_dim")}
EMPTY_IS_AN_ERROR |= {("attention_varlen", "kv_heads"), ("attention_varlen", "head_dim")}
EMPTY_IS_AN_ERROR |= {("attention_summary", "kv_heads"), ("attention_summary", "head_dim")}
EMPTY_IS_AN_ERROR |= {("encoder_layer", "inner")}
EMPTY_IS_AN_ERROR |= {("decoder_layer", "kv_heads"), ("decoder_layer", "head_dim"), ("decoder_layer", "capacity")}
EMPTY_IS_AN_ERROR |= {("attention_with_kvcache", "kv_heads"), ("attention_with_kvcache", "head_dim")}


def sized(op: str, n: dict[str, int]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Arguments of these sizes, floating ones with a gradient, and the shape of the first output."""

    def x(*names: str) -> Tensor:
        return T([n[name] for name in names]).requires_grad_(op not in INFERENCE)

    if op == "attention":
        args = {"query": x("batch", "heads", "q", "head_dim"), "key": x("batch", "kv_heads", "k", "head_dim")}
        args |= {"value": x("batch", "kv_heads", "k", "value_dim"), "enable_gqa": True, "attn_mask": x("q", "k")}
        return args, (n["batch"], n["heads"], n["q"], n["value_dim"])
    if op == "attention_summary":
        args = {"query": x("batch", "heads", "q", "head_dim"), "key": x("batch", "kv_heads", "k", "head_dim")}
        return {**args, "enable_gqa": True, "attn_mask": T(n["q"], n["k"])}, (n["batch"], n["heads"], n["q"])
    if op == "attention_varlen":
        ends = [torch.arange(n["batch"] + 1, dtype=torch.int32) * n[name] for name in ("q", "k")]
        total_q, total_k = n["batch"] * n["q"], n["batch"] * n["k"]
        args = {"query": T(total_q, n["heads"], n["head_dim"]), "key": T(total_k, n["kv_heads"], n["head_dim"])}
        args |= {"value": T(total_k, n["kv_heads"], n["value_dim"])}
        for tensor in args.values():
            tensor.requires_grad_()
        args |= {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "max_seqlen_q": n["q"], "max_seqlen_k": n["k"]}
        return args, (total_q, n["heads"], n["value_dim"])
    if op == "attention_with_kvcache":
        args = {"query": x("batch", "heads", "q", "head_dim"), "k_cache": x("batch", "kv_heads", "k", "head_dim")}
        args |= {"v_cache": x("batch", "kv_heads", "k", "value_dim"), "k": x("batch", "kv_heads", "new", "head_dim")}
        args |= {
            "v": x("batch", "kv_heads", "new", "value_dim"),
            "cache_seqlens": torch.zeros(n["batch"], dtype=torch.int32),
        }
        if n["k"] == 0:
            args |= {"k": None, "v": None}
        return args, (n["batch"], n["heads"], n["q"], n["value_dim"])
    if op == "additive_attention":
        args = {"query": x("batch", "q", "query_dim"), "key": x("batch", "k", "key_dim"), "v": x("hidden")}
        args |= {
            "value": x("batch", "k", "value_dim"),
            "w_query": x("hidden", "query_dim"),
            "w_key": x("hidden", "key_dim"),
        }
        return args, (n["batch"], n["q"], n["value_dim"])
    if op == "encoder_layer":
        args = {name: x("inner", "width") for name in ("w_query", "w_key", "w_value")}
        args |= {"x": x("batch", "seq", "width"), "w_out": x("width", "inner"), "heads": 2}
        args |= {"w1": x("hidden", "width"), "b1": x("hidden"), "w2": x("width", "hidden"), "b2": x("width")}
        absent = ("b_query", "b_key", "b_value", "b_out", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")
        return {**args, **dict.fromkeys(absent)}, (n["batch"], n["seq"], n["width"])
    if op == "decoder_layer":
        inner = n["kv_heads"] * n["head_dim"]
        args = {"x": x("batch", "new", "width"), "w_qkv": T(4 * inner, n["width"]), "w_out": T(n["width"], 2 * inner)}
        args |= {name: x("batch", "kv_heads", "capacity", "head_dim") for name in ("k_cache", "v_cache")}
        args |= {"w1": x("hidden", "width"), "w_gate": x("hidden", "width"), "w2": x("width", "hidden")}
        args["cache_seqlens"] = torch.zeros(n["batch"], dtype=torch.int32)
        absent = ("b_qkv", "b_out", "b1", "b2", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")
        return {**args, **dict.fromkeys(absent)}, (n["batch"], n["new"], n["width"])
    if op in ("layer_norm", "rms_norm"):
        return {"x": x("rows", "dim"), "weight": x("dim"), "residual": x("rows", "dim")}, (n["rows"], n["dim"])
    if op == "linear":
        args = {"x": x("rows", "inner"), "weight": x("outer", "inner"), "bias": x("outer"), "activation": "gelu"}
        return args, (n["rows"], n["outer"])
    if op == "feed_forward":
        args = {"x": x("rows", "inner"), "w1": x("hidden", "inner"), "b1": x("hidden"), "w2": x("outer", "hidden")}
        return {**args, "b2": x("outer"), "w_gate": x("hidden", "inner")}, (n["rows"], n["outer"])
    if op == "rotary_embedding":
        args = {"q": x("batch", "heads", "seq", "head_dim"), "k": x("batch", "kv_heads", "seq", "head_dim")}
        return {**args, "cos": x("seq", "rotary_dim"), "sin": x("seq", "rotary_dim")}, tuple(args["q"].shape)
    if op == "linear_cross_entropy":
        target = torch.full((n["rows"],), n["vocabulary"] - 1 if n["vocabulary"] else -100)
        return {"x": x("rows", "inner"), "weight": x("vocabulary", "inner"), "target": target, "reduction": "none"}, (
            n["rows"],
        )
    return {"query": x("n", "dim"), "positive": x("n", "dim"), "negatives": x("m", "dim"), "symmetric": True}, ()


@pytest.mark.parametrize(("op", "empty"), [(op, name) for op in OPS for name in SIZES[op]])
def test_a_dimension_of_nothing(op: str, empty: str) -> None:
    sizes = {**SIZES[op], empty: 0}
    if empty == "head_dim" and op == "rotary_embedding":
        sizes["rotary_dim"] = 0
    args, shape = sized(op, sizes)
    if (op, empty) in EMPTY_IS_AN_ERROR:
        with pytest.raises(ValueError, match=r"\b0\b") as error:
            getattr(fastattn, op)(**args)
        assert raised_by_fastattn(error.value)
        return
    for backend, reason in fastattn.explain(op, **args).reasons.items():
        if reason is not None:
            continue
        if backend != "eager":
            verify.check(getattr(fastattn, op), backend=backend, **args).raise_if_failed()
        with fastattn.use_backend(backend):
            outputs = tensors(getattr(fastattn, op)(**args))
        assert outputs[0].shape == shape
        if empty in ("k", "q", "batch") or op == "linear":
            assert all(out.isfinite().all() for out in outputs)
        inputs = leaves(args)
        recorded = [out.sum() for out in outputs if out.requires_grad]
        assert bool(recorded) == bool(inputs)
        grads = torch.autograd.grad(recorded, inputs, allow_unused=True) if recorded else []
        assert all(grad is None or grad.shape == x.shape for x, grad in zip(inputs, grads, strict=False))


def test_losses_of_nothing() -> None:
    """As documented: a mean over no row is NaN, a sum 0."""
    empty = {"x": T(0, 4), "weight": T(6, 4), "target": torch.tensor([], dtype=torch.int64)}
    assert fastattn.linear_cross_entropy(**empty).isnan()
    assert fastattn.linear_cross_entropy(**empty, reduction="sum") == 0.0
    ignored = {"x": T(2, 4), "weight": T(6, 4), "target": torch.tensor([-100, -100])}
    assert fastattn.linear_cross_entropy(**ignored).isnan()
    assert fastattn.linear_cross_entropy(**ignored, reduction="sum") == 0.0


# What may be empty in a module's call: the dimensions of its arguments, and that of the output (None where it has none).
Dims = dict[str, int | tuple[int, ...]]
_ENCODER: dict[str, tuple[int | None, Dims]] = {
    "batch": (0, {"src": 0, "src_key_padding_mask": 0}),
    "tokens": (1, {"src": 1, "src_mask": (0, 1), "mask": (0, 1), "src_key_padding_mask": 1}),
}
_DECODER: dict[str, tuple[int | None, Dims]] = {
    "batch": (0, {"tgt": 0, "memory": 0, "tgt_key_padding_mask": 0, "memory_key_padding_mask": 0}),
    "targets": (1, {"tgt": 1, "tgt_mask": (0, 1), "memory_mask": 0, "tgt_key_padding_mask": 1}),
    "memory": (None, {"memory": 1, "memory_mask": 1, "memory_key_padding_mask": 1}),
}
_PACKED: dict[str, tuple[int | None, Dims]] = {"tokens": (0, {"x": 0, "src": 0})}
_ADDED: dict[str, tuple[int | None, Dims]] = {"tokens": (0, {"x": 0, "positions": 0}), "batch": (1, {"x": 1})}
EMPTY: dict[str, dict[str, tuple[int | None, Dims]]] = {
    "MultiheadAttention": {
        "batch": (0, {"query": 0, "key": 0, "value": 0, "key_padding_mask": 0, "attn_mask": 0}),
        "queries": (1, {"query": 1, "attn_mask": 1}),
        "keys": (None, {"key": 1, "value": 1, "key_padding_mask": 1, "attn_mask": 2}),
    },
    "AdditiveAttention": {
        "batch": (0, {"query": 0, "key": 0, "value": 0, "key_padding_mask": 0}),
        "queries": (1, {"query": 1, "attn_mask": 0}),
        "keys": (None, {"key": 1, "value": 1, "key_padding_mask": 1, "attn_mask": 1}),
    },
    "Linear": {"rows": (0, {"input": 0, "residual": 0})},
    "FeedForward": {"rows": (0, {"x": 0})},
    "LayerNorm": {"rows": (0, {"input": 0, "residual": 0})},
    "RMSNorm": {"rows": (0, {"x": 0, "residual": 0}), "columns": (1, {"x": 1, "residual": 1})},
    "SinusoidalPositionalEncoding": _ADDED,
    "LearnedPositionalEncoding": _ADDED,
    "RotaryEmbedding": {
        "batch": (0, {"query": 0, "key": 0}),
        "heads": (1, {"query": 1, "key": 1}),
        "tokens": (2, {"query": 2, "key": 2, "positions": 0}),
    },
    "TransformerEncoderLayer": _ENCODER,
    "TransformerEncoder": _ENCODER,
    "TransformerEncoder packed": _ENCODER,
    "TransformerDecoderLayer": _DECODER,
    "TransformerDecoder": _DECODER,
    "Transformer": {
        "batch": (
            0,
            {"src": 0, "tgt": 0} | {f"{x}_key_padding_mask": 0 for x in ("src", "tgt", "memory")},
        ),
        "sources": (
            None,
            {"src": 1, "src_mask": (0, 1), "memory_mask": 1} | {f"{x}_key_padding_mask": 1 for x in ("src", "memory")},
        ),
        "targets": (1, {"tgt": 1, "tgt_mask": (0, 1), "memory_mask": 0, "tgt_key_padding_mask": 1}),
    },
    "MultiheadAttention packed": _PACKED,
    "TransformerEncoderLayer packed": _PACKED,
}
assert set(EMPTY) == set(MODULES)


@pytest.mark.parametrize(("name", "what"), [(name, what) for name in EMPTY for what in EMPTY[name]])
def test_modules_on_nothing(name: str, what: str) -> None:
    make, good = MODULES[name]
    module = make().eval()
    arguments = good()
    expected = tensors(module(**arguments))[0].shape
    out_dim, dims = EMPTY[name][what]
    for argument in arguments.keys() & dims.keys():
        of = dims[argument]
        for dim in of if isinstance(of, tuple) else (of,):
            arguments[argument] = arguments[argument].narrow(dim, 0, 0)
    if "cu_seqlens" in arguments:
        arguments["cu_seqlens"] = torch.zeros_like(arguments["cu_seqlens"])
    out = tensors(module(**arguments))[0]
    assert out.shape == tuple(0 if dim == out_dim else size for dim, size in enumerate(expected))
    assert out.isfinite().all()

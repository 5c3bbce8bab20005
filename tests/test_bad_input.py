"""Bad input to the ops and modules: each gives the documented error, one of ours, or the documented result; never a crash."""

import contextlib
import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from bad_arguments import GOOD, MODULES, WRONG, B, T, ints, raised_by_fastattn
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import SAMPLES, Sample, leaves, run, substitute, tensors
from torch import Tensor
from torch.utils._pytree import tree_map

import fastattn
from fastattn import verify
from fastattn.backends import BACKENDS, OPS

assert set(GOOD) == set(OPS)


def call(op: str, **changed: Any) -> Any:
    return getattr(fastattn, op)(**{**GOOD[op](), **changed})


# ---- Tensors ---------------------------------------------------------------------------------------------------------

# What is no mistake: the argument is optional, broadcasts, or may have another size or dtype.
ACCEPTED: dict[str, str] = {
    "attention value": "dimension 3 longer",
    "attention attn_mask": "none, bool, one dimension less, no dimension",
    "attention alibi_slopes": "none",
    "attention_varlen value": "dimension 2 longer",
    "attention_varlen attn_mask": "none, bool, one dimension less, no dimension",
    "attention_varlen alibi_slopes": "none, one dimension less",
    "attention_with_kvcache query": "dimension 2 longer",
    "attention_with_kvcache alibi_slopes": "none",
    "additive_attention value": "dimension 2 longer",
    "additive_attention attn_mask": "none, bool, float64, float16, one dimension less, no dimension",
    "layer_norm x": "float64, float16",
    "layer_norm weight": "none",
    "layer_norm bias": "none",
    "layer_norm residual": "none, float64, float16",
    "rms_norm x": "float64, float16",
    "rms_norm weight": "none",
    "rms_norm residual": "none, float64, float16",
    "linear bias": "none",
    "linear residual": "none",
    "feed_forward x": "one dimension more, one dimension less, nine dimensions more, dimension 0 longer",
    "feed_forward b1": "none",
    "feed_forward b2": "none",
    "feed_forward w_gate": "none",
    "rotary_embedding q": "dimension 1 longer",
    "rotary_embedding k": "dimension 1 longer",
    "rotary_embedding cos": "float64, float16",
    "rotary_embedding sin": "float64, float16",
    "linear_cross_entropy bias": "none",
    "linear_cross_entropy class_weight": "none, float64, float16",
    "info_nce negatives": "none, dimension 0 longer",
    "info_nce temperature": "number, float64, float16, one dimension more, one dimension less, no dimension, "
    "nine dimensions more",
    "MultiheadAttention key_padding_mask": "none, integers to bool, float64, float16",
    "MultiheadAttention attn_mask": "none, bool, float64, float16, one dimension less",
    "AdditiveAttention value": "none, dimension 2 longer",
    "AdditiveAttention key_padding_mask": "none, float64, float16",
    "AdditiveAttention attn_mask": "none, bool, float64, float16, one dimension more, one dimension less, no dimension",
    "Linear residual": "none",
    "FeedForward x": "one dimension more, one dimension less, nine dimensions more, dimension 0 longer",
    "LayerNorm input": "float64, float16",
    "LayerNorm residual": "none, float64, float16",
    "RMSNorm x": "float64, float16",
    "RMSNorm residual": "none, float64, float16",
    "SinusoidalPositionalEncoding x": "float64, float16, dimension 1 longer",
    "SinusoidalPositionalEncoding positions": "none, integers",
    "LearnedPositionalEncoding x": "float64, float16, dimension 1 longer",
    "LearnedPositionalEncoding positions": "none, integers",
    "RotaryEmbedding query": "dimension 1 longer",
    "RotaryEmbedding key": "dimension 1 longer",
    "RotaryEmbedding positions": "none, integers",
    "TransformerEncoderLayer src_mask": "none, float64, float16",
    "TransformerEncoderLayer src_key_padding_mask": "none, float64, float16",
    "TransformerDecoderLayer tgt_mask": "none, float64, float16",
    "TransformerDecoderLayer memory_mask": "none, bool, float64, float16",
    "TransformerDecoderLayer tgt_key_padding_mask": "none, float64, float16",
    "TransformerDecoderLayer memory_key_padding_mask": "none, float64, float16",
    "TransformerEncoder mask": "none, float64, float16",
    "TransformerEncoder src_key_padding_mask": "none, float64, float16",
    "TransformerDecoder tgt_mask": "none, float64, float16",
    "TransformerDecoder memory_mask": "none, bool, float64, float16",
}


def wrong_tensors(good: dict[str, Any], owner: str) -> list[tuple[str, str, Any]]:
    """(argument, what is wrong with it, the wrong value) for each tensor of a good call."""
    found = []
    for name, value in good.items():
        accepted = ACCEPTED.get(f"{owner} {name}", "").split(", ")
        for kind, change in WRONG.items():
            if not isinstance(value, Tensor) or kind in accepted:
                continue
            try:
                wrong = change(value.clone())
            except (RuntimeError, IndexError):
                continue  # there is no such form of this tensor
            if not (isinstance(wrong, Tensor) and wrong.dtype == value.dtype and same_form(wrong, value)):
                found.append((name, kind, wrong))
    return found


def same_form(wrong: Tensor, value: Tensor) -> bool:
    dense = wrong.layout == torch.strided and not wrong.is_nested and wrong.device == value.device
    return dense and wrong.shape == value.shape


@pytest.mark.filterwarnings("ignore")  # torch calls sparse rows and nested tensors prototypes
@pytest.mark.parametrize("op", OPS)
def test_a_wrong_tensor_is_an_error_that_names_it(op: str) -> None:
    call(op)
    for name, kind, wrong in wrong_tensors(GOOD[op](), op):
        with pytest.raises((TypeError, ValueError)) as error:
            call(op, **{name: wrong})
        what = f"{op}({name}={kind}): {error.value!r}"
        assert raised_by_fastattn(error.value), what
        # A wrong shape may be blamed on the tensor that it has to fit.
        assert re.search(rf"\b{name}\b", str(error.value)) or "dimension" in kind, what


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_a_wrong_tensor_to_a_module_is_an_error_of_the_module(name: str) -> None:
    make, good = MODULES[name]
    module = make()
    module(**good())
    for argument, kind, wrong in wrong_tensors(good(), name):
        # torch.nn's exceptions: see nn/_checks.py
        with pytest.raises((TypeError, ValueError, AssertionError, RuntimeError)) as error:
            module(**{**good(), argument: wrong})
        assert raised_by_fastattn(error.value), f"{name}({argument}={kind}): {error.value!r}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS)
def test_what_is_accepted_runs(op: str) -> None:
    for name, value in GOOD[op]().items():
        for kind in ACCEPTED.get(f"{op} {name}", "").split(", "):
            if kind:
                assert tensors(call(op, **{name: WRONG[kind](value.clone())})), f"{op}({name}={kind})"


EXPANDED = T(1, 2, 6, 8).expand(2, 2, 6, 8)

# ---- Values, and sizes that do not fit one another -------------------------------------------------------------------

NAN, INF = math.nan, math.inf
HUGE = 2**70
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("attention", {"query": T(2, 4, 3, 7)}, ValueError, "key has head_dim 8 but query has 7"),
    ("attention", {"key": T(2, 2, 6, 8)}, ValueError, "key has shape (2, 2, 6, 8) and value (2, 2, 5, 6)"),
    ("attention", {"key": T(3, 2, 5, 8), "value": T(3, 2, 5, 6)}, ValueError, "key has batch 3 but query has 2"),
    ("attention", {"query": T(2, 3, 3, 8)}, ValueError, "query has 3 heads and key 2"),
    ("attention", {"enable_gqa": False}, ValueError, "pass enable_gqa=True"),
    ("attention", {"query": T(2, 4, 3, 0), "key": T(2, 2, 5, 0)}, ValueError, "head_dim 0"),
    ("attention", {"attn_mask": torch.ones(3, 4, dtype=B)}, ValueError, "does not broadcast to (batch, heads, q, k)"),
    ("attention", {"attn_mask": T(3, 5).double()}, TypeError, "attn_mask has dtype torch.float64"),
    ("attention", {"alibi_slopes": torch.rand(3)}, ValueError, "alibi_slopes has shape (3,)"),
    ("attention", {"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
    ("attention", {"dropout_p": NAN}, ValueError, "dropout_p is nan"),
    ("attention", {"dropout_p": "0.1"}, TypeError, "dropout_p is a str"),
    ("attention", {"dropout_p": T(2)}, TypeError, "dropout_p is a Tensor"),
    ("attention", {"scale": NAN}, ValueError, "scale is nan"),
    ("attention", {"scale": INF}, ValueError, "scale is inf"),
    ("attention", {"scale": 10**400}, ValueError, "expected a finite number"),
    ("attention", {"scale": [1.0]}, TypeError, "scale is a list"),
    ("attention", {"softcap": 0.0}, ValueError, "softcap is 0.0"),
    ("attention", {"softcap": -INF}, ValueError, "softcap is -inf"),
    ("attention", {"softcap": INF}, ValueError, "softcap is inf"),
    ("attention", {"softcap": "2"}, TypeError, "softcap is a str"),
    ("attention", {"window": (-1, 0)}, ValueError, "window is (-1, 0)"),
    ("attention", {"window": (-HUGE, 0)}, ValueError, "each side is a number of keys"),
    ("attention", {"window": (1.0, 0)}, ValueError, "window is (1.0, 0)"),
    ("attention", {"window": 3}, ValueError, "window is 3"),
    ("attention", {"window": (1, 2, 3)}, ValueError, "window is (1, 2, 3)"),
    ("attention", {"is_causal": True, "window": (1, 0)}, ValueError, "aligns to the top left"),
    ("attention_varlen", {"cu_seqlens_q": ints(0, 3, 2)}, ValueError, "cu_seqlens_q runs from 0 to 2; expected 0 to 5"),
    ("attention_varlen", {"cu_seqlens_q": ints(0, 6, 5)}, ValueError, "cu_seqlens_q decreases from 6 to 5"),
    ("attention_varlen", {"cu_seqlens_k": ints(0, 3, 9)}, ValueError, "cu_seqlens_k runs from 0 to 9; expected 0 to 7"),
    ("attention_varlen", {"cu_seqlens_k": ints(-3, 3, 7)}, ValueError, "cu_seqlens_k runs from -3"),
    ("attention_varlen", {"cu_seqlens_k": ints(0, 7)}, ValueError, "holds a sequence of 7 tokens"),
    ("attention_varlen", {"cu_seqlens_k": ints(0, 3, 7, 7)}, ValueError, "2 sequences and cu_seqlens_k 3"),
    ("attention_varlen", {"cu_seqlens_q": ints()}, ValueError, "cu_seqlens_q has shape (0,)"),
    ("attention_varlen", {"max_seqlen_q": 2}, ValueError, "holds a sequence of 3 tokens but max_seqlen_q is 2"),
    ("attention_varlen", {"max_seqlen_k": -1}, ValueError, "max_seqlen_k is -1"),
    ("attention_varlen", {"max_seqlen_k": -HUGE}, ValueError, "raise max_seqlen_k"),
    ("attention_varlen", {"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k is a float; expected an int"),
    ("attention_varlen", {"max_seqlen_q": None}, TypeError, "max_seqlen_q is a NoneType"),
    ("attention_varlen", {"dropout_p": NAN}, ValueError, "dropout_p is nan"),
    ("attention_varlen", {"scale": NAN}, ValueError, "scale is nan"),
    ("attention_with_kvcache", {"cache_seqlens": ints(5, 0)}, ValueError, "runs from 0 to 5 and 2 keys are added"),
    ("attention_with_kvcache", {"cache_seqlens": ints(-1, 0)}, ValueError, "runs from -1 to 0"),
    ("attention_with_kvcache", {"k": None}, ValueError, "one of k and v is given without the other"),
    ("attention_with_kvcache", {"k_cache": EXPANDED}, ValueError, "k_cache"),
    ("attention_with_kvcache", {"query": T(3, 4, 2, 8)}, ValueError, "k_cache has batch 2 but query has 3"),
    (
        "attention_with_kvcache",
        {"block_table": ints(0, 1)},
        ValueError,
        "block_table has dtype torch.int32 and shape (2,)",
    ),
    (
        "attention_with_kvcache",
        {"block_table": torch.tensor([[0], [1]])},
        ValueError,
        "block_table has dtype torch.int64",
    ),
    (
        "attention_with_kvcache",
        {"block_table": torch.tensor([[0], [2]], dtype=torch.int32)},
        ValueError,
        "block_table names blocks 0 to 2; k_cache has 2",
    ),
    ("attention_with_kvcache", {"query": T(2, 4, 2, 8).requires_grad_()}, RuntimeError, "has no gradient"),
    ("attention_with_kvcache", {"scale": -INF}, ValueError, "scale is -inf"),
    ("layer_norm", {"eps": NAN}, ValueError, "eps is nan"),
    ("layer_norm", {"eps": -1.0}, ValueError, "eps is -1.0"),
    ("layer_norm", {"eps": INF}, ValueError, "eps is inf"),
    ("layer_norm", {"eps": "1e-5"}, TypeError, "eps is a str"),
    ("layer_norm", {"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    ("rms_norm", {"eps": -1.0}, ValueError, "eps is -1.0"),
    ("rms_norm", {"eps": NAN}, ValueError, "eps is nan"),
    ("rms_norm", {"dropout_p": INF}, ValueError, "dropout_p is inf"),
    ("linear", {"weight": T(6, 5)}, ValueError, "x has 4 features but weight has shape (6, 5)"),
    ("linear", {"residual": T(3, 5)}, ValueError, "residual has shape (3, 5); expected (3, 6)"),
    ("linear", {"residual": T(6)}, ValueError, "residual has shape (6,)"),
    ("linear", {"activation": "tanh"}, ValueError, "activation is 'tanh'; expected None or one of 'relu'"),
    ("linear", {"activation": ["relu"]}, ValueError, "activation is ['relu']"),
    ("linear", {"activation": torch.relu}, ValueError, "activation is <"),
    ("feed_forward", {"w2": T(5, 7)}, ValueError, "w2 has shape (5, 7); expected (d_out, 6)"),
    ("feed_forward", {"w_gate": T(7, 4)}, ValueError, "w_gate has shape (7, 4) but w1 has (6, 4)"),
    ("feed_forward", {"dropout_p": NAN}, ValueError, "dropout_p is nan"),
    ("feed_forward", {"activation": 3}, ValueError, "activation is 3"),
    ("linear_cross_entropy", {"z_loss": NAN}, ValueError, "z_loss is nan"),
    ("linear_cross_entropy", {"z_loss": -0.1}, ValueError, "z_loss is -0.1"),
    ("linear_cross_entropy", {"ignore_index": HUGE}, ValueError, "expected an int64"),
    ("linear_cross_entropy", {"ignore_index": 1.0}, TypeError, "ignore_index is a float"),
    ("linear_cross_entropy", {"label_smoothing": NAN}, ValueError, "label_smoothing is nan"),
    ("linear_cross_entropy", {"reduction": None}, ValueError, "reduction is None"),
    ("info_nce", {"temperature": NAN}, ValueError, "temperature is nan"),
    ("info_nce", {"temperature": INF}, ValueError, "temperature is inf"),
    ("info_nce", {"temperature": "cold"}, TypeError, "temperature is a str"),
    (
        "rotary_embedding",
        {"cos": T(2, 5, 10), "sin": T(2, 5, 10)},
        ValueError,
        "rotary_dim even and at most head_dim 8",
    ),
    ("additive_attention", {"query": [1.0]}, TypeError, "query is a list"),
    ("additive_attention", {"query": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "query has dtype torch.int64"),
    ("additive_attention", {"key": T(2, 5, 6).double()}, TypeError, "key has dtype torch.float64 but query"),
    ("additive_attention", {"key": T(2, 5, 6, device="meta")}, ValueError, "key is on meta"),
    ("additive_attention", {"query": T(4)}, ValueError, "query has shape"),
    ("additive_attention", {"key": T(3, 5, 6)}, ValueError, "leading dimensions"),
    ("additive_attention", {"value": T(2, 4, 2)}, ValueError, "value has 4"),
    ("additive_attention", {"w_query": T(7, 5)}, ValueError, "w_query has shape"),
    ("additive_attention", {"w_query": T(7)}, ValueError, "w_query has shape"),
    ("additive_attention", {"w_key": T(8, 6)}, ValueError, "w_key has shape"),
    ("additive_attention", {"v": T(8)}, ValueError, "v has shape"),
    ("additive_attention", {"attn_mask": torch.ones(4, 5, dtype=torch.bool)}, ValueError, "does not broadcast"),
    ("additive_attention", {"attn_mask": torch.ones(3, 5, dtype=torch.int32)}, TypeError, "attn_mask has dtype"),
    ("additive_attention", {"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
    ("rotary_embedding", {"q": T(4, 5, 8)}, ValueError, "q has shape"),
    ("rotary_embedding", {"k": T(2, 2, 6, 8)}, ValueError, "only the number of heads may differ"),
    ("rotary_embedding", {"k": T(2, 2, 5, 8).half()}, TypeError, "k has dtype"),
    ("rotary_embedding", {"cos": T(6, 8), "sin": T(6, 8)}, ValueError, "cos has shape"),
    ("rotary_embedding", {"cos": T(5, 7), "sin": T(5, 7)}, ValueError, "rotary_dim even"),
    ("rotary_embedding", {"cos": T(5, 6)}, ValueError, "must be equal"),
    ("rotary_embedding", {"cos": torch.ones(5, 8, dtype=torch.int64)}, TypeError, "cos has dtype"),
    ("linear_cross_entropy", {"x": T(3, 5)}, ValueError, "x has 5 features"),
    ("linear_cross_entropy", {"weight": T(6)}, ValueError, "weight has shape"),
    ("linear_cross_entropy", {"target": torch.tensor([0, 6, 1])}, ValueError, "target holds 6"),
    ("linear_cross_entropy", {"target": torch.tensor([0, -1, 1])}, ValueError, "target holds -1"),
    ("linear_cross_entropy", {"target": torch.tensor([0, 1])}, ValueError, "target has shape"),
    ("linear_cross_entropy", {"target": torch.tensor([0, 1, 2], dtype=torch.int32)}, TypeError, "int64"),
    ("linear_cross_entropy", {"bias": T(5)}, ValueError, "bias has shape"),
    ("linear_cross_entropy", {"class_weight": T(5)}, ValueError, "class_weight has shape"),
    ("linear_cross_entropy", {"reduction": "average"}, ValueError, "reduction is 'average'"),
    ("linear_cross_entropy", {"label_smoothing": -0.1}, ValueError, "label_smoothing"),
    ("linear_cross_entropy", {"softcap": 0.0}, ValueError, "softcap is 0.0"),
    ("info_nce", {"query": T(4)}, ValueError, "query has shape"),
    ("info_nce", {"positive": T(5, 6)}, ValueError, "positive has shape"),
    ("info_nce", {"negatives": T(3, 5)}, ValueError, "negatives has shape"),
    ("info_nce", {"negatives": T(3, 6).bfloat16()}, TypeError, "negatives has dtype"),
    ("info_nce", {"temperature": 0.0}, ValueError, "temperature is 0.0"),
    ("info_nce", {"temperature": T(2)}, ValueError, "temperature has shape"),
    ("info_nce", {"query": T(4, 6).to_sparse()}, TypeError, "layout"),
]


@pytest.mark.parametrize(("op", "changed", "error", "words"), CASES)
def test_a_bad_value_is_a_clear_error(op: str, changed: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)) as caught:
        call(op, **changed)
    assert raised_by_fastattn(caught.value)


def test_extremes_that_are_no_error() -> None:
    plain = GOOD["attention"]()
    args = (plain["query"], plain["key"], plain["value"])
    everything = fastattn.attention(*args, enable_gqa=True)
    for far in (10**6, 2**40, 2**62, 2**63, HUGE):
        assert torch.equal(fastattn.attention(*args, enable_gqa=True, window=(far, far)), everything)
        with fastattn.use_backend("eager"):
            torch.testing.assert_close(fastattn.attention(*args, enable_gqa=True, window=(far, far)), everything)
    torch.manual_seed(3)
    packed = {**GOOD["attention_varlen"](), "attn_mask": None}
    expected = fastattn.attention_varlen(**packed)
    for backend in BACKENDS:
        with fastattn.use_backend(backend):
            for far in (100, 2**40, 2**62, HUGE):
                found = fastattn.attention_varlen(**{**packed, "max_seqlen_q": far, "max_seqlen_k": far})
                torch.testing.assert_close(found, expected)
    # The mask of a max_seqlen beyond all tokens is read by position all the same.
    wide = {"max_seqlen_q": 9, "max_seqlen_k": 11, "attn_mask": T(2, 1, 9, 11)}
    near = {"attn_mask": wide["attn_mask"][:, :, :3, :4]}
    torch.testing.assert_close(
        fastattn.attention_varlen(**{**packed, **wide}), fastattn.attention_varlen(**{**packed, **near})
    )
    assert torch.equal(
        call("attention", scale=0.0, attn_mask=None, key=T(2, 2, 5, 8)).isfinite(), torch.ones(2, 4, 3, 6, dtype=B)
    )
    assert call("linear", activation=None).shape == (3, 6)
    for number in (np.float32(0.25), np.int64(0)):
        assert call("layer_norm", dropout_p=number)[0].shape == (3, 6)


# ---- Nothing: dimensions of size zero --------------------------------------------------------------------------------

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
    "additive_attention": {"batch": 2, "q": 3, "k": 5, "query_dim": 4, "key_dim": 6, "value_dim": 2, "hidden": 7},
    "layer_norm": {"rows": 3, "dim": 6},
    "rms_norm": {"rows": 3, "dim": 6},
    "linear": {"rows": 3, "inner": 4, "outer": 6},
    "feed_forward": {"rows": 3, "inner": 4, "hidden": 6, "outer": 5},
    "rotary_embedding": {"batch": 2, "heads": 4, "kv_heads": 2, "seq": 5, "head_dim": 8, "rotary_dim": 6},
    "linear_cross_entropy": {"rows": 3, "inner": 4, "vocabulary": 6},
    "info_nce": {"n": 4, "m": 3, "dim": 6},
}
EMPTY_IS_AN_ERROR = {("attention", "kv_heads"), ("attention", "head_dim")}
EMPTY_IS_AN_ERROR |= {("attention_varlen", "kv_heads"), ("attention_varlen", "head_dim")}
EMPTY_IS_AN_ERROR |= {("attention_with_kvcache", "kv_heads"), ("attention_with_kvcache", "head_dim")}


def sized(op: str, n: dict[str, int]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Arguments of these sizes, floating ones with a gradient, and the shape of the first output."""

    def x(*names: str) -> Tensor:
        return T([n[name] for name in names]).requires_grad_(op != "attention_with_kvcache")

    if op == "attention":
        args = {"query": x("batch", "heads", "q", "head_dim"), "key": x("batch", "kv_heads", "k", "head_dim")}
        args |= {"value": x("batch", "kv_heads", "k", "value_dim"), "enable_gqa": True, "attn_mask": x("q", "k")}
        return args, (n["batch"], n["heads"], n["q"], n["value_dim"])
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
        recorded = [out.sum() for out in outputs if out.requires_grad]
        inputs = leaves(args)
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


def test_modules_on_nothing() -> None:
    for name, (make, good) in MODULES.items():
        module = make().eval()
        masks = {"key_padding_mask", "attn_mask", "mask"}
        tensor_args = {k: v for k, v in good().items() if isinstance(v, Tensor) and not any(m in k for m in masks)}
        tensor_args.pop("positions", None)
        batch_dim = 1 if "Positional" in name else 0
        empty = {k: v.narrow(batch_dim, 0, 0) for k, v in tensor_args.items()}
        out = tensors(module(**empty))[0]
        expected = tensors(module(**tensor_args))[0]
        assert out.shape == expected.narrow(batch_dim, 0, 0).shape, name


# ---- NaN and infinity ------------------------------------------------------------------------------------------------

# Samples of attention in which a query does not see every key.
PARTIAL = ("causal", "bool-mask", "window", "one-projection", "transposed", "append", "paged")

KERNELS = [
    pytest.param(sample, backend, id=f"{sample}-{backend}")
    for sample in SAMPLES
    for backend in sample.backends()
    if backend != "eager"
]


def widened(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize(("sample", "backend"), KERNELS)
def test_nan_and_infinity_propagate_as_in_eager(sample: Sample, backend: str, special: float) -> None:
    """One in each tensor in turn: outputs hold them as the rule wants it, gradients at the same places.

    (Whether a sum with an infinity ends as NaN or infinite depends on its order.) Left out are keys and values where not every
    query sees every key: zero times NaN is NaN in eager, and a kernel does not look at what it skips.
    """
    partial = "attention" in sample.op and any(word in sample.name for word in PARTIAL)
    for index, x in enumerate(tensors(sample.arguments())):
        if not x.is_floating_point() or (partial and index in (1, 2, 3, 4)):
            continue

        def arguments(index: int = index) -> tuple[tuple, dict]:
            plain = sample.arguments()
            x = tensors(plain)[index]
            wrong = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x.detach())
            wrong[(0,) * x.ndim] = special
            return substitute(plain, [x], [wrong.requires_grad_(x.requires_grad)])

        results = {name: run(sample, name, arguments()) for name in (backend, "eager")}
        wide = tree_map(widened, arguments())
        for fast, eager, reference in zip(
            results[backend][0], results["eager"][0], run(sample, "eager", wide)[0], strict=True
        ):
            comparison = verify.compare(fast, eager, reference)
            assert comparison.passed, f"{special} in tensor {index}: {comparison}"
        for fast, eager in zip(results[backend][1], results["eager"][1], strict=True):
            assert torch.equal(fast.isfinite(), eager.isfinite()), f"{special} in tensor {index}"
            zeroed = (x.masked_fill(~x.isfinite(), 0.0) for x in (fast, eager))
            torch.testing.assert_close(*zeroed, rtol=1e-3, atol=1e-4)


# ---- Nonsense --------------------------------------------------------------------------------------------------------

NONSENSE = [
    None,
    True,
    0,
    1,
    -1,
    3,
    HUGE,
    -HUGE,
    2**31,
    2**63,
    0.0,
    0.5,
    1.0,
    -0.5,
    NAN,
    INF,
    1e-320,
    1e300,
    1j,
    "text",
    "gelu",
]
NONSENSE += [
    [],
    (),
    (1, 2),
    (None, 3),
    (0, HUGE),
    [None, None],
    {},
    torch.float32,
    torch.relu,
    np.float32(0.5),
    np.zeros(3),
]
FLAGS = ("is_causal", "enable_gqa", "return_lse", "interleaved", "symmetric")  # whatever Python takes for true
DTYPES = [
    torch.float32,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.bool,
]


@st.composite
def tensors_of_any_kind(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.sampled_from((0, 1, 2, 3, 4, 5, 6, 8)), max_size=5))
    x = torch.full(shape, 1.0) if draw(st.booleans()) else torch.rand(shape) * 9 - 3
    x = x.to(draw(st.sampled_from(DTYPES)))
    if x.ndim > 1 and draw(st.booleans()):
        x = x.transpose(draw(st.integers(0, x.ndim - 1)), 0)
    return x.requires_grad_(x.is_floating_point() and draw(st.booleans()))


@st.composite
def changes(draw: st.DrawFn, op: str) -> dict[str, Any]:
    """A few arguments of a good call, replaced by anything."""
    good = GOOD[op]()
    names = list(inspect.signature(getattr(fastattn, op)).parameters)
    changed = {}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True)):
        value = good.get(name)
        kinds = [st.sampled_from(NONSENSE), tensors_of_any_kind(), st.sampled_from(list(good.values()))]
        if isinstance(value, Tensor):
            kinds += [st.sampled_from(sorted(WRONG)).map(lambda kind, x=value: made_wrong(x, kind))] * 2
            kinds += [st.just(value.clone().requires_grad_(value.is_floating_point()))]
        changed[name] = draw(st.one_of(kinds) if name not in FLAGS else st.sampled_from((True, False, None, 1, "no")))
    return changed


def made_wrong(x: Tensor, kind: str) -> Any:
    try:
        return WRONG[kind](x.clone())
    except (RuntimeError, IndexError):
        return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS)
@settings(max_examples=200)
@given(data=st.data(), backend=st.sampled_from((*BACKENDS, None)))
def test_nonsense_gives_a_result_or_an_error_of_ours(op: str, data: st.DataObject, backend: str | None) -> None:
    changed = data.draw(changes(op))
    try:
        with fastattn.use_backend(backend) if backend else contextlib.nullcontext():
            outputs = tensors(call(op, **changed))
    except (TypeError, ValueError, RuntimeError) as error:
        if not raised_by_fastattn(error):
            raise
        return
    recorded = [out.sum() for out in outputs if out.requires_grad]
    if recorded:
        torch.autograd.backward(recorded)

"""Numbers, sizes and lengths that make no sense, to every op and module: the documented errors, with what to do."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from bad_arguments import GOOD, HUGE, INF, MODULES, NAN, B, T, call, ints, off, raised_by_fastattn

import fastattn
from fastattn.backends import BACKENDS

pytestmark = pytest.mark.kernel

EXPANDED = T(1, 2, 6, 8).expand(2, 2, 6, 8)
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("attention", {"query": T(2, 4, 3, 7)}, ValueError, "key has head_dim 8 but query has 7"),
    ("attention", {"key": T(2, 2, 6, 8)}, ValueError, "key has shape (2, 2, 6, 8) and value (2, 2, 5, 6)"),
    ("attention", {"key": T(3, 2, 5, 8), "value": T(3, 2, 5, 6)}, ValueError, "key has batch 3 but query has 2"),
    ("attention", {"query": T(2, 3, 3, 8)}, ValueError, "query has 3 heads and key 2"),
    ("attention", {"enable_gqa": False}, ValueError, "pass enable_gqa=True"),
    ("attention", {"query": T(2, 4, 3, 0), "key": T(2, 2, 5, 0)}, ValueError, "head_dim 0"),
    ("attention", {"attn_mask": torch.ones(3, 4, dtype=B)}, ValueError, "does not broadcast to (batch, heads, q, k)"),
    ("attention", {"attn_mask": T(3, 5).double()}, TypeError, "attn_mask has dtype torch.float64"),
    ("attention", {"alibi_slopes": torch.rand(4).requires_grad_()}, ValueError, "pass alibi_slopes.detach()"),
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
    ("attention_with_kvcache", {"cos": T(2, 2, 6).requires_grad_()}, RuntimeError, "has no gradient"),
    ("attention_with_kvcache", {"cos": None}, ValueError, "one of cos and sin is given without the other"),
    ("attention_with_kvcache", {"k": None, "v": None}, ValueError, "cos and sin turn new tokens, and there are none"),
    ("attention_with_kvcache", {"query": T(2, 4, 1, 8)}, ValueError, "cos has shape (2, 2, 6); expected (seq"),
    ("attention_with_kvcache", {"k": T(2, 2, 1, 8), "v": T(2, 2, 1, 7)}, ValueError, "query has 2 tokens and k 1"),
    ("attention_with_kvcache", {"interleaved": torch.ones(2)}, TypeError, "interleaved is a Tensor"),
    ("attention_summary", {"query": T(2, 4, 3, 7)}, ValueError, "key has head_dim 8 but query has 7"),
    ("attention_summary", {"key": T(3, 2, 5, 8)}, ValueError, "key has batch 3 but query has 2"),
    ("attention_summary", {"enable_gqa": False}, ValueError, "pass enable_gqa=True"),
    ("attention_summary", {"scale": NAN}, ValueError, "scale is nan"),
    ("attention_summary", {"softcap": 0.0}, ValueError, "softcap is 0.0"),
    ("attention_summary", {"window": 3}, ValueError, "window is 3"),
    ("attention_summary", {"is_causal": True, "window": (1, 0)}, ValueError, "aligns to the top left"),
    ("encoder_layer", {"heads": 5}, ValueError, "heads is 5; expected a divisor of w_query's first dimension, 12"),
    ("encoder_layer", {"heads": 0}, ValueError, "heads is 0"),
    ("encoder_layer", {"heads": "3"}, TypeError, "heads is a str"),
    ("encoder_layer", {"activation": "tanh"}, ValueError, "activation is 'tanh'"),
    ("encoder_layer", {"eps1": -1.0}, ValueError, "eps1 is -1.0"),
    ("encoder_layer", {"scale": NAN}, ValueError, "scale is nan"),
    ("encoder_layer", {"cu_seqlens": None}, ValueError, "one of cu_seqlens and max_seqlen is given"),
    ("encoder_layer", {"max_seqlen": None}, ValueError, "one of cu_seqlens and max_seqlen is given"),
    ("encoder_layer", {"max_seqlen": 2}, ValueError, "holds a sequence of 3 tokens but max_seqlen is 2"),
    ("encoder_layer", {"cu_seqlens": ints(0, 3, 2)}, ValueError, "cu_seqlens"),
    ("encoder_layer", {"x": T(2, 5, 8)}, ValueError, "x has batch 2 but cu_seqlens says"),
    ("encoder_layer", {"x": T(1, 5, 8).requires_grad_()}, RuntimeError, "has no gradient"),
    ("decoder_layer", {"cache_seqlens": ints(5, 0)}, ValueError, "runs from 0 to 5 and 2 keys are added"),
    ("decoder_layer", {"cos": None}, ValueError, "one of cos and sin is given"),
    ("decoder_layer", {"norm": "batch"}, ValueError, "norm is 'batch'; expected 'layer' or 'rms'"),
    ("decoder_layer", {"norm": np.zeros(3)}, ValueError, "norm is array([0., 0., 0.]); expected 'layer' or 'rms'"),
    ("decoder_layer", {"norm": "rms"}, ValueError, "RMS norm has no bias"),
    ("decoder_layer", {"w_out": T(8, 12)}, ValueError, "w_out has 12 columns; expected heads"),
    ("decoder_layer", {"activation": "tanh"}, ValueError, "activation is 'tanh'"),
    ("decoder_layer", {"eps2": NAN}, ValueError, "eps2 is nan"),
    ("decoder_layer", {"scale": INF}, ValueError, "scale is inf"),
    ("decoder_layer", {"x": T(2, 2, 8).requires_grad_()}, RuntimeError, "has no gradient"),
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
    ("rotary_embedding", {"interleaved": torch.ones(2)}, TypeError, "interleaved is a Tensor"),
    ("attention", {"is_causal": torch.ones(2)}, TypeError, "is_causal is a Tensor"),
    ("attention", {"enable_gqa": torch.ones(2)}, TypeError, "enable_gqa is a Tensor"),
    ("attention", {"return_lse": torch.ones(2)}, TypeError, "return_lse is a Tensor"),
    ("attention_varlen", {"is_causal": torch.ones(2)}, TypeError, "is_causal is a Tensor"),
    ("attention_varlen", {"return_lse": torch.ones(2)}, TypeError, "return_lse is a Tensor"),
    ("attention_with_kvcache", {"is_causal": torch.ones(2)}, TypeError, "is_causal is a Tensor"),
    ("attention_with_kvcache", {"return_lse": torch.ones(2)}, TypeError, "return_lse is a Tensor"),
    ("info_nce", {"symmetric": torch.ones(2)}, TypeError, "symmetric is a Tensor"),
    ("encoder_layer", {"norm_first": torch.ones(2)}, TypeError, "norm_first is a Tensor"),
    ("linear_cross_entropy", {"x": T(3, 5)}, ValueError, "x has 5 features"),
    ("linear_cross_entropy", {"weight": T(6)}, ValueError, "weight has shape"),
    ("linear_cross_entropy", {"target": torch.tensor([0, 6, 1])}, ValueError, "target holds 6"),
    ("linear_cross_entropy", {"target": torch.tensor([0, -1, 1])}, ValueError, "target holds -1"),
    ("linear_cross_entropy", {"target": torch.tensor([0, 1])}, ValueError, "target has shape"),
    ("linear_cross_entropy", {"target": torch.tensor([0, 1, 2], dtype=torch.int32)}, TypeError, "int64"),
    ("linear_cross_entropy", {"bias": T(5)}, ValueError, "bias has shape"),
    ("linear_cross_entropy", {"class_weight": T(5)}, ValueError, "class_weight has shape"),
    ("linear_cross_entropy", {"class_weight": torch.rand(6).requires_grad_()}, ValueError, "class_weight.detach()"),
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


MODULE_CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "MultiheadAttention",
        {"key": T(3, 5, 8), "value": T(3, 5, 8)},
        RuntimeError,
        "key has batch size 3 but query has 2",
    ),
    ("MultiheadAttention", {"query": T(2, 3, 9)}, AssertionError, "embedding dimension of 8, but got 9"),
    ("MultiheadAttention", {"attn_mask": T(3, 4)}, RuntimeError, "is (3, 4), but should be (3, 5)"),
    ("MultiheadAttention", {"attn_mask": T(3, 3, 5)}, RuntimeError, "is (3, 3, 5), but should be (4, 3, 5)"),
    ("MultiheadAttention", {"attn_mask": None, "is_causal": True}, RuntimeError, "Need attn_mask"),
    ("MultiheadAttention", {"query": T(2, 3, 8).long()}, RuntimeError, "convert it with query.float()"),
    ("MultiheadAttention packed", {"cu_seqlens": ints(0, 3, 2)}, ValueError, "cu_seqlens_q runs from 0 to 2"),
    ("MultiheadAttention packed", {"cu_seqlens": ints(0, 6, 5)}, ValueError, "decreases from 6 to 5"),
    ("MultiheadAttention packed", {"max_seqlen": 2}, ValueError, "a sequence of 3 tokens but max_seqlen_q is 2"),
    ("TransformerEncoderLayer packed", {"cu_seqlens": ints(0, 2, 9)}, ValueError, "runs from 0 to 9; expected 0 to 5"),
    ("TransformerEncoderLayer", {"src_mask": off(3, 4)}, RuntimeError, "is (3, 4), but should be (3, 3)"),
    ("TransformerDecoderLayer", {"memory": T(3, 4, 8)}, RuntimeError, "key has batch size 3 but query has 2"),
    ("Transformer", {"src": T(3, 3, 8)}, RuntimeError, "the batch number of src and tgt must be equal"),
    ("AdditiveAttention", {"attn_mask": off(3, 4)}, ValueError, "does not broadcast to (…, q, k) = (2, 3, 5)"),
    ("AdditiveAttention", {"key": T(2, 5, 7)}, ValueError, "w_key has shape (5, 6); expected (5, 7)"),
    ("Linear", {"input": T(3, 5)}, RuntimeError, "input has shape (3, 5)"),
    ("FeedForward", {"x": T(3, 5)}, RuntimeError, "d_model = 4"),
    ("LayerNorm", {"input": T(2, 4, 4), "residual": None}, RuntimeError, "expected input with shape [*, 3, 4]"),
    ("LayerNorm", {"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
    ("RMSNorm", {"residual": T(3, 4)}, RuntimeError, "residual has shape (3, 4) but input has (2, 3, 4)"),
    ("LearnedPositionalEncoding", {"positions": torch.tensor([0, 1, 10])}, ValueError, "positions holds 0 to 10"),
    ("LearnedPositionalEncoding", {"positions": None, "offset": 8}, ValueError, "positions 8 to 10 are asked for"),
    ("LearnedPositionalEncoding", {"positions": None, "offset": -1}, ValueError, "positions -1 to 1 are asked for"),
    ("LearnedPositionalEncoding", {"positions": None, "offset": 0.0}, TypeError, "offset is a float; expected an int"),
    ("RotaryEmbedding", {"positions": None, "offset": -1}, ValueError, "offset is -1; expected zero or more"),
    ("RotaryEmbedding", {"positions": None, "offset": 1.5}, TypeError, "offset is a float; expected an int"),
    ("RotaryEmbedding", {"key": T(2, 1, 4, 4)}, ValueError, "only the number of heads may differ"),
]


@pytest.mark.parametrize(("name", "changed", "error", "words"), MODULE_CASES)
def test_a_bad_value_to_a_module_is_a_clear_error(name: str, changed: dict, error: type[Exception], words: str) -> None:
    make, good = MODULES[name]
    with pytest.raises(error, match=re.escape(words)):
        make()(**{**good(), **changed})


@pytest.mark.parametrize("make", [fastattn.nn.ALiBi, fastattn.nn.RelativePositionBias])
def test_a_bias_of_lengths_that_are_none_is_a_clear_error(make: type) -> None:
    bias = make(2)
    assert bias(0, 3).shape[-2:] == (0, 3)
    assert bias(3, 0).shape[-2:] == (3, 0)
    for lengths, error, words in (
        ((-1,), ValueError, "query_len is -1; expected zero or more"),
        ((2, -3), ValueError, "key_len is -3"),
        ((2.5,), TypeError, "query_len is a float"),
        ((2, "3"), TypeError, "key_len is a str"),
    ):
        with pytest.raises(error, match=words):
            bias(*lengths)


def test_positions_of_every_integer_dtype() -> None:
    for make in (fastattn.nn.LearnedPositionalEncoding, fastattn.nn.SinusoidalPositionalEncoding):
        encoding = make(4, 10)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            found = encoding(torch.zeros(3, 4), positions=torch.tensor([0, 1, 1], dtype=dtype))
            assert torch.equal(found, encoding.weight[[0, 1, 1]])


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
    for backend in [name for name, grid in BACKENDS.items() if "attention_varlen" in grid]:
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
    for three, four in ((np.int64(3), np.int32(4)), (torch.tensor(3), torch.tensor(4))):
        found = fastattn.attention_varlen(**{**packed, "max_seqlen_q": three, "max_seqlen_k": four})
        assert torch.equal(found, fastattn.attention_varlen(**packed))
    near = fastattn.attention(*args, enable_gqa=True, window=(np.int64(1), 2))
    assert torch.equal(near, fastattn.attention(*args, enable_gqa=True, window=(1, 2)))

"""Bad input to the ops and modules: each gives the documented error, one of ours, or the documented result; never a crash.

Here every tensor of every call is replaced by wrong ones, and any arguments by nonsense. Wrong values are in
test_bad_values.py, empty dimensions in test_empty_input.py, NaN and infinity in test_nan.py.
"""

import contextlib
import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from bad_arguments import GOOD, HUGE, INF, MODULES, NAN, WRONG, call, raised_by_fastattn
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import tensors
from torch import Tensor

import fastattn
from fastattn.backends import BACKENDS, OPS

pytestmark = pytest.mark.kernel

assert set(GOOD) == set(OPS)
# ALiBi and RelativePositionBias take no tensors: see test_bad_values.py.
assert {name.split()[0] for name in MODULES} == set(fastattn.nn.__all__) - {"ALiBi", "RelativePositionBias"}

# ---- Tensors ---------------------------------------------------------------------------------------------------------

# What is no mistake: the argument is optional, broadcasts, or may have another size or dtype.
ACCEPTED: dict[str, str] = {
    "attention value": "dimension 3 longer",
    "attention attn_mask": "none, bool, one dimension less, no dimension",
    "attention alibi_slopes": "none",
    "attention_varlen value": "dimension 2 longer",
    "attention_varlen attn_mask": "none, bool, one dimension less, no dimension",
    "attention_varlen alibi_slopes": "none, one dimension less",
    "attention_with_kvcache alibi_slopes": "none",
    "attention_with_kvcache cos": "float64, float16",
    "attention_with_kvcache sin": "float64, float16",
    "attention_summary attn_mask": "none, bool, one dimension less, no dimension",
    "attention_summary alibi_slopes": "none",
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
    "MultiheadAttention key_padding_mask": "none, float64, float16",
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
    "TransformerEncoder packed src_key_padding_mask": "none, float64, float16",
}
for _optional in ("b_query", "b_key", "b_value", "b_out", "b1", "b2", "norm1_weight", "norm1_bias", "norm2_weight"):
    ACCEPTED[f"encoder_layer {_optional}"] = "none"
ACCEPTED["encoder_layer norm2_bias"] = "none"
for _optional in ("b_qkv", "b_out", "b1", "b2", "w_gate", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"):
    ACCEPTED[f"decoder_layer {_optional}"] = "none"
ACCEPTED["decoder_layer cos"] = ACCEPTED["decoder_layer sin"] = "float64, float16"
for _mask in ("src_mask", "tgt_mask", "src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"):
    ACCEPTED[f"Transformer {_mask}"] = "none, float64, float16"
ACCEPTED["Transformer memory_mask"] = "none, bool, float64, float16"
assert {kind for kinds in ACCEPTED.values() for kind in kinds.split(", ")} <= set(WRONG)


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
    # Every tensor may at least be on another device, and be none at all.
    assert {(name, kind) for name, x in good.items() if isinstance(x, Tensor) for kind in ("meta", "list")} <= {
        (name, kind) for name, kind, _ in found
    }
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


# Transformer.forward is torch.nn's own, and so are some of its errors.
TORCHS = {"Transformer": ("torch/nn/modules/transformer.py",)}


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
        what = f"{name}({argument}={kind}): {error.value!r}"
        assert raised_by_fastattn(error.value, *TORCHS.get(name, ())), what


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("owner", [*OPS, *MODULES])
def test_what_is_accepted_runs(owner: str) -> None:
    make, good = MODULES.get(owner, (lambda: getattr(fastattn, owner), GOOD.get(owner)))
    function = make()
    for name, value in good().items():
        for kind in ACCEPTED.get(f"{owner} {name}", "").split(", "):
            if kind:
                arguments = {**good(), name: WRONG[kind](value.clone())}
                assert tensors(function(**arguments)), f"{owner}({name}={kind})"


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
        changed[name] = draw(st.one_of(kinds))
    return changed


def made_wrong(x: Tensor, kind: str) -> Any:
    try:
        return WRONG[kind](x.clone())
    except (RuntimeError, IndexError):
        return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS)
@settings(max_examples=100)
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

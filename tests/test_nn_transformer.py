"""fastattn.nn's Transformer layers and stacks are torch.nn's, option for option."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_reference import MODES, assert_same, assert_same_error, left_aligned, pair, randomise, uniform
from test_nn_attention import attn_mask, key_padding, sequence
from torch import nn

import fastattn
import fastattn.nn as fnn

BOOL = st.booleans()
MASKS = ("none", "bool 2d", "float 3d", "causal bool", "causal float")
PADDINGS = ("none", "bool", "float")
# An odd number keeps torch's layer off its own fast path, which takes floating masks for boolean ones; that path is
# compared in test_encoders_match_torchs, with masks that it reads rightly.
HEADS = 3
ACTIVATIONS = ("relu", "gelu", F.gelu, torch.tanh, nn.GELU(approximate="tanh"), nn.SiLU(), nn.ReLU())

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors"
)


def source(batch: int, length: int, batched: bool, batch_first: bool, dtype: torch.dtype) -> torch.Tensor:
    return sequence(batch, length, 12, batched, batch_first, dtype)


def masks_for(mask: str, padding: str, batch: int, q: int, k: int, batched: bool, dtype: torch.dtype):
    """An attn_mask and a key_padding_mask of torch.nn, and whether a causal hint is true."""
    given_padding = key_padding(padding, batch, k, dtype)
    if given_padding is not None and not batched:
        given_padding = given_padding[0]
    return attn_mask(mask, batch, HEADS, q, k, dtype), given_padding, mask.startswith("causal")


def layers(ours, theirs, dtype, training, **kwargs):
    a, b = pair(ours, theirs, 12, HEADS, 20, 0.0, layer_norm_eps=1e-4, dtype=dtype, **kwargs)
    return a.train(training), b.train(training)


@pytest.fixture(autouse=True)
def _torch_may_mix_masks():
    """torch deprecates masks of two kinds by a warning; ours takes them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched")
        yield


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_encoder_layer_matches_torchs(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    batched, batch_first = data.draw(BOOL), data.draw(BOOL)
    training, grad = data.draw(st.sampled_from(MODES))
    a, b = layers(
        fnn.TransformerEncoderLayer,
        nn.TransformerEncoderLayer,
        dtype,
        training,
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        batch_first=batch_first,
        norm_first=data.draw(BOOL),
        bias=data.draw(BOOL),
    )
    batch, length = data.draw(st.integers(1, 3)) if batched else 1, data.draw(st.integers(1, 7))
    mask, padding, hint = masks_for(
        data.draw(st.sampled_from(MASKS)), data.draw(st.sampled_from(PADDINGS)), batch, length, length, batched, dtype
    )
    src = source(batch, length, batched, batch_first, dtype)
    assert_same(a, b, [src], grad, src_mask=mask, src_key_padding_mask=padding, is_causal=hint and data.draw(BOOL))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_decoder_layer_matches_torchs(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    batched, batch_first = data.draw(BOOL), data.draw(BOOL)
    training, grad = data.draw(st.sampled_from(MODES))
    a, b = layers(
        fnn.TransformerDecoderLayer,
        nn.TransformerDecoderLayer,
        dtype,
        training,
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        batch_first=batch_first,
        norm_first=data.draw(BOOL),
        bias=data.draw(BOOL),
    )
    batch = data.draw(st.integers(1, 3)) if batched else 1
    q, k = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    kinds = st.sampled_from(MASKS), st.sampled_from(PADDINGS)
    tgt_mask, tgt_padding, tgt_hint = masks_for(data.draw(kinds[0]), data.draw(kinds[1]), batch, q, q, batched, dtype)
    memory_mask, memory_padding, memory_hint = masks_for(
        data.draw(kinds[0]), data.draw(kinds[1]), batch, q, k, batched, dtype
    )
    tgt, memory = (source(batch, length, batched, batch_first, dtype) for length in (q, k))
    assert_same(
        a,
        b,
        [tgt, memory],
        grad,
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_padding,
        memory_key_padding_mask=memory_padding,
        tgt_is_causal=tgt_hint and data.draw(BOOL),
        memory_is_causal=memory_hint and data.draw(BOOL),
    )


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("enable_nested_tensor", [False, True])
def test_encoders_match_torchs(norm_first, batch_first, enable_nested_tensor):
    """All masks and modes; where torch computes on nested tensors, the output at the padding is zero in both."""
    torch.manual_seed(0)
    options = {"batch_first": batch_first, "norm_first": norm_first, "dtype": torch.float64}

    def stack(encoder, layer, norm):
        # Four heads: torch leaves padding out for even numbers of heads alone.
        return encoder(
            layer(12, 4, 20, 0.0, **options),
            2,
            norm(12, dtype=torch.float64) if norm_first != batch_first else None,
            enable_nested_tensor,
        )

    def ours():
        return stack(fnn.TransformerEncoder, fnn.TransformerEncoderLayer, fnn.LayerNorm)

    def theirs():
        return stack(nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.LayerNorm)

    a, b = pair(ours, theirs)
    length = 6
    paddings = [None, left_aligned([4, 6, 1], length), torch.rand(3, length) < 0.3]
    paddings[2][:, 0] = False
    paddings.append(torch.zeros(3, length, dtype=torch.float64).masked_fill(paddings[1], -torch.inf))
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    given_masks = [(None, None), (causal, None), (causal, True), (causal, False), (torch.zeros(6, 6).double(), None)]
    src = uniform(*((3, length) if batch_first else (length, 3)), 12, dtype=torch.float64)
    for (training, grad), padding, (mask, hint) in itertools.product(MODES, paddings, given_masks):
        a.train(training)
        b.train(training)
        assert_same(a, b, [src], grad, mask=mask, src_key_padding_mask=padding, is_causal=hint)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_the_whole_transformer_matches_torchs(norm_first, batch_first, bias, batched):
    torch.manual_seed(0)
    dtype = torch.float64
    a, b = pair(
        fnn.Transformer,
        nn.Transformer,
        12,
        3,
        2,
        2,
        20,
        0.0,
        "gelu",
        batch_first=batch_first,
        norm_first=norm_first,
        bias=bias,
        dtype=dtype,
    )
    batch, q, k = 2 if batched else 1, 4, 5
    src, tgt = (source(batch, length, batched, batch_first, dtype) for length in (k, q))
    given = [("none", "bool"), ("causal float", "none"), ("causal float", "bool"), ("bool 2d", "float")]
    for (training, grad), (mask, padding) in itertools.product(MODES, given):
        src_mask, src_padding, _ = masks_for(mask, padding, batch, k, k, batched, dtype)
        tgt_mask, tgt_padding, _ = masks_for(mask, padding, batch, q, q, batched, dtype)
        memory_mask, memory_padding, _ = masks_for("bool 2d", padding, batch, q, k, batched, dtype)
        a.train(training)
        b.train(training)
        assert_same(
            a,
            b,
            [src, tgt],
            grad,
            src_mask=src_mask,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            src_key_padding_mask=src_padding,
            tgt_key_padding_mask=tgt_padding,
            memory_key_padding_mask=memory_padding,
        )


def test_decoders_find_causal_masks():
    """tgt_is_causal=None, True and False agree, whatever form the causal mask has."""
    torch.manual_seed(0)

    def stack(decoder, layer, norm):
        return decoder(layer(12, 3, 20, 0.0, dtype=torch.float64), 2, norm(12, dtype=torch.float64))

    a, b = pair(
        lambda: stack(fnn.TransformerDecoder, fnn.TransformerDecoderLayer, fnn.LayerNorm),
        lambda: stack(nn.TransformerDecoder, nn.TransformerDecoderLayer, nn.LayerNorm),
    )
    tgt, memory = uniform(5, 2, 12, dtype=torch.float64), uniform(6, 2, 12, dtype=torch.float64)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for mask in (later, torch.zeros(5, 5, dtype=torch.float64).masked_fill(later, -torch.inf)):
        for hint in (None, True, False):
            assert_same(a, b, [tgt, memory], tgt_mask=mask, tgt_is_causal=hint)


def test_a_causal_looking_mask_that_trains_keeps_its_gradient():
    encoder = fnn.TransformerEncoder(fnn.TransformerEncoderLayer(12, 3, 20), 1)
    mask = nn.Transformer.generate_square_subsequent_mask(4).requires_grad_()
    encoder(torch.randn(4, 2, 12), mask).square().sum().backward()
    assert float(mask.grad.abs().sum()) > 0


@pytest.mark.parametrize("ours", [fnn.TransformerEncoderLayer, fnn.TransformerDecoderLayer])
def test_layer_constructor_errors_are_torchs(ours):
    theirs = getattr(nn, ours.__name__)
    for args, kwargs in [((10, 3), {}), ((12, 3), {"activation": "silu"}), ((12, 3), {"dropout": 1.5}), ((0, 1), {})]:
        assert_same_error(ours, theirs, *args, **kwargs)


def test_call_errors_are_torchs():
    a, b = pair(fnn.TransformerEncoderLayer, nn.TransformerEncoderLayer, 12, 3, 20)
    src = torch.randn(5, 2, 12)
    for args in [
        (src[..., :8],),
        (src[None],),
        (src[0, 0],),
        (src.double(),),
        (src, torch.zeros(5, 6)),
        (src, torch.zeros(2, 5, 5)),
        (src, torch.zeros(5, 5, dtype=torch.int64)),
        (src, None, torch.zeros(2, 6, dtype=torch.bool)),
        (src, None, torch.zeros(5, 2, dtype=torch.bool)),
        (src, None, None, True),
    ]:
        assert_same_error(a, b, *args)
    a, b = pair(fnn.Transformer, nn.Transformer, 12, 3, 1, 1, 20)
    for args in [
        (src, torch.randn(4, 3, 12)),
        (src, torch.randn(4, 2, 8)),
        (src[..., :8], torch.randn(4, 2, 12)),
        (src, torch.randn(4, 2, 12), torch.zeros(4, 4)),
    ]:
        assert_same_error(a, b, *args)
    a, b = pair(fnn.TransformerDecoderLayer, nn.TransformerDecoderLayer, 12, 3, 20)
    for args in [
        (src, torch.randn(6, 3, 12)),
        (src, torch.randn(6, 2, 8)),
        (src, torch.randn(6, 2, 12), None, torch.zeros(6, 5)),
    ]:
        assert_same_error(a, b, *args)


@pytest.mark.parametrize("ours", [fnn.TransformerEncoderLayer, fnn.TransformerDecoderLayer, fnn.Transformer])
def test_copies_and_saved_modules_answer_alike(ours):
    module = ours(12, 3).eval()
    randomise(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    inputs = [torch.randn(4, 2, 12)] * (1 if ours is fnn.TransformerEncoderLayer else 2)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert type(other) is ours
        assert torch.equal(other(*inputs), module(*inputs))
    assert isinstance(module, getattr(nn, ours.__name__))


def test_modules_are_built_on_the_meta_device_and_in_the_dtype_asked_for():
    a, b = (module.Transformer(12, 3, 1, 1, 20, device="meta", dtype=torch.bfloat16) for module in (fnn, nn))
    for key, value in b.state_dict().items():
        ours = a.state_dict()[key]
        assert (ours.shape, ours.dtype, ours.device) == (value.shape, value.dtype, value.device)


def test_custom_encoders_and_decoders_are_kept():
    class Twice(nn.Module):
        def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
            return src * 2

    a = fnn.Transformer(12, 3, 1, 1, 20, custom_encoder=Twice())
    assert type(a.encoder) is Twice
    assert type(a.decoder) is fnn.TransformerDecoder
    src, tgt = torch.randn(4, 2, 12), torch.randn(3, 2, 12)
    torch.testing.assert_close(a.eval()(src, tgt), a.decoder(tgt, src * 2))


class Adapted(nn.Module):
    """A linear layer with something added, as a low-rank adapter does."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_replaced_and_hooked_parts_are_called():
    """What a user puts in place of a linear layer, a norm or a dropout runs, as in torch."""
    torch.manual_seed(0)

    def change(layer):
        layer.linear1 = Adapted(layer.linear1)
        layer.norm2 = nn.RMSNorm(12, eps=1e-3)
        layer.dropout1 = nn.Identity()
        layer.linear2.register_forward_hook(lambda module, args, out: out * 1.5)
        nn.utils.parametrizations.weight_norm(layer.linear1.base)
        return layer

    for norm_first in (False, True):
        a, b = pair(
            lambda n: change(fnn.TransformerEncoderLayer(12, 3, 20, 0.0, norm_first=n)),
            lambda n: change(nn.TransformerEncoderLayer(12, 3, 20, 0.0, norm_first=n)),
            norm_first,
        )
        assert_same(a, b, [uniform(4, 2, 12, dtype=torch.float32)])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_hooks_on_norms_see_and_change_what_they_do_in_torch(name, norm_first):
    """One input, the sum, and one output; tools that split a norm over processes hook it so."""
    torch.manual_seed(0)
    a, b = pair(getattr(fnn, name), getattr(nn, name), 12, 3, 20, 0.0, norm_first=norm_first)
    for layer in (a, b):
        for norm in (module for key, module in layer.named_children() if key.startswith("norm")):
            norm.register_forward_pre_hook(lambda module, args: args[0] + 1)
            norm.register_forward_hook(lambda module, args, out: out * args[0])
    inputs = [uniform(length, 2, 12, dtype=torch.float32) for length in ((4,) if "Encoder" in name else (4, 5))]
    assert_same(a, b, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_the_numerics_rule_holds_against_torchs(name, norm_first, dtype):
    """At most twice torch's own error against torch's layer in float64, for the output and each parameter's gradient."""
    torch.manual_seed(0)
    a, b = pair(getattr(fnn, name), getattr(nn, name), 64, 4, 128, 0.0, "gelu", norm_first=norm_first, dtype=dtype)
    inputs = [
        torch.randn(length, 3, 64, dtype=dtype) for length in ((33,) if name.endswith("EncoderLayer") else (33, 41))
    ]
    masks = {"src_mask" if name.endswith("EncoderLayer") else "tgt_mask": torch.ones(33, 33, dtype=torch.bool).triu(1)}
    fastattn.verify.check_model(a, b, *inputs, **masks).raise_if_failed()


def test_torchs_transformer_becomes_ours_by_its_classes_alone():
    """No class here has state that torch's has not; the promise that accelerating in place stands on."""
    torch.manual_seed(0)
    model = nn.Transformer(12, 4, 2, 2, 20, 0.0, batch_first=True, norm_first=True, dtype=torch.float64)
    randomise(model)
    expected = copy.deepcopy(model)
    for module in model.modules():
        if type(module) in vars(nn).values() and hasattr(fnn, type(module).__name__):
            module.__class__ = getattr(fnn, type(module).__name__)
    assert type(model.decoder.layers[1].multihead_attn) is fnn.MultiheadAttention
    assert_same(model, expected, [uniform(2, 5, 12, dtype=torch.float64), uniform(2, 4, 12, dtype=torch.float64)])
    fresh = fnn.Transformer(12, 4, 2, 2, 20, 0.0, batch_first=True, norm_first=True, dtype=torch.float64)
    for ours, theirs in zip(fresh.modules(), expected.modules(), strict=True):
        assert vars(ours).keys() - {"dropout"} == vars(theirs).keys() - {"dropout"}

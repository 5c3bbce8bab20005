"""fastattn.nn's encoders and padding: what is packed and what is not, nested tensors, and sequences of nothing else."""

import pytest
import torch
from nn_reference import MODES, assert_same, left_aligned, pair, randomise, run, uniform
from torch import nn

import fastattn.nn as fnn

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors"
)


def test_no_padding_is_computed_at_inference():
    """The layers see the tokens alone, and the result is that of each sequence by itself."""
    torch.manual_seed(0)
    layer = fnn.TransformerEncoderLayer(12, 4, 20, batch_first=True, dtype=torch.float64)
    encoder = fnn.TransformerEncoder(layer, 2).eval()
    randomise(encoder)
    lengths = [5, 0, 7, 1]
    src, padding = torch.randn(4, 7, 12, dtype=torch.float64), left_aligned(lengths, 7)
    seen = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        forward_packed = fnn.TransformerEncoderLayer.forward_packed

        def spy(self, x, *args):
            seen.append(x.shape)
            return forward_packed(self, x, *args)

        patch.setattr(fnn.TransformerEncoderLayer, "forward_packed", spy)
        out = encoder(src, src_key_padding_mask=padding)
        assert seen == [(13, 12)] * 2
        assert (out[padding] == 0).all()
        for i, n in enumerate(lengths):
            if n:
                torch.testing.assert_close(out[i, :n], encoder(src[i : i + 1, :n])[0])


def test_hooks_see_padded_tensors():
    """Whoever watches a layer gets (N, S, E), packed or not."""
    encoder = fnn.TransformerEncoder(fnn.TransformerEncoderLayer(12, 4, 20, batch_first=True), 2).eval()
    shapes = []
    encoder.layers[1].norm1.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    with torch.no_grad():
        encoder(torch.randn(2, 5, 12), src_key_padding_mask=left_aligned([3, 5], 5))
    assert shapes == [(2, 5, 12)]


def test_torchs_encoder_with_our_layers_matches_torchs():
    """torch.nn.TransformerEncoder hands its layers nested tensors; ours pack them."""
    torch.manual_seed(0)

    def stack(layer):
        return nn.TransformerEncoder(layer(12, 4, 20, 0.0, batch_first=True, dtype=torch.float64), 2)

    a, b = pair(lambda: stack(fnn.TransformerEncoderLayer), lambda: stack(nn.TransformerEncoderLayer))
    src = uniform(3, 6, 12, dtype=torch.float64)
    for training, grad in MODES:
        a.train(training)
        b.train(training)
        assert_same(a, b, [src], grad, src_key_padding_mask=left_aligned([4, 6, 1], 6))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_layers_take_nested_tensors(layout):
    torch.manual_seed(0)
    layer = fnn.TransformerEncoderLayer(12, 4, 20, 0.0, batch_first=True, norm_first=True)
    sequences = [torch.randn(n, 12) for n in (3, 1, 6)]
    out = layer(torch.nested.nested_tensor(sequences, layout=layout))
    assert out.is_nested
    assert out.layout is layout
    for x, y in zip(sequences, out.unbind(), strict=True):
        torch.testing.assert_close(y, layer(x[None])[0])
    with pytest.raises(AssertionError, match="NestedTensor"):
        layer(torch.nested.nested_tensor(sequences, layout=layout), src_mask=torch.zeros(6, 6))


def test_our_encoder_with_torchs_layers_is_torchs():
    torch.manual_seed(0)

    def stack(encoder):
        return encoder(nn.TransformerEncoderLayer(12, 4, 20, 0.0, batch_first=True, dtype=torch.float64), 2)

    a, b = pair(lambda: stack(fnn.TransformerEncoder), lambda: stack(nn.TransformerEncoder))
    src = uniform(3, 6, 12, dtype=torch.float64)
    for grad in (False, True):
        assert_same(a.eval(), b.eval(), [src], grad, src_key_padding_mask=left_aligned([4, 6, 1], 6))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_sequences_that_are_all_padding_stay_finite(norm_first, grad):
    """torch answers NaN; ours attends to nothing, in every mode, and no other sequence notices."""
    torch.manual_seed(0)
    layer = fnn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    encoder = fnn.TransformerEncoder(layer, 2).eval()
    src = uniform(2, 4, 12, dtype=torch.float64)
    padding = torch.tensor([[False] * 4, [True] * 4])
    (out,), grads = run(encoder, [src], {"src_key_padding_mask": padding}, grad)
    assert all(torch.isfinite(x).all() for x in (out, *grads))
    torch.testing.assert_close(out[:1], encoder(src[:1]))

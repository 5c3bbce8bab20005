"""TransformerEncoderLayer as one op at inference: as torch.nn's, and only where nobody watches its parts."""

import copy

import pytest
import torch
from torch import nn

import fastattn
from fastattn import ops, verify

PARTS = ("self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2")


@pytest.fixture
def whole_layers(monkeypatch):
    """How many layers have run as one op."""
    calls = []
    fused = ops.encoder_layer
    monkeypatch.setattr(ops, "encoder_layer", lambda *args, **kwargs: (calls.append(1), fused(*args, **kwargs))[1])
    return calls


def pair(**options):
    """Ours and torch.nn's with equal, random weights, in eval mode."""
    torch.manual_seed(0)
    options = {"dropout": 0.1, "batch_first": True, **options}
    theirs = nn.TransformerEncoderLayer(32, 4, 48, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = fastattn.nn.TransformerEncoderLayer(32, 4, 48, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_as_torchs(dtype, norm_first, activation, bias, whole_layers):
    ours, theirs = pair(norm_first=norm_first, activation=activation, bias=bias)
    theirs.to(dtype)
    x = torch.randn(3, 7, 32).to(dtype)
    with torch.no_grad():
        found, eager = ours.to(dtype)(x), theirs(x)
        reference = copy.deepcopy(theirs).double()(x.double())
    comparison = verify.compare(found, eager, reference)
    assert comparison.passed, comparison
    assert len(whole_layers) == 1


def test_packed(whole_layers):
    ours, theirs = pair()
    lengths = [3, 0, 5]
    x, ends = torch.randn(8, 32), torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    with torch.no_grad():
        found = ours.forward_packed(x, ends, 5)
        expected = torch.cat([theirs(part[None])[0] for part in x.split(lengths) if len(part)])
    torch.testing.assert_close(found, expected)
    assert len(whole_layers) == 1


@pytest.mark.parametrize("path", PARTS)
def test_a_part_that_is_hooked_is_called(path, whole_layers):
    ours, theirs = pair()
    seen = []
    ours.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    assert seen
    assert not whole_layers


def test_where_it_runs_in_parts(whole_layers):
    ours, _ = pair()
    x = torch.randn(2, 5, 32)
    ours(x)  # recorded
    with torch.no_grad():
        ours(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
        ours(x[0])
        torch.vmap(ours)(x[None])
        with torch.autocast("cpu", torch.bfloat16):
            ours(x)
        ours.train()(x)  # drops
        pair(batch_first=False)[0](x)
    assert not whole_layers


def test_never_with_old_weights(whole_layers):
    ours, theirs = pair()
    x = torch.randn(2, 5, 32)
    for name, parameter in theirs.named_parameters():
        for module in (ours, theirs):
            torch.manual_seed(1)
            module.get_parameter(name).data += torch.randn(parameter.shape)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    assert len(whole_layers) == len(list(theirs.parameters()))

"""What a user puts into a module, or overrides in it, runs: a fused op looks only through parts that it knows."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastattn.nn as fnn
from fastattn.nn import masks


class Doubled(nn.Linear):
    """As an adapter would be: a linear layer that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("part", ["linear1", "linear2", "linear_gate"])
def test_feed_forward_runs_a_part_that_was_replaced(part: str, activation: str, gated: bool) -> None:
    network = fnn.FeedForward(4, 6, activation, gated)
    linear = getattr(network, part)
    if linear is None:
        return
    doubled = Doubled(linear.in_features, linear.out_features, linear.bias is not None)
    doubled.load_state_dict(linear.state_dict())
    setattr(network, part, doubled)
    x = torch.randn(3, 4)
    found = network(x)
    setattr(network, part, linear)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(found, network(x))


def test_feed_forward_calls_hooks_on_its_parts() -> None:
    network = fnn.FeedForward(4, 6, dropout=0.5)
    seen: list[nn.Module] = []
    parts = [network.linear1, network.dropout, network.linear2]
    for part in parts:
        part.register_forward_hook(lambda module, *_: seen.append(module))
    network(torch.randn(3, 4))
    assert seen == parts


def test_feed_forward_reads_a_pruned_weight_anew() -> None:
    network = fnn.FeedForward(4, 6)
    prune.random_unstructured(network.linear1, "weight", amount=0.5)
    with torch.no_grad():
        network.linear1.weight_orig.zero_()
        network.linear1.bias.zero_()
    x = torch.randn(3, 4)
    torch.testing.assert_close(network(x), network.linear2.bias.expand(3, 4))


def test_feed_forward_drops_in_its_dropouts_own_mode() -> None:
    network = fnn.FeedForward(4, 64, dropout=0.9)
    x = torch.randn(3, 4)
    assert not torch.equal(network(x), network(x))
    network.dropout.eval()
    assert torch.equal(network(x), network(x))


class Sevens(fnn.TransformerEncoderLayer):
    def forward(self, src: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return torch.full_like(src, 7.0)


class Zeros(fnn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return torch.zeros_like(out), weights


def sevens() -> nn.Module:
    return Sevens(8, 2, 12, batch_first=True)


def zeros() -> nn.Module:
    layer = fnn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    layer.self_attn = Zeros(8, 2, batch_first=True)
    return layer


def torchs() -> nn.Module:
    layer = fnn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    layer.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)
    return layer


@pytest.mark.parametrize("make", [sevens, zeros, torchs])
def test_an_encoder_packs_no_layer_whose_forward_is_its_own(make) -> None:
    """Packed sequences go past forward, where padding is left out at inference."""
    encoder = fnn.TransformerEncoder(make(), 1, enable_nested_tensor=True).eval()
    encoder.use_nested_tensor = True  # whatever torch thinks of the layer
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False] * 3, [False, False, True]])
    with torch.no_grad():
        found = encoder(x, src_key_padding_mask=padding)
        expected = encoder.layers[0](x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])


def test_an_encoder_under_vmap_reads_no_masks() -> None:
    encoder = fnn.TransformerEncoder(fnn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1).eval()
    x, padding = torch.randn(4, 2, 3, 8), torch.zeros(4, 2, 3, dtype=torch.bool)
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1).expand(4, 3, 3)
    padding[1:3, 1, 2] = True
    with torch.no_grad():
        padded = torch.func.vmap(lambda x, padding: encoder(x, src_key_padding_mask=padding))(x, padding)
        masked = torch.func.vmap(encoder)(x, causal)
        for i in range(4):
            one = encoder(x[i], src_key_padding_mask=padding[i])
            torch.testing.assert_close(padded[i][~padding[i]], one[~padding[i]])
            torch.testing.assert_close(masked[i], encoder(x[i], causal[i]))


def test_masks_of_other_floating_dtypes_are_converted() -> None:
    attention = fnn.MultiheadAttention(8, 2, batch_first=True)
    x, mask = torch.randn(2, 3, 8), torch.randn(3, 3).half()
    expected = attention(x, x, x, attn_mask=mask.float(), need_weights=False)[0]
    for dtype in (torch.float16, torch.float64):
        found = attention(x, x, x, attn_mask=mask.to(dtype), need_weights=False)[0]
        torch.testing.assert_close(found, expected)
    padding = torch.tensor([[False, True, False]] * 2)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        merged = masks.merge(mask, padding[:, None], dtype)
        assert merged is not None
        assert merged.dtype == torch.promote_types(dtype, torch.float32)

"""fastattn.nn's Transformer in training: dropout, gradients of each sample, autocast, and compiled."""

import pytest
import torch
from nn_reference import TOLERANCE, assert_close_group, assert_same, left_aligned, pair, randomise, run, uniform
from torch import nn

import fastattn.nn as fnn

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors"
)


@pytest.mark.parametrize("part", ["dropout", "dropout1", "dropout2", "self_attn"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_each_dropout_sits_where_torchs_does(part, norm_first):
    """With one dropout at 1 and the others at 0 the result is deterministic and torch's, and says what is dropped."""
    torch.manual_seed(0)
    a, b = pair(
        fnn.TransformerEncoderLayer,
        nn.TransformerEncoderLayer,
        12,
        3,
        20,
        0.0,
        norm_first=norm_first,
        dtype=torch.float64,
    )
    for layer in (a, b):
        module = getattr(layer, part)
        setattr(module, "dropout" if part == "self_attn" else "p", 1.0)
    assert_same(a, b, [uniform(4, 2, 12, dtype=torch.float64)])


@pytest.mark.parametrize("part", ["dropout", "dropout1", "dropout2", "dropout3", "self_attn", "multihead_attn"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_each_dropout_of_a_decoder_sits_where_torchs_does(part, norm_first):
    torch.manual_seed(0)
    a, b = pair(
        fnn.TransformerDecoderLayer,
        nn.TransformerDecoderLayer,
        12,
        3,
        20,
        0.0,
        norm_first=norm_first,
        dtype=torch.float64,
    )
    for layer in (a, b):
        module = getattr(layer, part)
        setattr(module, "dropout" if part.endswith("attn") else "p", 1.0)
    assert_same(a, b, [uniform(4, 2, 12, dtype=torch.float64), uniform(5, 2, 12, dtype=torch.float64)])


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_has_torchs_mean_and_spread(norm_first):
    """Mean and variance over many draws, against torch's over as many, within five standard errors."""
    torch.manual_seed(0)
    draws = 4000
    a, b = pair(
        fnn.TransformerEncoderLayer,
        nn.TransformerEncoderLayer,
        4,
        2,
        8,
        0.3,
        norm_first=norm_first,
        batch_first=True,
        dtype=torch.float64,
    )
    src = torch.randn(1, 3, 4, dtype=torch.float64).expand(draws, 3, 4)
    with torch.no_grad():
        x, y = a(src), b(src)
    error = ((x.var(dim=0) + y.var(dim=0)) / draws).sqrt()
    assert float(((x.mean(dim=0) - y.mean(dim=0)).abs() / error).max()) < 5
    square_x, square_y = (x - x.mean(dim=0)) ** 2, (y - y.mean(dim=0)) ** 2
    error = ((square_x.var(dim=0) + square_y.var(dim=0)) / draws).sqrt()
    assert float(((square_x.mean(dim=0) - square_y.mean(dim=0)).abs() / error).max()) < 5


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("ours", [fnn.TransformerEncoderLayer, fnn.TransformerDecoderLayer])
def test_gradients_under_dropout(ours, norm_first):
    torch.manual_seed(0)
    layer = ours(4, 2, 6, 0.3, "gelu", norm_first=norm_first, dtype=torch.float64)
    randomise(layer)
    inputs = [uniform(3, 1, 4, dtype=torch.float64)]
    if ours is fnn.TransformerDecoderLayer:
        inputs.append(uniform(2, 1, 4, dtype=torch.float64))

    def function(*args):
        torch.manual_seed(11)
        return torch.func.functional_call(layer, {"linear1.weight": args[-1]}, args[:-1])

    assert torch.autograd.gradcheck(function, (*inputs, layer.linear1.weight.detach().clone().requires_grad_()))


def test_gradients_of_each_sample():
    """torch.func's vmap of grad, which an in-place write or a data-dependent branch would break."""
    torch.manual_seed(0)
    layer = fnn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    samples = torch.randn(3, 1, 5, 12, dtype=torch.float64)

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        layer.zero_grad()
        layer(sample).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad)


@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast_trains_as_torchs(norm_first):
    torch.manual_seed(0)
    a, b = pair(fnn.TransformerEncoderLayer, nn.TransformerEncoderLayer, 32, 4, 64, 0.0, norm_first=norm_first)
    src = torch.randn(7, 3, 32)
    results = []
    for layer in (a, b):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(src)
        out.float().square().sum().backward()
        results.append((out, [p.grad for p in layer.parameters()]))
    (x, grads), (y, expected) = results
    assert x.dtype == y.dtype
    torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)
    for layer in (a, b):
        layer.zero_grad(set_to_none=True)
    b(src).square().sum().backward()
    exact = [p.grad for p in b.parameters()]
    scale = max(float(g.abs().max()) for g in exact)
    for g, e, truth in zip(grads, expected, exact, strict=True):
        assert g.dtype == e.dtype == torch.float32
        assert float((g - truth).abs().max()) <= 2 * float((e - truth).abs().max()) + 0.03 * scale


@pytest.mark.parametrize("norm_first", [False, True])
def test_one_graph_compiles_forward_and_backward(norm_first):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = fnn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    randomise(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    src = uniform(2, 6, 16, dtype=torch.float32)
    kwargs = {
        "src_mask": torch.ones(6, 6, dtype=torch.bool).triu(1),
        "src_key_padding_mask": left_aligned([4, 6], 6),
        "is_causal": True,
    }
    compiled.parameters = layer.parameters
    out, grads = run(compiled, [src], kwargs, True)
    expected, expected_grads = run(layer, [src], kwargs, True)
    assert_close_group(out, expected, TOLERANCE[torch.float32])
    assert_close_group(grads, expected_grads, TOLERANCE[torch.float32])


def test_stacks_compile_as_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = fnn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=True).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    src, tgt = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    kwargs = {
        "tgt_mask": model.generate_square_subsequent_mask(5),
        "src_key_padding_mask": left_aligned([4, 6], 6),
        "memory_key_padding_mask": left_aligned([4, 6], 6),
    }
    torch.testing.assert_close(compiled(src, tgt, **kwargs), model(src, tgt, **kwargs))

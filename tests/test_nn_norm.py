"""fastattn.nn.LayerNorm, RMSNorm, Linear and FeedForward: torch.nn's, and the fused parts by their formulas."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_reference import TOLERANCE, assert_close_group, assert_same, assert_same_error, pair, randomise, run, uniform
from torch import nn

import fastattn.nn as fnn

BOOL = st.booleans()
DTYPES = [torch.float64, torch.float32]
NORMS = [(fnn.LayerNorm, nn.LayerNorm), (fnn.RMSNorm, nn.RMSNorm)]
ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_norm_matches_torchs(data):
    """Any construction, rank and stride; the residual by adding it before torch's norm."""
    ours, theirs = data.draw(st.sampled_from(NORMS))
    dtype = data.draw(st.sampled_from(DTYPES))
    lead = data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=3))
    # Over one or two elements 1 / sqrt(variance + eps) blows float32's rounding up.
    smallest = 1 if dtype == torch.float64 else 4
    shape = data.draw(st.lists(st.integers(smallest, 6), min_size=1, max_size=3))
    kwargs = {"elementwise_affine": data.draw(BOOL), "dtype": dtype, "eps": data.draw(st.sampled_from([1e-5, 1e-2]))}
    if ours is fnn.LayerNorm:
        kwargs["bias"] = data.draw(BOOL)
    elif data.draw(BOOL):
        del kwargs["eps"]
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    a, b = pair(ours, theirs, shape[0] if len(shape) == 1 and data.draw(BOOL) else shape, **kwargs)
    x = uniform(*lead, *shape, dtype=dtype)
    residual = uniform(*lead, *shape, dtype=dtype)
    if data.draw(BOOL) and x.dim() > 1:
        x = x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    assert_same(a, b, [x])

    def reference(x, residual):
        return b(x + residual), x + residual

    reference.parameters = b.parameters
    out, grads = run(a, (x, residual), {}, grad=True)
    expected, expected_grads = run(reference, (x, residual), {}, grad=True)
    assert_close_group(out, expected, TOLERANCE[dtype])
    assert_close_group(grads, expected_grads, TOLERANCE[dtype])


@pytest.mark.parametrize(("ours", "theirs"), NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_norms_match_torchs(ours, theirs, dtype):
    torch.manual_seed(0)
    a, b = pair(ours, theirs, 24, dtype=dtype)
    x = torch.randn(5, 24, dtype=dtype)
    torch.testing.assert_close(a(x), b(x))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("ours", "theirs"), NORMS)
def test_norm_errors_are_torchs(ours, theirs):
    a, b = pair(ours, theirs, [3, 4])
    for x in (torch.randn(4), torch.randn(2, 4, 3), torch.randn(2, 3, 5), torch.tensor(1.0), torch.ones(3, 4).long()):
        assert_same_error(a, b, x)
    x = torch.randn(2, 3, 4)
    a, b = a.bfloat16(), b.bfloat16()
    if ours is fnn.LayerNorm:
        assert_same_error(a, b, x)
    else:
        torch.testing.assert_close(a(x), b(x))
    with pytest.raises(RuntimeError, match="residual"):
        a(torch.randn(2, 3, 4), torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match="dropout"):
        ours(4, dropout=-0.1)


@pytest.mark.parametrize(("ours", "theirs"), NORMS)
def test_norms_copy_and_become_torchs(ours, theirs):
    norm = ours(6, dropout=0.25)
    x = torch.randn(3, 6)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is ours
        assert other.dropout == 0.25
        assert torch.equal(other.eval()(x), norm.eval()(x))
    assert isinstance(norm, theirs)
    plain = theirs(6)
    plain.__class__ = ours
    torch.testing.assert_close(plain(x), theirs(6)(x))


@pytest.mark.parametrize(("ours", "theirs"), NORMS)
def test_dropout_in_a_norm_is_dropout_before_it(ours, theirs):
    """sum - residual is x scaled where kept; the norm of that sum is torch's; the share kept is binomial."""
    p = 0.3
    norm = ours(50, dropout=p, dtype=torch.float64)
    norm_of = theirs(50, eps=norm.eps, dtype=torch.float64)
    x, residual = torch.rand(200, 50, dtype=torch.float64) + 0.5, torch.randn(200, 50, dtype=torch.float64)
    torch.manual_seed(0)
    out, total = norm(x, residual)
    kept = (total - residual).abs() > 0.1
    torch.testing.assert_close(total, residual + torch.where(kept, x / (1 - p), 0.0))
    torch.testing.assert_close(out, norm_of(total))
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    torch.manual_seed(0)
    assert torch.equal(norm(x, residual)[0], out)
    torch.testing.assert_close(norm(x, residual, dropout_p=0.0)[1], x + residual)
    norm.eval()
    torch.testing.assert_close(norm(x, residual)[1], x + residual)
    torch.testing.assert_close(norm(x), norm_of(x))


@pytest.mark.parametrize("ours", [fnn.LayerNorm, fnn.RMSNorm])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients_of_norms_under_dropout(ours, with_residual):
    norm = ours(5, dropout=0.4, dtype=torch.float64)
    randomise(norm)
    x, residual = uniform(4, 5, dtype=torch.float64), uniform(4, 5, dtype=torch.float64)

    def function(x, residual, weight):
        torch.manual_seed(3)
        return torch.func.functional_call(norm, {"weight": weight}, (x, residual) if with_residual else (x,))

    assert torch.autograd.gradcheck(function, (x, residual, norm.weight.detach().clone().requires_grad_()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_linear_matches_torchs(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    features, out_features = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    lead = data.draw(st.lists(st.integers(0, 4), max_size=3))
    a, b = pair(fnn.Linear, nn.Linear, features, out_features, bias=data.draw(BOOL), dtype=dtype)
    x = uniform(*lead, features, dtype=dtype)
    assert_same(a, b, [x])
    activation, with_residual = data.draw(st.sampled_from(list(ACTIVATIONS))), data.draw(BOOL)
    a.activation = activation
    residual = uniform(*lead, out_features, dtype=dtype) if with_residual else None

    def reference(x, residual):
        out = ACTIVATIONS[activation](b(x))
        return out if residual is None else out + residual

    reference.parameters = b.parameters
    assert_same(a, reference, [x, residual])


def test_linear_errors():
    a, b = pair(fnn.Linear, nn.Linear, 4, 3)
    for x in (torch.randn(2, 5), torch.randn(2, 4).double(), torch.ones(2, 4).long(), torch.tensor(1.0)):
        assert_same_error(a, b, x)
    with pytest.raises(ValueError, match="activation"):
        fnn.Linear(4, 3, activation="swish")


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward_is_its_formula(activation, gated, bias, dtype):
    torch.manual_seed(0)
    network = fnn.FeedForward(6, 10, activation, gated, bias=bias, dtype=dtype)
    randomise(network)
    x = uniform(2, 3, 6, dtype=dtype)

    def reference(x):
        hidden = network.linear1(x)
        act = ACTIVATIONS[activation]
        hidden = act(network.linear_gate(x)) * hidden if gated else act(hidden)
        return network.linear2(hidden)

    reference.parameters = network.parameters
    assert_same(network, reference, [x])
    keys = {"linear1.weight", "linear2.weight"} | ({"linear_gate.weight"} if gated else set())
    assert set(network.state_dict()) == keys | ({"linear1.bias", "linear2.bias"} if bias else set())


def test_feed_forward_dropout_defaults_and_errors():
    p = 0.4
    network = fnn.FeedForward(300, 300, "relu", dropout=p, bias=False, dtype=torch.float64)
    with torch.no_grad():
        network.linear1.weight.copy_(torch.eye(300))
        network.linear2.weight.copy_(torch.eye(300))
    x = torch.rand(100, 300, dtype=torch.float64) + 0.1
    out = network(x)
    kept = out != 0
    torch.testing.assert_close(out, torch.where(kept, x / (1 - p), 0.0))
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    torch.testing.assert_close(network.eval()(x), x)

    assert fnn.FeedForward(8).linear1.out_features == 32
    with pytest.raises(ValueError, match="activation"):
        fnn.FeedForward(8, activation="tanh")
    with pytest.raises(RuntimeError, match="d_model"):
        network(torch.randn(2, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="dtype"):
        network(torch.randn(2, 300))


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_feed_forward_under_dropout(gated):
    network = fnn.FeedForward(3, 5, "gelu", gated, dropout=0.4, dtype=torch.float64)

    def function(x, weight):
        torch.manual_seed(3)
        return torch.func.functional_call(network, {"linear1.weight": weight}, (x,))

    weight = network.linear1.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (uniform(4, 3, dtype=torch.float64), weight))

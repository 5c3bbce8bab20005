"""fastattn.nn.MultiheadAttention is torch.nn's, option for option; fastattn.nn.AdditiveAttention is its formula."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_reference import assert_same, assert_same_error, pair, randomise, uniform
from torch import nn

import fastattn.nn as fnn

BOOL = st.booleans()
MASKS = ("none", "bool 2d", "bool 3d", "float 2d", "float 3d", "causal bool", "causal float")
PADDINGS = ("none", "bool", "float")


def attn_mask(kind: str, batch: int, heads: int, q: int, k: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask of torch.nn in which each query keeps at least its first key (torch answers NaN otherwise)."""
    if kind == "none":
        return None
    if kind.startswith("causal"):
        later = torch.ones(q, k, dtype=torch.bool).triu(1)
        return later if kind == "causal bool" else torch.zeros(q, k, dtype=dtype).masked_fill(later, -torch.inf)
    shape = (q, k) if kind.endswith("2d") else (batch * heads, q, k)
    blocked = torch.rand(shape) < 0.4
    blocked[..., :1] = False
    if kind.startswith("bool"):
        return blocked
    return torch.randn(shape, dtype=dtype).masked_fill(blocked, -torch.inf).requires_grad_()


def key_padding(kind: str, batch: int, k: int, dtype: torch.dtype) -> torch.Tensor | None:
    if kind == "none":
        return None
    blocked = torch.rand(batch, k) < 0.4
    blocked[:, :1] = False
    return blocked if kind == "bool" else torch.randn(batch, k, dtype=dtype).masked_fill(blocked, -torch.inf)


def sequence(batch: int, length: int, features: int, batched: bool, batch_first: bool, dtype: torch.dtype):
    if not batched:
        return uniform(length, features, dtype=dtype)
    return uniform(*((batch, length) if batch_first else (length, batch)), features, dtype=dtype)


def check_attention(
    *,
    seed: int,
    batched: bool,
    batch_first: bool,
    inputs: str,
    bias: bool,
    add_bias_kv: bool,
    add_zero_attn: bool,
    need_weights: bool,
    average: bool,
    mask: str,
    padding: str,
    hint: bool,
    training: bool,
    grad: bool,
    dtype: torch.dtype,
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 4,
    q: int = 5,
    k: int = 7,
) -> None:
    torch.manual_seed(seed)
    batch = batch if batched else 1
    embed = heads * head_dim
    kdim, vdim = (embed + 3, embed - 1) if inputs == "kdim vdim" else (None, None)
    k = q if inputs == "self" else k
    ours, theirs = pair(
        fnn.MultiheadAttention,
        nn.MultiheadAttention,
        embed,
        heads,
        bias=bias,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        kdim=kdim,
        vdim=vdim,
        batch_first=batch_first,
        dtype=dtype,
    )
    ours.train(training)
    theirs.train(training)
    query = sequence(batch, q, embed, batched, batch_first, dtype)
    key = value = query
    if inputs != "self":
        key = sequence(batch, k, kdim or embed, batched, batch_first, dtype)
        value = key if inputs == "cross" else sequence(batch, k, vdim or embed, batched, batch_first, dtype)
    given_mask = attn_mask(mask, batch, heads, q, k, dtype)
    given_padding = key_padding(padding, batch, k, dtype)
    if given_padding is not None and not batched:
        given_padding = given_padding[0]
    with pytest.MonkeyPatch.context() as patch:
        # torch deprecates masks of two kinds by a warning; ours takes them.
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        assert_same(
            ours,
            theirs,
            (query, key, value),
            grad=grad,
            key_padding_mask=given_padding,
            attn_mask=given_mask,
            need_weights=need_weights,
            average_attn_weights=average,
            is_causal=hint and mask.startswith("causal"),
        )


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.data())
def test_any_combination_of_options_matches_torch(data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    check_attention(
        seed=data.draw(st.integers(0, 2**31)),
        batched=data.draw(BOOL),
        batch_first=data.draw(BOOL),
        inputs=data.draw(st.sampled_from(["self", "cross", "three", "kdim vdim"])),
        bias=data.draw(BOOL),
        add_bias_kv=data.draw(BOOL),
        add_zero_attn=data.draw(BOOL),
        need_weights=data.draw(BOOL),
        average=data.draw(BOOL),
        mask=data.draw(st.sampled_from(MASKS)),
        padding=data.draw(st.sampled_from(PADDINGS)),
        hint=data.draw(BOOL),
        training=data.draw(BOOL),
        grad=data.draw(BOOL),
        dtype=dtype,
        batch=data.draw(st.integers(1, 3)),
        heads=data.draw(st.sampled_from([1, 2, 3])),
        head_dim=data.draw(st.sampled_from([2, 5, 8])),
        q=data.draw(st.integers(1, 9)),
        k=data.draw(st.integers(1, 9)),
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_the_grid_of_masks_matches_torch(mask, padding, need_weights):
    """Every kind of mask with every kind of padding, in training, and in eval with and without gradients."""
    for (training, grad), batch_first, inputs in itertools.product(
        [(True, True), (False, True), (False, False)], [False, True], ["self", "cross"]
    ):
        check_attention(
            seed=3,
            batched=True,
            batch_first=batch_first,
            inputs=inputs,
            bias=True,
            add_bias_kv=False,
            add_zero_attn=False,
            need_weights=need_weights,
            average=True,
            mask=mask,
            padding=padding,
            hint=True,
            training=training,
            grad=grad,
            dtype=torch.float64,
        )


@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", ["self", "cross", "three", "kdim vdim"])
def test_the_grid_of_constructions_matches_torch(add_bias_kv, add_zero_attn, bias, inputs):
    weights = [(False, False), (True, False), (True, True)]
    for batched, batch_first, (need_weights, average) in itertools.product([False, True], [False, True], weights):
        check_attention(
            seed=4,
            batched=batched,
            batch_first=batch_first,
            inputs=inputs,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            need_weights=need_weights,
            average=average,
            mask="float 3d",
            padding="bool",
            hint=False,
            training=True,
            grad=True,
            dtype=torch.float64,
        )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mask_dtype", ["bool", "float"])
def test_rows_without_a_key_give_the_bias_and_no_gradient(need_weights, dtype, mask_dtype):
    torch.manual_seed(0)
    attention = fnn.MultiheadAttention(12, 3, batch_first=True, dtype=dtype)
    randomise(attention)
    x = uniform(2, 4, 12, dtype=dtype)
    blocked = torch.zeros(4, 4, dtype=torch.bool)
    blocked[1] = True
    mask = blocked if mask_dtype == "bool" else torch.zeros(4, 4, dtype=dtype).masked_fill(blocked, -torch.inf)
    padding = torch.tensor([[False] * 4, [True] * 4])
    out, weights = attention(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=need_weights)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    nothing[:, 1] = True
    nothing[1] = True
    torch.testing.assert_close(out[nothing], attention.out_proj.bias.expand(5, 12))
    if need_weights:
        assert (weights[nothing] == 0).all()
    (gradient,) = torch.autograd.grad(out[nothing].sum(), x, retain_graph=True)
    assert (gradient == 0).all()
    for gradient in torch.autograd.grad(out.sum(), [x, *attention.parameters()]):
        assert torch.isfinite(gradient).all()


def test_constructor_errors_are_torchs():
    for args, kwargs in [((10, 3), {}), ((0, 2), {}), ((8, 0), {}), ((8, -1), {})]:
        assert_same_error(fnn.MultiheadAttention, nn.MultiheadAttention, *args, **kwargs)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_call_errors_are_torchs(batch_first, separate):
    """Each wrong call raises the type of exception that torch's slow path raises (its fast path checks less)."""
    kwargs = {"kdim": 6, "vdim": 10} if separate else {}
    ours, theirs = pair(fnn.MultiheadAttention, nn.MultiheadAttention, 8, 2, batch_first=batch_first, **kwargs)
    kdim, vdim = ours.kdim, ours.vdim
    n, q, k = 2, 3, 4

    def shaped(batch, length, features):
        return torch.randn((batch, length, features) if batch_first else (length, batch, features))

    query, key, value = shaped(n, q, 8), shaped(n, k, kdim), shaped(n, k, vdim)
    good = {"query": query, "key": key, "value": value}
    wrong = [
        {"query": query[0, 0]},
        {"query": query[None]},
        {"query": query[0]},
        {"key": key[0]},
        {"value": value[0]},
        {"query": shaped(n, q, 9)},
        {"key": shaped(n, k, kdim + 1)},
        {"key": shaped(n, k, kdim + 1), "value": shaped(n, k, vdim + 1)},
        {"key": shaped(n, k + 1, kdim)},
        {"key": shaped(n + 1, k, kdim), "value": shaped(n + 1, k, vdim)},
        {"query": query.double()},
        {"query": query.long()},
        {"key": key.double(), "value": value.double()},
        {"attn_mask": torch.zeros(q, k + 1)},
        {"attn_mask": torch.zeros(q + 1, k, dtype=torch.bool)},
        {"attn_mask": torch.zeros(n * 2 + 1, q, k)},
        {"attn_mask": torch.zeros(n, q, k)},
        {"attn_mask": torch.zeros(k)},
        {"attn_mask": torch.zeros(1, 1, q, k)},
        {"attn_mask": torch.zeros(q, k, dtype=torch.int64)},
        {"key_padding_mask": torch.zeros(n, k + 1, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(n + 1, k, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(k, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(n, k, dtype=torch.uint8)},
        {"is_causal": True},
        {"is_causal": True, "key_padding_mask": torch.zeros(n, k, dtype=torch.bool)},
        {"query": query[0], "key": key[0], "value": value[0], "attn_mask": torch.zeros(3, q, k)},
        {"query": query[0], "key": key[0], "value": value[0], "key_padding_mask": torch.zeros(n, k)},
    ]
    for change in wrong:
        for need_weights in (False, True):
            assert_same_error(ours, theirs, **{**good, **change}, need_weights=need_weights)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_with_advice():
    attention = fnn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(AssertionError, match="forward_packed"):
        attention(x, x, x)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_packed_attention_is_attention_sequence_by_sequence(lengths, seed):
    torch.manual_seed(seed)
    attention = fnn.MultiheadAttention(12, 3, dtype=torch.float64)
    randomise(attention)
    sequences = [torch.randn(n, 12, dtype=torch.float64) for n in lengths]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    out = attention.forward_packed(torch.cat(sequences), cu_seqlens, max(lengths))
    expected = torch.cat([attention(x, x, x, need_weights=False)[0] if len(x) else x for x in sequences])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kwargs", [{"kdim": 4}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_packed_attention_refuses_what_it_cannot_append(kwargs):
    attention = fnn.MultiheadAttention(8, 2, **kwargs)
    with pytest.raises(ValueError, match="packed"):
        attention.forward_packed(torch.randn(3, 8), torch.tensor([0, 3], dtype=torch.int32), 3)


def test_copies_and_saved_modules_answer_alike():
    attention = fnn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
    randomise(attention)
    buffer = io.BytesIO()
    torch.save(attention, buffer)
    buffer.seek(0)
    x = torch.randn(2, 5, 8)
    for other in (
        copy.deepcopy(attention),
        pickle.loads(pickle.dumps(attention)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is fnn.MultiheadAttention
        assert torch.equal(other(x, x, x)[0], attention(x, x, x)[0])


def test_it_is_an_instance_of_torchs_class_and_becomes_one_by_its_class_alone():
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    expected = theirs(x, x, x)[0]
    theirs.__class__ = fnn.MultiheadAttention
    assert isinstance(theirs, nn.MultiheadAttention)
    torch.testing.assert_close(theirs(x, x, x)[0], expected)
    theirs.__class__ = nn.MultiheadAttention
    assert torch.equal(theirs(x, x, x)[0], expected)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_has_torchs_mean_and_variance(need_weights):
    """Over many draws the mean is the output without dropout, and the variance that of torch's Bernoulli weights.

    With v = I the output before out_proj is the weights themselves: kept with probability 1 - p and then divided by it.
    """
    p, draws, length = 0.3, 400, 6
    attention = fnn.MultiheadAttention(length, 1, dropout=p, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        attention.in_proj_weight[2 * length :] = torch.eye(length, dtype=torch.float64)
        attention.out_proj.weight.copy_(torch.eye(length, dtype=torch.float64))
    identity = torch.eye(length, dtype=torch.float64)
    query, key = torch.randn(2, length, length, dtype=torch.float64)
    attention.eval()
    weights = attention(query, key, identity, need_weights=need_weights)[0]
    attention.train()
    torch.manual_seed(0)
    batch = [x.expand(draws, length, length) for x in (query, key, identity)]
    out, returned = attention(*batch, need_weights=need_weights)
    kept = out != 0
    torch.testing.assert_close(out, torch.where(kept, weights / (1 - p), 0.0).expand_as(out))
    # The number kept is binomial: five deviations.
    deviation = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * deviation
    each = kept.double().mean(dim=0)
    assert float((each - (1 - p)).abs().max()) < 5 * math.sqrt(p * (1 - p) / draws)
    if need_weights:
        torch.testing.assert_close(returned, out)


def test_dropout_follows_the_seed_and_eval_has_none():
    attention = fnn.MultiheadAttention(8, 2, dropout=0.5)
    x = torch.randn(6, 2, 8)
    torch.manual_seed(5)
    first = attention(x, x, x, need_weights=False)[0]
    second = attention(x, x, x, need_weights=False)[0]
    torch.manual_seed(5)
    assert torch.equal(attention(x, x, x, need_weights=False)[0], first)
    assert not torch.equal(first, second)
    attention.eval()
    assert torch.equal(attention(x, x, x, need_weights=False)[0], attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_gradients_under_dropout(need_weights):
    torch.manual_seed(0)
    attention = fnn.MultiheadAttention(4, 2, dropout=0.4, dtype=torch.float64)
    inputs = [uniform(3, 2, 4, dtype=torch.float64), uniform(5, 2, 4, dtype=torch.float64)]

    def function(query, key, weight):
        torch.manual_seed(7)
        parameters = {"in_proj_weight": weight}
        kwargs = {"need_weights": need_weights}
        return torch.func.functional_call(attention, parameters, (query, key, key), kwargs)[0]

    weight = attention.in_proj_weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (*inputs, weight))


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_matches_torchs_within_bfloat16(need_weights):
    torch.manual_seed(0)
    ours, theirs = pair(fnn.MultiheadAttention, nn.MultiheadAttention, 32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    mask = torch.ones(9, 9).triu(1).bool()
    with torch.autocast("cpu", torch.bfloat16):
        a = ours(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
        b = theirs(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    a.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


def additive(attention, query, key, value, mask):
    """The formula, element by element."""
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for n, i in itertools.product(range(query.shape[0]), range(query.shape[1])):
        scores = torch.stack(
            [attention.v @ torch.tanh(attention.w_query @ query[n, i] + attention.w_key @ k) for k in key[n]]
        )
        out[n, i] = torch.softmax(scores + mask[n, i], dim=0) @ value[n]
    return out


@pytest.mark.parametrize("mask_kind", ["none", "bool", "float"])
@pytest.mark.parametrize("padding_kind", ["none", "bool", "float"])
def test_additive_attention_is_its_formula(mask_kind, padding_kind):
    torch.manual_seed(0)
    attention = fnn.AdditiveAttention(5, 7, 6, dtype=torch.float64)
    query, key, value = (uniform(2, *shape, dtype=torch.float64) for shape in ((3, 5), (4, 7), (4, 8)))
    total = torch.zeros(2, 3, 4, dtype=torch.float64)
    given = {}
    for name, kind, shape in (("attn_mask", mask_kind, (2, 3, 4)), ("key_padding_mask", padding_kind, (2, 4))):
        if kind == "none":
            continue
        blocked = torch.rand(shape) < 0.4
        blocked[..., 0] = False
        added = torch.zeros(shape, dtype=torch.float64).masked_fill(blocked, -torch.inf)
        if kind == "float":
            added = added + torch.randn(shape, dtype=torch.float64)
        given[name] = blocked if kind == "bool" else added
        total = total + (added if name == "attn_mask" else added[:, None])
    leaves = [query, key, value, *attention.parameters()]
    out, expected = attention(query, key, value, **given), additive(attention, query, key, value, total)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_additive_attention_defaults_and_errors():
    attention = fnn.AdditiveAttention(5)
    shapes = {name: tuple(parameter.shape) for name, parameter in attention.named_parameters()}
    assert shapes == {"w_query": (5, 5), "w_key": (5, 5), "v": (5,)}
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(attention(x, x), attention(x, x, x))
    assert (attention(x, x, key_padding_mask=torch.ones(2, 3, dtype=torch.bool)) == 0).all()
    with pytest.raises(ValueError, match="key_padding_mask"):
        attention(x, x, key_padding_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="attn_mask"):
        attention(x, x, attn_mask=torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="w_query"):
        attention(torch.randn(2, 3, 4), x)
    with pytest.raises(ValueError, match="greater than 0"):
        fnn.AdditiveAttention(0)
    with pytest.raises(ValueError, match="dropout"):
        fnn.AdditiveAttention(4, dropout=1.5)


def test_gradients_of_additive_attention_under_dropout():
    attention = fnn.AdditiveAttention(3, dropout=0.4, dtype=torch.float64)
    query, key = uniform(2, 4, 3, dtype=torch.float64), uniform(2, 5, 3, dtype=torch.float64)

    def function(query, key, v):
        torch.manual_seed(7)
        return torch.func.functional_call(attention, {"v": v}, (query, key))

    assert torch.autograd.gradcheck(function, (query, key, attention.v.detach().clone().requires_grad_()))

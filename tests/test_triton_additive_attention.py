"""Additive attention in Triton, forward and backward, against the eager definition."""

import pytest
import torch
from additive_cases import additive_calls, check_few, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import strided, with_specials
from triton_backend import DEVICE, DTYPES, check, chips, dtypes, needs_triton, on_device

import fastattn
from fastattn.backends.eager import dropout as eager_dropout

pytestmark = needs_triton

# The edges of tiles (16 queries, 16 to 64 keys, 4 to 16 hidden units), and what lies between.
QUERIES = st.one_of(st.integers(4, 8), st.sampled_from((16, 17)))
KEYS = st.one_of(st.integers(12, 40), st.sampled_from((64, 65)))
DIMS = st.one_of(st.integers(8, 30), st.just(33))
LEADS = st.sampled_from(((2,), (1,), (), (1, 2), (0,)))
calls = additive_calls(dtypes=DTYPES, queries=QUERIES, keys=KEYS, dims=DIMS, leads=LEADS)


@settings(max_examples=16)
@given(call=calls, chip=chips)
def test_outputs_and_gradients_obey_the_numerics_rule(call: tuple, chip: str) -> None:
    tensors, options = call
    check(fastattn.additive_attention, chip, *tensors, **options)


@settings(max_examples=15)
@given(call=additive_calls(few=True, leads=LEADS))
def test_few_of_everything(call: tuple) -> None:
    """Down to nothing."""
    check_few(on_device(call), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 8.0])
def test_sums_of_every_size(dtype: torch.dtype, scale: float) -> None:
    """A tanh is as exact where it is tiny as where it is 1."""
    check(fastattn.additive_attention, "sm_90", *drawn(1, 17, 50, 16, 12, scale=scale, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_few_queries_share_the_keys_out(dtype: torch.dtype, queries: int) -> None:
    check(fastattn.additive_attention, "sm_90", *drawn(1, queries, 300, 24, 10, dtype=dtype))


def test_many_hidden_units() -> None:
    """More than one block of them in the backward."""
    check(fastattn.additive_attention, "sm_90", *drawn(1, 17, 30, 16, 70))


@pytest.mark.parametrize("width", [200, 300, 600, 1100])
def test_wide_values(width: int) -> None:
    """Each row of the table, and several blocks of columns."""
    tensors = [x.detach() for x in drawn(1, 5, 40, 16, 12)]
    tensors[2] = torch.randn(1, 40, width)
    check(fastattn.additive_attention, "sm_90", *(x.requires_grad_() for x in tensors))


@pytest.mark.parametrize("size", [1.0, 19.9, 50.0])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
def test_sums_that_cancel_or_saturate(size: float, signs: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((17, 24), (30, 24))
    query, key = (sign * size + torch.randn(1, *s, generator=generator) for sign, s in zip(signs, shapes, strict=True))
    weight = torch.eye(24)  # so that a and b are query and key
    leaves = [query, key, *(torch.randn(s, generator=generator) for s in ((1, 30, 8), (24,)))]
    query, key, value, v = (x.requires_grad_() for x in leaves)
    if size > 10 and signs[0] == signs[1]:
        v.requires_grad_(False)  # every tanh is 1: what is left of its gradient is rounding
    check(fastattn.additive_attention, "sm_90", query, key, value, weight, weight, v)


@pytest.mark.parametrize(
    ("most", "mask_shape"),
    [(300, (2, 20, 30)), (300, (1, 20, 30)), (300, (2, 1, 30)), (300, (2, 20, 1)), (700, (1, 1, 30)), (700, (20, 30))],
)
def test_queries_that_are_taken_in_turn(monkeypatch, most: int, mask_shape: tuple[int, ...]) -> None:
    """More scores than exist at a time: a batch element or some queries in each turn, with the dropout of the whole."""
    from fastattn.backends.triton import additive_backward

    monkeypatch.setattr(additive_backward, "_MOST_SCORES", most)
    mask = torch.randn(mask_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    check(fastattn.additive_attention, "sm_90", *drawn(2, 20, 30, 8, 8), mask, dropout_p=0.2)


@settings(max_examples=10)
@given(p=st.sampled_from((0.1, 0.5, 0.999, 1.0)), seed=st.integers(-(2**63), 2**63 - 1), q=st.integers(1, 20))
def test_dropout_drops_what_eager_drops(p: float, seed: int, q: int) -> None:
    """With equal scores and the unit matrix for values, the output is the dropped weights themselves."""
    from fastattn.backends.triton import additive_attention

    batch, k = 2, 130
    query, key, value = torch.zeros(batch, q, 8), torch.zeros(batch, k, 8), torch.eye(k).expand(batch, k, k)
    weight, v, seed_tensor = torch.ones(4, 8), torch.ones(4), torch.tensor([seed])
    moved = on_device((query, key, value, weight, weight, v, None, seed_tensor))
    out, *_ = additive_attention.forward(*moved, p, False)
    keep = eager_dropout.keep_mask(seed_tensor, torch.arange(batch * q).reshape(batch, q), k, p).to(DEVICE)
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(out, keep / k / (1 - p) if p < 1 else torch.zeros_like(out))


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), dtype=dtypes, which=st.integers(0, 6), q=st.sampled_from((1, 3)), chip=chips)
def test_nan_and_infinity_propagate_as_in_eager(seed: int, dtype: torch.dtype, which: int, q: int, chip: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [x.detach() for x in drawn(2, q, 70, 24, 12, dtype=dtype)]
    tensors.append(torch.randn(2, q, 70, generator=generator))
    tensors[which] = with_specials(tensors[which], generator)
    check(fastattn.additive_attention, chip, *(x.requires_grad_() for x in tensors))


def test_a_query_without_keys_gets_zeros_in_both_directions() -> None:
    mask = torch.ones(9, 70, dtype=torch.bool)
    mask[1] = False
    tensors, mask = on_device((drawn(2, 9, 70, 16, 12), mask))
    with fastattn.use_backend("triton"):
        out = fastattn.additive_attention(*tensors, mask)
        grads = torch.autograd.grad(out.square().sum(), tensors)
    assert not out[:, 1].any()
    assert not grads[0][:, 1].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_the_same_bits_every_time() -> None:
    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        tensors = on_device(drawn(1, 5, 300, 16, 6))
        with fastattn.use_backend("triton"):
            out = fastattn.additive_attention(*tensors, None, 0.2)
            return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_gradients_lie_in_memory_as_their_tensors_do() -> None:
    tensors = [strided(x.detach(), "transposed").to(DEVICE) for x in drawn(2, 5, 7, 4, 6)]
    tensors = [x.requires_grad_() for x in tensors]
    with fastattn.use_backend("triton"):
        grads = torch.autograd.grad(fastattn.additive_attention(*tensors).sum(), tensors)
    for x, grad in zip(tensors, grads, strict=True):
        assert grad.stride() == x.stride()


@pytest.mark.parametrize(
    ("change", "why"),
    [({"query": torch.randn(2, 3, 4).double()}, "float64"), ({"v": torch.randn(7).half()}, "share one dtype")],
)
def test_unsupported_says_why(change: dict, why: str) -> None:
    from fastattn.backends.triton import additive_attention

    tensors = zip(("query", "key", "value", "w_query", "w_key", "v"), drawn(2, 3, 5, 4, 7), strict=True)
    arguments = {**dict(tensors), "attn_mask": None, "seed": None, "dropout_p": 0.0, "save": False, **change}
    assert why in additive_attention.unsupported(**on_device(arguments))

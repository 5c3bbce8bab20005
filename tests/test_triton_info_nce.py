"""InfoNCE in Triton, loss and gradients, against the eager definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import contrast, contrast_cases, judged_in_the_inputs_dtype
from memory import Allocations
from norm_cases import with_specials
from triton_backend import DEVICE, DTYPES, check, chips, dtypes, needs_triton

import fastattn
from fastattn.backends import BACKENDS

pytestmark = needs_triton

loss = judged_in_the_inputs_dtype(fastattn.info_nce)

# Both tiles of query_terms, all of them crossed.
cases = contrast_cases(
    DTYPES,
    st.one_of(st.integers(20, 50), st.just(97)),
    st.integers(1, 70),
    st.one_of(st.integers(1, 70), st.just(1100)),
)


@given(case=cases, chip=chips)
@settings(max_examples=16)
def test_loss_and_gradients_obey_the_numerics_rule(case: tuple, chip: str) -> None:
    check(loss, chip, *case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shapes", [((121, 24), (121, 24)), ((50, 24), (50, 24), (300, 24))])
def test_stretches_of_queries(short_stretches, dtype: torch.dtype, symmetric: bool, shapes: tuple) -> None:
    query, positive, *negatives = contrast(*shapes, dtype=dtype)
    temperature = torch.tensor(0.3, requires_grad=True)
    check(loss, "sm_90", query, positive, *(negatives or [None]), temperature, symmetric)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e4])
def test_scores_whose_exponentials_have_no_place(dtype: torch.dtype, symmetric: bool, temperature: float) -> None:
    """Far beyond what exp takes, and all of them alike."""
    leaves = contrast((60, 33), (60, 33), (30, 33), dtype=dtype)
    check(loss, "sm_90", *leaves, temperature, symmetric)


@given(
    dtype=dtypes,
    seed=st.integers(0, 1000),
    pairs=st.integers(4, 40),
    which=st.integers(0, 2),
    symmetric=st.booleans(),
    chip=chips,
)
@settings(max_examples=12)
def test_nan_and_infinity_propagate_as_in_eager(
    dtype, seed: int, pairs: int, which: int, symmetric: bool, chip
) -> None:
    tensors = [x.detach() for x in contrast((pairs, 33), (pairs, 33), (20, 33), dtype=dtype, seed=seed)]
    tensors[which] = with_specials(tensors[which], torch.Generator().manual_seed(seed))
    check(loss, chip, *(x.requires_grad_() for x in tensors), 0.5, symmetric)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -0.5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_temperature_that_went_astray(value: float, symmetric: bool) -> None:
    """A learnt one may become anything, and then ours is what it is in eager."""
    leaves = [*contrast((20, 9), (20, 9), (5, 9)), torch.tensor([value], requires_grad=True)]
    check(loss, "sm_90", *leaves, symmetric)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_temperature_is_a_number_or_a_tensor_of_any_dtype(dtype: torch.dtype, shape: tuple) -> None:
    query, positive = (x.detach().to(DEVICE).requires_grad_() for x in contrast((30, 12), (30, 12)))
    temperature = torch.full(
        shape, 0.25, dtype=dtype, requires_grad=True
    )  # on the CPU, where a GPU's tensors may have it
    with fastattn.use_backend("triton"):
        loss = fastattn.info_nce(query, positive, temperature=temperature)
        assert torch.equal(loss, fastattn.info_nce(query, positive, temperature=0.25))
    (grad,) = torch.autograd.grad(loss, temperature)
    assert (grad.shape, grad.dtype) == (shape, dtype)
    with fastattn.use_backend("eager"):
        (expected,) = torch.autograd.grad(fastattn.info_nce(query, positive, temperature=temperature), temperature)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("needed", range(4))
def test_one_gradient_alone_is_the_same(dtype: torch.dtype, needed: int) -> None:
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in contrast((60, 20), (60, 20), (30, 20), dtype=dtype)]
    leaves.append(torch.tensor([0.5], requires_grad=True))
    with fastattn.use_backend("triton"):
        expected = torch.autograd.grad(fastattn.info_nce(*leaves, True) * 2.0, leaves)
        alone = [x if i == needed else x.detach() for i, x in enumerate(leaves)]
        (found,) = torch.autograd.grad(fastattn.info_nce(*alone, True) * 2.0, alone[needed])
    assert torch.equal(found, expected[needed])


def test_small_gradients_survive_in_float16() -> None:
    """Under a gradient scaler the gradients times its scale are what must fit float16, not the gradients themselves."""
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in contrast((120, 8), (120, 8), dtype=torch.float16)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    with fastattn.use_backend("triton"):
        found = torch.autograd.grad(fastattn.info_nce(*leaves, temperature=100.0) * 1e-2 * 2.0**20, leaves)
    expected = torch.autograd.grad(fastattn.info_nce(*wide, temperature=100.0) * 1e-2 * 2.0**20, wide)
    for got, want in zip(found, expected, strict=True):
        assert (got - want).abs().max() < 2e-3 * want.abs().max()


def test_no_negatives_at_all() -> None:
    leaves = contrast((20, 9), (20, 9), (0, 9))
    check(loss, "sm_90", *leaves, 0.5, True)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("needs_gradients", [True, False])
@pytest.mark.parametrize("extra", [0, 8192])
def test_scores_are_never_a_whole(symmetric: bool, needs_gradients: bool, extra: int) -> None:
    """Of CLIP's 32768 pairs, all that a call allocates is a small share of eager's three float32 matrices of scores."""
    from fastattn.backends.triton._launch import record_launches

    pairs = 32768
    query, positive, negatives = (
        torch.empty(n, 512, dtype=torch.bfloat16, device="meta") for n in (pairs, pairs, extra)
    )
    temperature = torch.empty((), device="meta")
    with Allocations() as made, record_launches(lambda *launch: None):
        BACKENDS["triton"]["info_nce"].forward(
            query, positive, negatives, temperature, symmetric, [needs_gradients] * 4
        )
    assert made.total < 0.05 * 12 * pairs * (pairs + extra)
    assert made.largest <= pairs * (pairs + extra) * 2 // 7


def test_unsupported_says_why() -> None:
    query = torch.randn(4, 6, device=DEVICE)
    assert "no empty query" in fastattn.explain("info_nce", query[:0], query[:0]).reasons["triton"]
    assert "not in float64" in fastattn.explain("info_nce", query.double(), query.double()).reasons["triton"]

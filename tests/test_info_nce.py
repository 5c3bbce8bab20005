"""InfoNCE on the CPU, loss and gradients, against the eager definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import SMALL, check_specials
from loss_cases import contrast, contrast_cases
from memory import most_memory_of, needs_linux
from norm_cases import DTYPES, check_refused, with_specials
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native


@given(case=contrast_cases())
def test_loss_and_gradients_obey_the_numerics_rule(isa: str, case: tuple) -> None:
    verify.check(fastattn.info_nce, *case, backend="cpu").raise_if_failed()


@pytest.mark.any_lanes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shapes", [((2101, 24), (2101, 24)), ((700, 24), (700, 24), (5400, 24))])
def test_queries_that_are_taken_in_turn(isa: str, dtype: torch.dtype, symmetric: bool, shapes: tuple) -> None:
    """More queries than are taken at a time, the last of them an odd number."""
    tensors = contrast(*shapes, dtype=dtype)
    arguments = {
        **dict(zip(("query", "positive", "negatives"), tensors, strict=False)),
        "temperature": torch.tensor(0.3, requires_grad=True),
        "symmetric": symmetric,
    }
    verify.check(fastattn.info_nce, backend="cpu", **arguments).raise_if_failed()


@given(data=st.data())
def test_torchs_own_functions_agree(isa: str, data: st.DataObject) -> None:
    """In float32, on sizes down to one, where the rule would ask for more luck than precision."""
    draw = data.draw
    pairs, dim, extra = draw(SMALL), draw(SMALL), draw(st.integers(0, 40))
    leaves = contrast((pairs, dim), (pairs, dim), (extra, dim), seed=draw(st.integers(0, 2**31)))
    leaves.append(torch.tensor(0.5, requires_grad=True))
    symmetric = draw(st.booleans())
    query, positive, negatives, temperature = leaves
    with fastattn.use_backend("cpu"):
        ours = fastattn.info_nce(*leaves, symmetric)
    scores = query @ torch.cat((positive, negatives)).T / temperature
    target = torch.arange(pairs)
    theirs = F.cross_entropy(scores, target)
    if symmetric:
        theirs = (theirs + F.cross_entropy(scores[:, :pairs].T, target)) / 2
    found, expected = (torch.autograd.grad(loss * 3.0, leaves) for loss in (ours, theirs))
    for got, want in zip((ours, *found), (theirs, *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e4])
def test_scores_whose_exponentials_have_no_place(isa, dtype, symmetric, temperature) -> None:
    """Far beyond what exp takes, and all of them alike."""
    query, positive, negatives = contrast((60, 33), (60, 33), (30, 33), dtype=dtype)
    verify.check(fastattn.info_nce, query, positive, negatives, temperature, symmetric, backend="cpu").raise_if_failed()


@given(
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    pairs=st.integers(4, 40),
    which=st.integers(0, 2),
    symmetric=st.booleans(),
)
def test_nan_and_infinity_stand_where_the_definition_has_them(
    isa: str, dtype: torch.dtype, seed: int, pairs: int, which: int, symmetric: bool
) -> None:
    tensors = [x.detach() for x in contrast((pairs, 33), (pairs, 33), (20, 33), dtype=dtype, seed=seed)]
    tensors[which] = with_specials(tensors[which], torch.Generator().manual_seed(seed))
    query, positive, negatives = (x.requires_grad_() for x in tensors)
    check_specials(
        lambda query, positive, negatives: fastattn.info_nce(query, positive, negatives, 0.5, symmetric),
        query,
        positive,
        negatives,
    )


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -0.5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_temperature_that_went_astray(isa: str, value: float, symmetric: bool) -> None:
    """A learnt one may become anything, and then ours is what it is in eager."""
    leaves = [*contrast((20, 9), (20, 9), (5, 9)), torch.tensor([value], requires_grad=True)]
    verify.check(fastattn.info_nce, *leaves, symmetric, backend="cpu").raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_temperature_is_a_number_or_a_tensor_of_any_dtype(isa: str, dtype: torch.dtype, shape: tuple) -> None:
    query, positive = contrast((30, 12), (30, 12))
    temperature = torch.full(shape, 0.25, dtype=dtype, requires_grad=True)
    with fastattn.use_backend("cpu"):
        loss = fastattn.info_nce(query, positive, temperature=temperature)
        assert torch.equal(loss, fastattn.info_nce(query, positive, temperature=0.25))
    (grad,) = torch.autograd.grad(loss, temperature)
    assert grad.shape == shape
    assert grad.dtype == dtype
    with fastattn.use_backend("eager"):
        (expected,) = torch.autograd.grad(fastattn.info_nce(query, positive, temperature=temperature), temperature)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("pairs", "extra"), [(40, 3000), (700, 5400)])
def test_bits_do_not_depend_on_threads(isa, same_bits_at_any_thread_count, dtype, symmetric, pairs, extra) -> None:
    leaves = contrast((pairs, 40), (pairs, 40), (extra, 40), dtype=dtype)
    leaves.append(torch.tensor([0.5], requires_grad=True))

    def run() -> list[Tensor]:
        with fastattn.use_backend("cpu"):
            loss = fastattn.info_nce(*leaves, symmetric)
            return [loss, *torch.autograd.grad(loss, leaves)]

    same_bits_at_any_thread_count(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("needed", range(4))
def test_one_gradient_alone_is_the_same(isa: str, dtype: torch.dtype, needed: int) -> None:
    leaves = contrast((300, 20), (300, 20), (90, 20), dtype=dtype)
    leaves.append(torch.tensor([0.5], requires_grad=True))
    with fastattn.use_backend("cpu"):
        expected = torch.autograd.grad(fastattn.info_nce(*leaves, True) * 2.0, leaves)
        alone = [x if i == needed else x.detach() for i, x in enumerate(leaves)]
        (found,) = torch.autograd.grad(fastattn.info_nce(*alone, True) * 2.0, alone[needed])
    assert torch.equal(found, expected[needed])


def test_small_gradients_survive_in_float16(isa: str) -> None:
    """Under a gradient scaler the gradients times its scale are what must fit float16, not the gradients themselves."""
    leaves = contrast((3000, 8), (3000, 8), dtype=torch.float16)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    with fastattn.use_backend("cpu"):
        found = torch.autograd.grad(fastattn.info_nce(*leaves, temperature=100.0) * 65536.0, leaves)
    expected = torch.autograd.grad(fastattn.info_nce(*wide, temperature=100.0) * 65536.0, wide)
    for got, want in zip(found, expected, strict=True):
        assert (got - want).abs().max() < 2e-3 * want.abs().max()


@needs_linux
@pytest.mark.parametrize("symmetric", [False, True])
def test_scores_are_never_a_whole(symmetric: bool) -> None:
    """Of 6000 x 6000 scores, 144 MB in float32, eager has several copies."""
    query, positive = contrast((6000, 32), (6000, 32))
    with fastattn.use_backend("cpu"):
        assert most_memory_of(lambda: fastattn.info_nce(query, positive, symmetric=symmetric).backward()) < 48 << 20


def test_bindings_refuse_what_a_kernel_cannot_take() -> None:
    good = {
        "query": torch.randn(4, 6),
        "positive": torch.randn(4, 6),
        "negatives": torch.randn(5, 6),
        "temperature": torch.ones(1).double(),
        "grad_loss": torch.ones(1),
        "loss": torch.empty(1),
        "grad_query": torch.empty(4, 6),
        "grad_positive": torch.empty(4, 6),
        "grad_negatives": torch.empty(5, 6),
        "grad_temperature": torch.empty(1),
        "symmetric": True,
    }
    ones = ("text", torch.ones(2), torch.ones(0), torch.ones(1).double(), torch.ones(1).int())
    matrices = (
        "text",
        torch.randn(6, 6),
        torch.randn(3, 7),
        torch.randn(7),
        torch.randn(6, 4).T,
        torch.randn(6, 5).T,
        torch.randn(4, 6).double(),
        torch.randn(5, 6).half(),
        torch.randn(4, 6, device="meta"),
    )
    wrong: dict[str, tuple] = dict.fromkeys(("grad_loss", "grad_temperature"), ones)
    wrong["loss"] = (None, *ones)
    wrong["temperature"] = (None, "text", torch.ones(2).double(), torch.ones(0).double(), torch.ones(1), 1.0)
    wrong |= dict.fromkeys(("query", "positive"), (None, torch.randn(0, 6), torch.randn(4, 0), *matrices))
    wrong |= dict.fromkeys(("grad_query", "grad_positive"), (torch.empty(1, 6).expand(4, 6), *matrices))
    wrong["grad_negatives"] = (torch.empty(1, 6).expand(5, 6), torch.empty(0, 6), *matrices)
    wrong["negatives"] = (None, torch.randn(5, 7), torch.randn(5), torch.randn(5, 6).half(), torch.randn(6, 5).T)
    wrong["symmetric"] = ("text",)
    check_refused(_native.C.info_nce, good, wrong)
    check_refused(_native.C.info_nce, {**good, "negatives": torch.randn(0, 6), "grad_negatives": torch.empty(0, 6)}, {})

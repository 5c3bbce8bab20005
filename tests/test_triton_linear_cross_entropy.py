"""Linear + cross entropy in Triton, loss and gradients, against the eager definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import IGNORED, REDUCTIONS, cross_entropy_cases, judged_in_the_inputs_dtype, targets
from memory import Allocations
from norm_cases import with_specials
from torch import Tensor
from triton_backend import DEVICE, DTYPES, check, chips, dtypes, needs_triton

import fastattn
from fastattn.backends import BACKENDS

pytestmark = needs_triton

loss = judged_in_the_inputs_dtype(fastattn.linear_cross_entropy)

# Both tiles of row_statistics, one of them crossed.
CLASSES = st.one_of(st.integers(20, 70), st.sampled_from((300, 1100)))
cases = cross_entropy_cases(DTYPES, st.integers(20, 36), st.integers(1, 70), CLASSES)


@given(case=cases, chip=chips)
@settings(max_examples=16)
def test_loss_and_gradients_obey_the_numerics_rule(case: tuple, chip: str) -> None:
    arguments, options = case
    check(loss, chip, *arguments, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "dim", "classes", "frozen"),
    [(75, 9, 90, ()), (75, 9, 90, (0,)), (75, 9, 90, (1,)), (24, 12, 1300, ()), (16, 20, 9000, ())],
)
def test_stretches_of_rows_and_of_classes(
    short_stretches, dtype, rows: int, dim: int, classes: int, frozen: tuple
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, dim), (classes, dim), (classes,)
    leaves = [torch.randn(s, generator=generator).mul(dim**-0.25).to(dtype) for s in shapes]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i not in frozen)
    x, weight, bias = leaves
    options = {
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 5.0,
        "class_weight": torch.rand(classes, generator=generator),
    }
    check(loss, "sm_90", x, weight, targets((rows,), classes, generator, 0.1), bias, **options)


def test_a_row_with_an_infinite_stretch(short_stretches) -> None:
    """Classes that a bias of -inf takes out fill the first stretches: their logsumexp is -inf, the row's is not."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator, requires_grad=True) for s in ((20, 6), (2000, 6)))
    bias = torch.randn(2000, generator=generator).index_fill(0, torch.arange(1500), -math.inf)
    target = torch.randint(1500, 2000, (20,), generator=generator)
    check(loss, "sm_90", x, weight, target, bias)


@given(dtype=dtypes, seed=st.integers(0, 1000), rows=st.integers(4, 20), reduction=REDUCTIONS, chip=chips)
@settings(max_examples=15)
def test_nan_and_infinity_propagate_as_in_eager(dtype, seed: int, rows: int, reduction: str, chip: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((rows, 33), (50, 33)))
    target = targets((rows,), 50, generator)
    x = torch.where((target == IGNORED).unsqueeze(1), x, with_specials(x, generator))
    check(loss, chip, x.requires_grad_(), weight.requires_grad_(), target, reduction=reduction)


@pytest.mark.parametrize("asked", [True, False])
@given(dtype=dtypes, rows=st.integers(1, 40), reduction=REDUCTIONS, weighted=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=12)
def test_ignored_rows_leave_no_trace(asked: bool, dtype, rows: int, reduction: str, weighted: bool, seed: int) -> None:
    """Loss and gradients are those of the other rows alone, and zero for the ignored ones, whatever they hold.

    Without asking the GPU how many these are (in the capture of a CUDA graph) as well, though then not to the bit.
    """
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in ((rows, 24), (70, 24)))
    target = targets((rows,), 70, generator, ignored=0.5).to(DEVICE)
    class_weight = torch.rand(70, generator=generator).to(DEVICE) if weighted else None
    counted = target != IGNORED
    x[~counted] = torch.nan

    def run(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"label_smoothing": 0.1, "z_loss": 0.01, "class_weight": class_weight, "reduction": reduction}
        with fastattn.use_backend("triton"):
            loss = fastattn.linear_cross_entropy(*leaves, target, **options)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    with pytest.MonkeyPatch.context() as patch:
        if not asked:
            patch.setattr(BACKENDS["triton"]["linear_cross_entropy"], "can_wait", lambda target: False)
        loss, grad_x, grad_weight = run(x, target)
    assert not grad_x[~counted].any()
    if not counted.any():
        assert not grad_weight.any()
        assert loss.isnan() if reduction == "mean" else not loss.any()
        return
    alone = run(x[counted], target[counted])
    tolerance = {"rtol": 0.0, "atol": 0.0} if asked else {"rtol": 1e-2 if dtype.itemsize == 2 else 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss[counted] if reduction == "none" else loss, alone[0], **tolerance)
    torch.testing.assert_close(grad_x[counted], alone[1], **tolerance)
    torch.testing.assert_close(grad_weight, alone[2], **tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_row_ignored(reduction: str) -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((5, 8), (7, 8), (7,)))
    check(loss, "sm_90", x, weight, torch.full((5,), IGNORED), bias, reduction=reduction)


def test_an_ignored_class() -> None:
    """ignore_index may be a class."""
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    check(loss, "sm_90", x, weight, torch.arange(20) % 7, ignore_index=3)


def test_small_gradients_survive_in_float16() -> None:
    """Under a gradient scaler the gradients times its scale are what must fit float16, not the gradients themselves."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).half().to(DEVICE) for s in ((500, 8), (50, 8)))
    x, target = x.requires_grad_(), targets((500,), 50, generator).to(DEVICE)

    def grad(x: Tensor, weight: Tensor) -> Tensor:
        loss = fastattn.linear_cross_entropy(x, weight, target) * 1e-5
        return torch.autograd.grad(loss * 2.0**26, x)[0]

    with fastattn.use_backend("triton"):
        found = grad(x, weight)
    with fastattn.use_backend("eager"):
        expected = grad(x.detach().double().requires_grad_(), weight.double())
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


# Bytes that a logit takes in eager: three float32 matrices at once, when the gradient goes through log_softmax.
EAGER = 12


@pytest.mark.parametrize("needs_gradients", [True, False])
@pytest.mark.parametrize(
    ("rows", "dim", "dtype", "share"),
    [
        (8192, 4096, torch.bfloat16, 0.06),
        (16384, 4096, torch.bfloat16, 0.06),
        (32768, 4096, torch.bfloat16, 0.08),  # with 2 GB of float32 sums for weight's gradient
        (32768, 1024, torch.float32, 0.06),
    ],
)
def test_the_matrix_of_logits_is_never_formed(
    needs_gradients: bool, rows: int, dim: int, dtype: torch.dtype, share: float
) -> None:
    """At a language model's size, all that a call allocates beside the gradients is a small share of eager's memory."""
    classes = 128 * 1024
    x, weight = (torch.empty(size, dim, dtype=dtype, device="meta") for size in (rows, classes))
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    from fastattn.backends.triton._launch import record_launches

    needs = [needs_gradients, needs_gradients, False]
    with Allocations() as made, record_launches(lambda *launch: None):
        BACKENDS["triton"]["linear_cross_entropy"].forward(
            x, weight, target, None, None, IGNORED, 0.1, 0.0, 0.0, "mean", needs
        )
    gradients = (x.nbytes + weight.nbytes) * needs_gradients
    assert made.total - gradients < share * EAGER * rows * classes
    assert made.largest <= max(rows * classes * dtype.itemsize // 7, weight.nbytes * 4 // dtype.itemsize)


def test_unsupported_says_why() -> None:
    x, weight = torch.randn(4, 6, device=DEVICE), torch.randn(5, 6, device=DEVICE)
    target = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    reasons = fastattn.explain("linear_cross_entropy", x[:0], weight, target[:0]).reasons
    assert "no empty x" in reasons["triton"]
    assert (
        "not in float64"
        in fastattn.explain("linear_cross_entropy", x.double(), weight.double(), target).reasons["triton"]
    )

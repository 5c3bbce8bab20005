"""Linear + cross entropy on the CPU, loss and gradients, against the eager definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import SMALL, check_specials
from loss_cases import IGNORED, REDUCTIONS, cross_entropy_cases, targets
from memory import most_memory_of, needs_linux
from norm_cases import DTYPES, check_refused, with_specials
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native


@given(case=cross_entropy_cases())
def test_loss_and_gradients_obey_the_numerics_rule(isa: str, case: tuple) -> None:
    arguments, options = case
    verify.check(fastattn.linear_cross_entropy, *arguments, **options, backend="cpu").raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_are_taken_in_turn(isa: str, dtype: torch.dtype, reduction: str) -> None:
    """More rows than are taken at a time, the last of them an odd number."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2501, 24), (61, 24), (61,)
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    target = targets((2501,), 61, generator)
    verify.check(
        fastattn.linear_cross_entropy, x, weight, target, bias, reduction=reduction, backend="cpu"
    ).raise_if_failed()


@given(data=st.data())
def test_torchs_own_function_agrees(isa: str, data: st.DataObject) -> None:
    """In float32, on sizes down to one, where the rule would ask for more luck than precision."""
    draw = data.draw
    rows, dim, classes = draw(SMALL), draw(SMALL), draw(SMALL)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, weight, bias = (
        torch.randn(s, generator=generator, requires_grad=True) for s in ((rows, dim), (classes, dim), (classes,))
    )
    target, reduction = targets((rows,), classes, generator), draw(REDUCTIONS)
    with fastattn.use_backend("cpu"):
        ours = fastattn.linear_cross_entropy(x, weight, target, bias, reduction=reduction)
    theirs = F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)
    received = torch.randn(ours.shape, generator=generator)
    found, expected = (torch.autograd.grad(loss, (x, weight, bias), received) for loss in (ours, theirs))
    for got, want in zip((ours, *found), (theirs, *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


@given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000), rows=st.integers(4, 40), reduction=REDUCTIONS)
def test_nan_and_infinity_stand_where_the_definition_has_them(
    isa: str, dtype: torch.dtype, seed: int, rows: int, reduction: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((rows, 33), (50, 33)))
    target = targets((rows,), 50, generator)
    x = torch.where((target == IGNORED).unsqueeze(1), x, with_specials(x, generator))
    check_specials(
        lambda x, weight: fastattn.linear_cross_entropy(x, weight, target, reduction=reduction),
        x.requires_grad_(),
        weight.requires_grad_(),
    )


@given(dtype=st.sampled_from(DTYPES), rows=st.integers(1, 300), reduction=REDUCTIONS, seed=st.integers(0, 1000))
def test_ignored_rows_leave_no_trace(isa: str, dtype: torch.dtype, rows: int, reduction: str, seed: int) -> None:
    """Loss and gradients are to the bit those of the other rows alone, and zero for the ignored ones, whatever they hold."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((rows, 24), (70, 24)))
    target = targets((rows,), 70, generator, ignored=0.5)
    counted = target != IGNORED
    x[~counted] = torch.nan

    def run(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with fastattn.use_backend("cpu"):
            loss = fastattn.linear_cross_entropy(*leaves, target, label_smoothing=0.1, reduction=reduction)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    loss, grad_x, grad_weight = run(x, target)
    assert torch.equal(grad_x[~counted], torch.zeros_like(grad_x[~counted]))
    if not counted.any():
        assert torch.equal(grad_weight, torch.zeros_like(grad_weight))
        return
    alone = run(x[counted], target[counted])
    assert torch.equal(loss[counted] if reduction == "none" else loss, alone[0])
    assert torch.equal(grad_x[counted], alone[1])
    assert torch.equal(grad_weight, alone[2])


def test_every_row_ignored(isa: str) -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    target = torch.full((5,), IGNORED)
    for reduction in ("mean", "sum", "none"):
        verify.check(
            fastattn.linear_cross_entropy, x, weight, target, reduction=reduction, backend="cpu"
        ).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(40, 3000), (2100, 90), (300, 1100)])
def test_bits_do_not_depend_on_threads(isa, same_bits_at_any_thread_count, dtype, rows, classes) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, 40), (classes, 40), (classes,)
    leaves = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    target = targets((rows,), classes, generator)

    def run() -> list[Tensor]:
        with fastattn.use_backend("cpu"):
            loss = fastattn.linear_cross_entropy(*leaves[:2], target, leaves[2], label_smoothing=0.1)
            return [loss, *torch.autograd.grad(loss, leaves)]

    same_bits_at_any_thread_count(run)


def test_small_gradients_survive_in_float16(isa: str) -> None:
    """Under a gradient scaler the gradients times its scale are what must fit float16, not the gradients themselves."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).half().requires_grad_() for s in ((200_000, 8), (50, 8)))
    target = targets((200_000,), 50, generator)
    with fastattn.use_backend("cpu"):
        loss = fastattn.linear_cross_entropy(x, weight, target)
        (grad,) = torch.autograd.grad(loss * 65536.0, x)
    wide = fastattn.linear_cross_entropy(x.double(), weight.double(), target)
    (expected,) = torch.autograd.grad(wide * 65536.0, x)
    assert (grad - expected).abs().max() < 2e-3 * expected.abs().max()


@needs_linux
def test_the_matrix_of_logits_is_never_formed() -> None:
    """Loss and gradients over 4096 rows and 40,000 classes: the logits alone would be 625 MiB."""
    x, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(40_000, 8, requires_grad=True)
    target = torch.randint(0, 40_000, (4096,))
    with fastattn.use_backend("cpu"):
        assert most_memory_of(lambda: fastattn.linear_cross_entropy(x, weight, target).backward()) < 64 << 20


@needs_linux
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradients_exist_once(scale: float) -> None:
    """They are found with the loss, and multiplied in place by what it receives."""
    x, weight = torch.randn(64, 1024, requires_grad=True), torch.randn(16_000, 1024, requires_grad=True)
    target = torch.randint(0, 16_000, (64,))

    def step() -> None:
        weight.grad = None
        (fastattn.linear_cross_entropy(x, weight, target) * scale).backward()

    with fastattn.use_backend("cpu"):
        assert most_memory_of(step) < 1.5 * weight.nbytes


def test_bindings_refuse_what_a_kernel_cannot_take() -> None:
    good = {
        "x": torch.randn(4, 6),
        "weight": torch.randn(5, 6),
        "target": torch.tensor([0, 1, 4, IGNORED]),
        "bias": torch.randn(5),
        "class_weight": torch.rand(5),
        "grad_loss": torch.ones(1),
        "loss": torch.empty(1),
        "grad_x": torch.empty(4, 6),
        "grad_weight": torch.empty(5, 6),
        "grad_bias": torch.empty(5),
        "ignore_index": IGNORED,
        "label_smoothing": 0.1,
        "z_loss": 0.0,
        "softcap": 0.0,
        "reduction": "mean",
    }
    vectors = (
        "text",
        torch.randn(4, 6),
        torch.randn(3),
        torch.randn(10)[::2],
        torch.randn(5).double(),
        torch.ones(5).int(),
    )
    matrices = (
        "text",
        torch.randn(5, 5),
        torch.randn(3, 7),
        torch.randn(7),
        torch.randn(6, 4).T,
        torch.randn(6, 5).T,
        torch.randn(4, 6).double(),
        torch.randn(0, 6),
    )
    wrong: dict[str, tuple] = dict.fromkeys(("bias", "class_weight", "grad_loss", "grad_bias"), vectors)
    wrong |= dict.fromkeys(("grad_x", "grad_weight"), matrices)
    wrong |= dict.fromkeys(("x", "weight"), (None, *matrices))
    wrong["loss"] = (None, *vectors, torch.empty(1).expand(4))
    wrong["grad_x"] += (torch.empty(1, 6).expand(4, 6),)
    wrong["target"] = (None, *vectors, *(torch.tensor([0, 1, 4, bad]) for bad in (-1, 5, 2**40)))
    wrong["reduction"] = ("text", None)
    check_refused(_native.C.linear_cross_entropy, good, wrong)

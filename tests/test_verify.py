"""The numerics rule catches what it is there to catch."""

import copy

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import verify


def with_fast(change):
    """A function that is `x.exp()` under use_backend('eager') and change(x) otherwise."""

    def function(x: Tensor) -> Tensor:
        return x.exp() if fastattn.dispatch._forced == "eager" else change(x)

    return function


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.exp() * 1.01


def test_an_exact_function_passes() -> None:
    x = torch.randn(50, requires_grad=True)
    report = verify.check(with_fast(torch.exp), x)
    assert report.passed
    assert len(report.comparisons) == 2
    assert [c.name for c in report.comparisons] == ["output 0", "gradient of argument 0"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.exp() * 1.0001, "output 0: error"),
        (lambda x: _WrongGradient.apply(x), "gradient of argument 0: error"),
        (lambda x: torch.where(x == x.max(), torch.nan, x.exp()), "NaN or infinite"),
        (lambda x: x.exp()[:-1], "has shape"),
    ],
)
def test_a_wrong_function_fails_and_says_where(change, words: str) -> None:
    x = torch.randn(50, requires_grad=True)
    report = verify.check(with_fast(change), x)
    assert not report
    assert words in str(report)
    with pytest.raises(AssertionError, match="the numerics rule does not hold"):
        report.raise_if_failed()


def test_nan_and_infinity_must_stand_where_eager_has_them() -> None:
    x = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    assert verify.check(with_fast(torch.exp), x)
    assert not verify.check(with_fast(lambda x: torch.nan_to_num(x.exp())), x)


def test_rounding_of_the_dtype_passes_and_of_a_narrower_one_fails() -> None:
    x = torch.rand(1000)
    assert verify.check(with_fast(lambda x: x.double().exp().float()), x)
    assert not verify.check(with_fast(lambda x: x.bfloat16().exp().float()), x)


def test_dropout_is_compared_under_one_seed() -> None:
    x = torch.randn(2, 3, 8, 4, requires_grad=True)
    verify.check(lambda x: fastattn.attention(x, x, x, dropout_p=0.5), x).raise_if_failed()


def test_a_whole_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    fast = copy.deepcopy(model)
    x = torch.randn(5, 6)
    report = verify.check_model(fast, model, x)
    assert report.passed
    assert len(report.comparisons) == 1 + 4
    with torch.no_grad():
        fast[2].weight += 1e-3
    assert not verify.check_model(fast, model, x)

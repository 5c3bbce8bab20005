"""Cases for the tests of both norms, drawn by hypothesis."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Every remainder of the vector widths, rows of real models, and rows that are summed in several parts. For shorter ones see
# check_short_rows.
DIMS = st.one_of(st.integers(8, 70), st.sampled_from((96, 384, 768, 1000, 4099, 8200)))
LEADING = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second":
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


LAYOUTS = st.sampled_from(("contiguous", "transposed", "every second"))


@dataclass
class NormCase:
    """Arguments of one call of a norm, ready for verify.check."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    eps: float
    dropout_p: float


@st.composite
def norm_cases(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES, dims: st.SearchStrategy[int] = DIMS
) -> NormCase:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (*draw(LEADING), draw(dims))
    dtype = draw(st.sampled_from(dtypes))
    # Rows far from zero are hard for a variance, small ones for eps.
    scale, offset = draw(st.sampled_from(((1.0, 0.0), (1.0, 3.0), (1e-3, 0.0), (1e-2, -30.0), (100.0, 0.0))))

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale + offset
        return strided(values.to(dtype), draw(LAYOUTS)).requires_grad_()

    def affine() -> Tensor | None:
        kind = draw(st.sampled_from((None, dtype, torch.float32)))
        return None if kind is None else (torch.randn(shape[-1:], generator=generator) + 1).to(kind).requires_grad_()

    return NormCase(
        x=normal(shape, dtype),
        weight=affine(),
        bias=affine(),
        residual=normal(shape, dtype) if draw(st.booleans()) else None,
        eps=draw(st.sampled_from((1e-5, 1e-12, 1e-2))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 1.0))),
    )


def check_short_rows(norm: Callable, eager_norm: Callable, rows: int, dim: int, seed: int, centred: bool) -> None:
    """norm(x, weight) with eps 1e-5 against eager_norm in float64, in rows of a few elements.

    There the terms of x's gradient cancel, to nothing in layer norm's rows of one or two elements, and what is left in float32
    is the rounding of the terms, in eager as well: so the terms' size, not the result's, measures the error. So it is with
    x - mean where the elements of a row are almost equal.
    """
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(rows, dim, generator=generator) for _ in range(2))
    weight = torch.randn(dim, generator=generator)
    x.requires_grad_(), weight.requires_grad_()
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    out, reference = norm(x, weight), eager_norm(wide_x, wide_weight)
    grads = torch.autograd.grad(out, (x, weight), grad)
    reference_grads = torch.autograd.grad(reference, (wide_x, wide_weight), grad.double())

    eps = torch.finfo(torch.float32).eps
    normed = (reference / wide_weight).abs().max()
    values = wide_x.detach() - (wide_x.detach().mean(dim=-1, keepdim=True) if centred else 0.0)
    rstd = (1.0 / (values.square().mean(dim=-1) + 1e-5).sqrt()).max()
    terms = (grad * weight).abs().max()
    values_size = 1 + rstd * x.detach().abs().max() if centred else normed
    for name, got, expected, size in (
        ("output", out, reference, weight.abs().max() * values_size),
        ("gradient of x", grads[0], reference_grads[0], rstd * terms * (1 + normed * values_size)),
        ("gradient of weight", grads[1], reference_grads[1], rows * grad.abs().max() * values_size),
    ):
        error = (got - expected).abs().max()
        assert error <= 8 * eps * size, f"{name}: error {error}, allowed {8 * eps * size}"


def with_specials(x: Tensor, generator: torch.Generator) -> Tensor:
    """NaN and infinities at a few random places."""
    x = x.clone()
    for value in (float("nan"), float("inf"), float("-inf")):
        x.view(-1)[torch.randint(x.numel(), (1,), generator=generator)] = value
    return x


BAD_MATRICES = (
    torch.randn(4, 5),
    torch.randn(3, 6),
    torch.randn(6, 4).t(),
    torch.randn(4, 1).expand(4, 6),
    torch.randn(4, 6, dtype=torch.float64),
    torch.randn(4, 6).bfloat16(),
    torch.ones(4, 6, dtype=torch.int32),
    torch.empty(4, 6, device="meta"),
    torch.tensor(1.0),
    "text",
    3,
)
BAD_VECTORS = (
    torch.randn(5),
    torch.randn(12)[::2],
    torch.randn(1, 6),
    torch.ones(6, dtype=torch.int64),
    torch.ones(6).half(),
    1.0,
)


def check_refused(function: Callable, good: dict[str, Any], wrong: dict[str, tuple]) -> None:
    """A binding takes the good arguments, and refuses with a sentence each one that is made one of its wrong values."""
    function(**good)
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=r"\w+ \w+"):
                function(**{**good, name: value})


def check_every_argument(function: Callable, good: dict[str, Any]) -> None:
    """A kernel's binding takes these arguments on float32 (4, 6) matrices, and refuses each one that is made wrong."""
    wrong: dict[str, tuple] = {}
    for name, value in good.items():
        if not isinstance(value, Tensor):
            wrong[name] = (None, "text", float("nan"), -0.1, 1.5) if name == "dropout_p" else (None, "text")
        elif name == "seed":
            wrong[name] = (None, torch.tensor([1, 2]), torch.tensor([1.0]), torch.tensor([], dtype=torch.int64), 1)
        else:
            wrong[name] = BAD_MATRICES if value.ndim == 2 else BAD_VECTORS
    check_refused(function, good, wrong)

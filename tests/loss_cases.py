"""Cases for the tests of the losses, drawn by hypothesis."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from linear_cases import DEPTHS, SIZES, Values, leading
from norm_cases import DTYPES
from torch import Tensor

REDUCTIONS = st.sampled_from(("mean", "sum", "none"))
IGNORED = -100
CLASSES = st.one_of(SIZES, st.sampled_from((600, 1100)))
NEGATIVES = st.one_of(st.integers(1, 70), st.sampled_from((600, 1100)))


def wide(x: Tensor) -> torch.dtype:
    """The dtype of a loss of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def targets(rows: tuple[int, ...], classes: int, generator: torch.Generator, ignored: float = 0.2) -> Tensor:
    """Classes, and now and then IGNORED."""
    target = torch.randint(0, classes, rows, generator=generator)
    return target.masked_fill(torch.rand(rows, generator=generator) < ignored, IGNORED)


def judged_in_the_inputs_dtype(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, its one number rounded to the dtype of the inputs.

    For kernels that round logits to 16 bits as eager does: in one float32 number eager's roundings may happen to cancel.
    """

    def rounded(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = loss(first, *args, **kwargs)
        return out.to(first.dtype) if out.ndim == 0 else out

    return rounded


@st.composite
def cross_entropy_cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = DTYPES,
    sizes: st.SearchStrategy[int] = SIZES,
    depths: st.SearchStrategy[int] = DEPTHS,
    classes: st.SearchStrategy[int] = CLASSES,
) -> tuple[tuple, dict[str, Any]]:
    """Arguments of linear_cross_entropy."""
    rows, dim, number = draw(leading(sizes)), draw(depths), draw(classes)
    values = Values(draw, dtypes=tuple(dtypes))
    arguments = (
        values(*rows, dim),
        values.weight(number, dim),
        targets(rows, number, values.generator),
        values.maybe(number),
    )
    options = {
        "label_smoothing": draw(st.sampled_from((0.0, 0.1, 1.0))),
        "z_loss": draw(st.sampled_from((0.0, 1e-2))),
        "softcap": draw(st.sampled_from((None, 2.0))),
        "class_weight": torch.rand(number, generator=values.generator) if draw(st.booleans()) else None,
        "reduction": draw(REDUCTIONS),
    }
    return arguments, options


def contrast(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Rows whose products with one another are of size 1, with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * s[-1] ** -0.25).to(dtype).requires_grad_() for s in shapes]


@st.composite
def contrast_cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = DTYPES,
    sizes: st.SearchStrategy[int] = SIZES,
    depths: st.SearchStrategy[int] = DEPTHS,
    extra: st.SearchStrategy[int] = NEGATIVES,
) -> tuple:
    """Arguments of info_nce."""
    pairs, dim, more = draw(sizes), draw(depths), draw(extra)
    values = Values(draw, dtypes=tuple(dtypes))
    # Scores of size 1: where one candidate takes all, the errors of two or three scores are all there is, and one may be lucky.
    temperature = draw(st.sampled_from((0.07, 1.0, 30.0)))
    scale = min(temperature, 1.0) ** 0.5 * dim**-0.25
    query, positive = (values(pairs, dim, scale=scale) for _ in range(2))
    negatives = values(more, dim, scale=scale) if draw(st.booleans()) else None
    if draw(st.booleans()):
        temperature = torch.tensor([temperature]).requires_grad_(draw(st.booleans()))
    return query, positive, negatives, temperature, draw(st.booleans())

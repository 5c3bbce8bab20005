"""Cases for the tests of linear and feed_forward, drawn by hypothesis."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from isas import draw_dtype
from norm_cases import DTYPES, LAYOUTS, strided
from torch import Tensor

import fastattn

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")

# Every remainder of tiles and vectors; rows that are multiplied without packing, and ones that are not.
SMALL = st.integers(1, 70)
# Large enough for the rule: where a result has few elements, eager's error may happen to be nothing. The last ones are cut
# into several blocks along each dimension.
SIZES = st.one_of(st.integers(20, 70), st.sampled_from((97, 130, 270)))
DEPTHS = st.one_of(st.integers(1, 70), st.sampled_from((200, 384, 515)))


class Values:
    """Draws tensors of one dtype: their layouts and whether they require a gradient from hypothesis, their values not."""

    def __init__(self, draw: st.DrawFn, *, whole: bool = False, dtypes: tuple = DTYPES) -> None:
        self.draw, self.whole = draw, whole
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.dtype = draw_dtype(draw, dtypes)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        if self.whole:
            values = torch.randint(-3, 4, shape, generator=self.generator)
        else:
            values = torch.randn(shape, generator=self.generator) * scale
        tensor = strided(values.to(self.dtype), self.draw(LAYOUTS))
        return tensor.requires_grad_(self.draw(st.integers(0, 3)) > 0)

    def weight(self, rows: int, columns: int) -> Tensor:
        return self(rows, columns, scale=max(columns, 1) ** -0.5)

    def maybe(self, *shape: int) -> Tensor | None:
        return self(*shape) if self.draw(st.booleans()) else None


@st.composite
def leading(draw: st.DrawFn, rows: st.SearchStrategy[int]) -> tuple[int, ...]:
    """The dimensions before the features: none, one, or more, of `rows` rows at least."""
    count = draw(rows)
    return draw(st.sampled_from(((count,), (count,), (2, count), (count, 1, 2))))


def network(values: Values, rows: tuple[int, ...], inner: int, hidden: int, outer: int) -> tuple[Tensor | None, ...]:
    """The tensors of a feed-forward network: x, w1, b1, w2, b2, w_gate."""
    return (
        values(*rows, inner),
        values.weight(hidden, inner),
        values.maybe(hidden),
        values.weight(outer, hidden),
        values.maybe(outer),
        values.weight(hidden, inner) if values.draw(st.booleans()) else None,
    )


def check_exact(function: Callable, *arguments: Any, generator: torch.Generator, backend: str = "cpu") -> None:
    """Output and gradients are those of eager in float64, rounded once: for arguments of whole numbers, whose sums are exact."""
    wide = [_widened(x) for x in arguments]
    with fastattn.use_backend(backend):
        torch.manual_seed(0)
        out = function(*arguments)
    grad = torch.randint(-3, 4, out.shape, generator=generator).to(out)
    with fastattn.use_backend("eager"):
        torch.manual_seed(0)
        expected = function(*wide)
    for got, want in zip(_with_gradients(out, arguments, grad), _with_gradients(expected, wide, grad), strict=True):
        assert torch.equal(got, want.float().to(got.dtype))


def check_specials(function: Callable, *arguments: Any, backend: str = "cpu") -> None:
    """NaN and infinities of the output and of all gradients stand where the definition in float64 has them.

    The numerics rule compares with eager in the same dtype; but torch's float32 GELU makes NaN of infinity, and no other does.
    """
    wide = [_widened(x) for x in arguments]
    with fastattn.use_backend(backend):
        out = function(*arguments)
    with fastattn.use_backend("eager"):
        expected = function(*wide)
    ones = torch.ones_like(out)
    for got, want in zip(_with_gradients(out, arguments, ones), _with_gradients(expected, wide, ones), strict=True):
        for value in (float("inf"), float("-inf")):
            assert torch.equal(got == value, want == value)
        assert torch.equal(got.isnan(), want.isnan())


def _widened(x: Any) -> Any:
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _with_gradients(out: Tensor, arguments: Sequence[Any], grad: Tensor) -> list[Tensor]:
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    return [out, *(torch.autograd.grad(out, leaves, grad.to(out.dtype)) if leaves else ())]


# Wrong for a binding that expects float32 (4, 6) rows, or a (6,) vector.
MATRICES = (
    torch.randn(4, 5),
    torch.randn(3, 7),
    torch.randn(4, 6, 2)[..., 0],
    torch.randn(4, 6).double(),
    torch.randn(4, 6).half(),
    torch.ones(4, 6, dtype=torch.int32),
    torch.empty(4, 6, device="meta"),
    torch.tensor(1.0),
    torch.randn(2, 3, 4, 6).transpose(0, 2),
    "text",
    3,
)
VECTORS = (
    torch.randn(5),
    torch.randn(12)[::2],
    torch.randn(1, 6),
    torch.ones(6).half(),
    torch.ones(6).expand(6, 6),
    1.0,
)

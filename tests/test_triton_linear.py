"""Linear in Triton, against the eager definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import ACTIVATIONS, Values, check_exact, check_specials, leading
from norm_cases import with_specials
from torch import Tensor
from triton_backend import (
    DEVICE,
    DTYPES,
    WITH_ENGINE,
    check,
    chips,
    dtypes,
    kernels_of,
    needs_engine,
    needs_triton,
    on_device,
)

import fastattn
from fastattn.backends.triton import configs
from fastattn.backends.triton.chips import use_chip
from fastattn.backends.triton.configs import Config, Row

pytestmark = needs_triton

# The tiles for 16 rows, for 64 and the large ones, crossed in each dimension; enough elements for the rule to judge.
ROWS = st.one_of(st.integers(9, 16), st.integers(17, 64), st.sampled_from((65, 130, 150)))
# In 16 bits, rows of other than a multiple of 16 bytes have tiles of their own.
DEPTHS = st.one_of(st.integers(1, 70), st.sampled_from((130, 300)), st.sampled_from((8, 64, 72, 304)))
COLUMNS = st.one_of(st.integers(20, 70), st.sampled_from((130, 270)), st.sampled_from((24, 64, 136, 272)))


@settings(max_examples=16)
@given(data=st.data(), chip=chips)
def test_outputs_and_gradients_obey_the_numerics_rule(data: st.DataObject, chip: str) -> None:
    draw = data.draw
    rows, depth, columns = draw(leading(ROWS)), draw(DEPTHS), draw(COLUMNS)
    values = Values(draw, dtypes=DTYPES)
    arguments = (
        values(*rows, depth),
        values.weight(columns, depth),
        values.maybe(columns),
        draw(st.sampled_from(ACTIVATIONS)),
    )
    check(fastattn.linear, chip, *arguments, residual=values.maybe(*rows, columns))


@settings(max_examples=15)
@given(data=st.data(), chip=chips)
def test_whole_numbers_are_exact(data: st.DataObject, chip: str) -> None:
    draw = data.draw
    rows, depth, columns = draw(leading(st.integers(1, 70))), draw(st.integers(1, 70)), draw(st.integers(1, 140))
    values = Values(draw, whole=True, dtypes=DTYPES)
    inputs = on_device(
        (values(*rows, depth), values(columns, depth), values.maybe(columns), values.maybe(*rows, columns))
    )
    activation = draw(st.sampled_from((None, "relu")))
    with use_chip(chip):
        check_exact(fastattn.linear, *inputs[:3], activation, inputs[3], generator=values.generator, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1600, 20, 30), (1600, 24, 32), (40, 1100, 25), (40, 1104, 24)])
def test_long_sums_are_split(dtype: torch.dtype, rows: int, depth: int, columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, depth).to(dtype).requires_grad_()
    weight = (torch.randn(columns, depth) * depth**-0.5).to(dtype).t().contiguous().t().requires_grad_()
    check(fastattn.linear, "sm_90", x, weight)
    check(fastattn.linear, "sm_90", x, weight, torch.randn(columns).to(dtype).requires_grad_(), "gelu")


@needs_engine
@settings(max_examples=12)
@given(data=st.data(), chip=st.sampled_from(WITH_ENGINE or ("sm_90",)))
def test_operands_by_the_copy_engine_obey_the_numerics_rule(data: st.DataObject, chip: str) -> None:
    """Rows and columns of which tiles and programs are left over, operands along either dimension; four tiles at least, for
    fewer go elsewhere."""
    draw = data.draw
    rows, depth, columns = (8 * draw(st.integers(low, high)) for low, high in ((17, 40), (1, 20), (33, 60)))
    values = Values(draw, dtypes=(torch.float16,))
    x, weight = (torch.randn(shape, generator=values.generator).half() for shape in ((rows, depth), (columns, depth)))
    weight /= depth**0.5
    x, weight = (m.t().contiguous().t() if draw(st.booleans()) else m for m in (x, weight))
    with use_chip(chip):
        launched = kernels_of(lambda: fastattn.linear(on_device(x), on_device(weight)))
    assert launched == ["matmul_persistent"]
    arguments = x.requires_grad_(), weight.requires_grad_(), values.maybe(columns), draw(st.sampled_from(ACTIVATIONS))
    check(fastattn.linear, chip, *arguments, residual=values.maybe(rows, columns))


def test_operands_that_the_copy_engine_cannot_read_go_to_the_other_kernel() -> None:
    x, weight = torch.randn(200, 64, device=DEVICE).half(), torch.randn(300, 64, device=DEVICE).half()
    odd = torch.randn(200, 65, device=DEVICE).half()
    for a, b in ((odd[:, 1:], weight), (odd[:, :64], weight), (odd[:, :63], weight[:, :63])):
        with use_chip("sm_90"):
            assert kernels_of(lambda a=a, b=b: fastattn.linear(a, b)) == ["matmul"]
    with use_chip("sm_80"):
        assert kernels_of(lambda: fastattn.linear(x, weight)) == ["matmul"]


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("affine", [False, True])
def test_a_row_of_the_table_may_leave_the_product_to_torch(
    monkeypatch: pytest.MonkeyPatch, activation: str | None, affine: bool
) -> None:
    monkeypatch.setattr(configs, "TABLE", (Row("matmul", Config(library=True)), *configs.TABLE))
    torch.manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(s).half().requires_grad_() for s in ((70, 33), (300, 33), (300,), (70, 300))
    )
    more = {"bias": bias, "residual": residual} if affine else {}
    check(fastattn.linear, "sm_90", x, weight, activation=activation, **more)


@settings(max_examples=12)
@given(dtype=dtypes, activation=st.sampled_from(ACTIVATIONS), seed=st.integers(0, 1000), chip=chips)
def test_nan_and_infinity_stand_where_the_definition_has_them(
    dtype: torch.dtype, activation: str | None, seed: int, chip: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, residual = (torch.randn(s, generator=generator).to(dtype) for s in ((70, 33), (50, 33), (70, 50)))
    x, residual = with_specials(x, generator).requires_grad_(), with_specials(residual, generator)
    arguments = on_device((x, weight.requires_grad_(), None, activation, residual))
    with use_chip(chip):
        check_specials(fastattn.linear, *arguments, backend="triton")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_special_values(activation: str | None, dtype: torch.dtype) -> None:
    values = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 60000.0, -60000.0, 1e-30, 100.0, -100.0]
    x = torch.tensor(values).to(dtype).unsqueeze(1).requires_grad_()
    arguments = on_device((x, torch.ones(1, 1, dtype=dtype), None, activation))
    check_specials(fastattn.linear, *arguments, backend="triton")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [1.0, 6.0, 20.0])
def test_activations_obey_the_numerics_rule(activation: str | None, dtype: torch.dtype, limit: float) -> None:
    x = torch.linspace(-limit, limit, 1001).to(dtype).unsqueeze(1).requires_grad_()
    check(fastattn.linear, "sm_90", x, torch.ones(1, 1, dtype=dtype), None, activation)


@pytest.mark.parametrize(("rows", "depth", "columns"), [(0, 3, 5), (3, 0, 5), (3, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_empty_sizes(rows: int, depth: int, columns: int, activation: str | None) -> None:
    shapes = (rows, depth), (columns, depth), (columns,), None, (rows, columns)
    arguments = [activation if shape is None else torch.randn(shape, requires_grad=True) for shape in shapes]
    check(fastattn.linear, "sm_90", *arguments)


def test_a_vector_and_gradients_in_the_layout_of_their_inputs() -> None:
    vector, weight = on_device((torch.randn(5), torch.randn(6, 5).t().requires_grad_()))
    x = on_device(torch.randn(6, 3, 4)).permute(2, 1, 0).requires_grad_()
    check(fastattn.linear, "sm_90", vector, weight.t().detach())
    with fastattn.use_backend("triton"):
        # The sum's gradient is one number, expanded.
        grads = torch.autograd.grad(fastattn.linear(x, weight, None, "gelu").sum(), (x, weight))
    for grad, tensor in zip(grads, (x, weight), strict=True):
        assert grad.stride() == torch.empty_like(tensor).stride()


@pytest.mark.parametrize(
    ("x", "weight", "why"),
    [
        (torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64), "float64"),
        (torch.randn(2, 3), torch.randn(4, 3).half(), "share one dtype"),
    ],
)
def test_unsupported_says_why(x: Tensor, weight: Tensor, why: str) -> None:
    from fastattn.backends.triton import linear

    assert why in linear.unsupported(x.to(DEVICE), weight.to(DEVICE), None, None, "none", False)

"""Linear with its activation and residual on the CPU, against the eager definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import (
    ACTIVATIONS,
    DEPTHS,
    MATRICES,
    SIZES,
    SMALL,
    VECTORS,
    Values,
    check_exact,
    check_specials,
    leading,
)
from norm_cases import DTYPES, check_refused, with_specials
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native, linear


@given(data=st.data())
def test_outputs_and_gradients_obey_the_numerics_rule(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    rows, depth, columns = draw(leading(SIZES)), draw(DEPTHS), draw(SIZES)
    values = Values(draw)
    arguments = (
        values(*rows, depth),
        values.weight(columns, depth),
        values.maybe(columns),
        draw(st.sampled_from(ACTIVATIONS)),
    )
    residual = values.maybe(*rows, columns)
    verify.check(fastattn.linear, *arguments, residual=residual, backend="cpu").raise_if_failed()


@given(data=st.data())
def test_whole_numbers_are_exact(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    rows, depth, columns = draw(leading(SMALL)), draw(st.one_of(SMALL, DEPTHS)), draw(st.one_of(SMALL, SIZES))
    values = Values(draw, whole=True)
    inputs = (values(*rows, depth), values(columns, depth), values.maybe(columns), values.maybe(*rows, columns))
    activation = draw(st.sampled_from((None, "relu")))
    check_exact(fastattn.linear, *inputs[:3], activation, inputs[3], generator=values.generator)


@given(data=st.data())
def test_few_rows_are_exact(isa: str, data: st.DataObject) -> None:
    """Columns of the weight around a page, which are read one by one or side by side: with nothing between them, with other
    columns between them, and all the same one. Sums of whole numbers up to 3 are exact in any order."""
    draw = data.draw
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 300))
    depth = draw(
        st.one_of(st.integers(1, 200), st.sampled_from((383, 384, 400, 1000, 1023, 1024, 1025, 2047, 2048, 2100)))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, weight = (torch.randint(-3, 4, (n, depth), generator=generator).float() for n in (rows, columns))
    layout = draw(st.sampled_from(("whole", "between others", "the same")))
    if layout == "between others":
        weight = weight.repeat_interleave(2, dim=0)[::2]
    elif layout == "the same":
        weight = weight[:1].expand(columns, depth)
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    with fastattn.use_backend("cpu"):
        out = fastattn.linear(x.to(dtype), weight.to(dtype))
    assert torch.equal(out, (x @ weight.t()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(3000, 40, 50), (9000, 33, 20), (70, 8200, 40)])
def test_long_sums(isa: str, dtype: torch.dtype, rows: int, depth: int, columns: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        (torch.randn(shape) * scale).to(dtype).requires_grad_()
        for shape, scale in (((rows, depth), 1.0), ((columns, depth), depth**-0.5), ((columns,), 1.0))
    )
    verify.check(fastattn.linear, x, weight, bias, "gelu", backend="cpu").raise_if_failed()


@given(
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 1000),
    rows=st.integers(8, 40),
)
def test_nan_and_infinity_stand_where_the_definition_has_them(
    isa: str, dtype: torch.dtype, activation: str | None, seed: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, residual = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 33), (50, 33), (rows, 50))
    )
    x, residual = with_specials(x, generator).requires_grad_(), with_specials(residual, generator)
    check_specials(fastattn.linear, x, weight.requires_grad_(), None, activation, residual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_special_values(isa: str, activation: str | None, dtype: torch.dtype) -> None:
    values = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 60000.0, -60000.0, 1e-30, 100.0, -100.0]
    x = torch.tensor(values).to(dtype).unsqueeze(1).requires_grad_()
    check_specials(fastattn.linear, x, torch.ones(1, 1, dtype=dtype), None, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [1.0, 6.0, 20.0])
def test_activations_obey_the_numerics_rule(isa: str, activation: str | None, dtype: torch.dtype, limit: float) -> None:
    x = torch.linspace(-limit, limit, 4001).to(dtype).unsqueeze(1).requires_grad_()
    weight = torch.ones(1, 1, dtype=dtype)
    verify.check(fastattn.linear, x, weight, None, activation, backend="cpu").raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(300, 257, 530), (3, 700, 1100), (40, 600, 300), (9000, 20, 70)]
)
def test_bits_do_not_depend_on_threads(isa, same_bits_at_any_thread_count, dtype, rows, depth, columns) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).to(dtype).requires_grad_() for s in ((rows, depth), (columns, depth), (columns,)))

    def run() -> list[Tensor]:
        with fastattn.use_backend("cpu"):
            out = fastattn.linear(x, weight, bias, "silu")
            return [out, *torch.autograd.grad(out.float().square().sum(), (x, weight, bias))]

    same_bits_at_any_thread_count(run)


@pytest.mark.parametrize(("rows", "depth", "columns"), [(0, 3, 5), (3, 0, 5), (3, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_empty_sizes(isa: str, rows: int, depth: int, columns: int, activation: str | None) -> None:
    shapes = (rows, depth), (columns, depth), (columns,), None, (rows, columns)
    arguments = [activation if shape is None else torch.randn(shape, requires_grad=True) for shape in shapes]
    verify.check(fastattn.linear, *arguments, backend="cpu").raise_if_failed()


def test_gradients_have_the_layout_of_their_inputs(isa: str) -> None:
    weight = torch.randn(6, 5).t().requires_grad_()
    x = torch.randn(6, 3, 4).permute(2, 1, 0).requires_grad_()
    with fastattn.use_backend("cpu"):
        grads = torch.autograd.grad(fastattn.linear(x, weight, None, "gelu").sum(), (x, weight))
    for grad, tensor in zip(grads, (x, weight), strict=True):
        assert grad.stride() == torch.empty_like(tensor).stride()


@pytest.mark.parametrize(
    ("x", "weight", "why"),
    [
        (torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64), "float64"),
        (torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta"), "CPU"),
        (torch.randn((1,) * 8 + (3,)), torch.randn(4, 3), "8 dimensions"),
        (torch.randn(2, 3), torch.randn(4, 3).bfloat16(), "share one dtype"),
    ],
)
def test_unsupported_says_why(x: Tensor, weight: Tensor, why: str) -> None:
    assert why in linear.unsupported(x, weight, None, None, "none", False)


def test_no_argument_reaches_the_forward_unchecked() -> None:
    good = {
        "x": torch.randn(4, 3),
        "weight": torch.randn(6, 3),
        "bias": torch.randn(6),
        **{name: torch.randn(4, 6) for name in ("residual", "out", "pre")},
        "activation": "gelu",
    }
    outputs = (*MATRICES, torch.randn(4, 1).expand(4, 6), torch.randn(6).expand(4, 6))
    wrong = {
        "x": (None, *MATRICES),
        "weight": (None, *MATRICES, torch.randn(6)),
        "bias": VECTORS,
        "residual": MATRICES,
        "out": (None, *outputs),
        "pre": outputs,
        "activation": (None, "sigmoid", 3),
    }
    check_refused(_native.C.linear_forward, good, wrong)


def test_no_argument_reaches_the_backward_unchecked() -> None:
    good = {
        "grad_out": torch.randn(4, 6),
        "x": torch.randn(4, 3),
        "weight": torch.randn(6, 3),
        "pre": torch.randn(4, 6),
        "grad_x": torch.empty(4, 3),
        "grad_weight": torch.empty(6, 3),
        "grad_bias": torch.empty(6),
        "activation": "gelu",
    }
    wrong = {
        "grad_out": (None, *MATRICES),
        "x": (None, *MATRICES),
        "weight": (None, *MATRICES),
        "pre": (None, *MATRICES),
        "grad_x": (*MATRICES, torch.randn(4, 1).expand(4, 3)),
        "grad_weight": (*MATRICES, torch.randn(6, 6)[:, ::2], torch.randn(3).expand(6, 3)),
        "grad_bias": (*VECTORS, torch.randn(1).expand(6)),
        "activation": (None, "sigmoid"),
    }
    check_refused(_native.C.linear_backward, good, wrong)


def test_a_freed_storage_is_refused() -> None:
    out = torch.empty(4, 6)
    out.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed"):
        _native.C.linear_forward(torch.randn(4, 3), torch.randn(6, 3), None, None, out, None, "none")

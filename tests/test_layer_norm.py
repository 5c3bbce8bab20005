"""Residual add, dropout and layer norm on the CPU, against the eager definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import DTYPES, NormCase, check_every_argument, check_short_rows, norm_cases, with_specials

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native, layer_norm
from fastattn.backends.eager import dropout as eager_dropout
from fastattn.backends.eager import layer_norm as eager_layer_norm


@given(case=norm_cases())
def test_outputs_and_gradients_obey_the_numerics_rule(isa: str, case: NormCase) -> None:
    verify.check(
        fastattn.layer_norm,
        case.x,
        case.weight,
        case.bias,
        case.eps,
        residual=case.residual,
        dropout_p=case.dropout_p,
        backend="cpu",
    ).raise_if_failed()


@given(rows=st.integers(1, 20), dim=st.integers(1, 7), seed=st.integers(0, 2**31))
def test_short_rows(isa: str, rows: int, dim: int, seed: int) -> None:
    with fastattn.use_backend("cpu"):
        check_short_rows(
            lambda x, weight: fastattn.layer_norm(x, weight, eps=1e-5),
            lambda x, weight: eager_layer_norm.forward(x, weight, None, None, None, 1e-5, 0.0)[0],
            rows,
            dim,
            seed,
            centred=True,
        )


@given(rows=st.integers(1, 40), dim=st.integers(1, 70), p=st.sampled_from((0.1, 0.5, 0.999, 1.0)), seed=st.integers())
def test_dropout_drops_what_eager_drops(isa: str, rows: int, dim: int, p: float, seed: int) -> None:
    seed_tensor = torch.tensor([(seed + 2**63) % 2**64 - 2**63])
    x = torch.ones(rows, dim)
    _, total, _, _ = layer_norm.forward(x, None, None, None, seed_tensor, 1e-5, p)
    torch.testing.assert_close(total, eager_dropout.dropout(x, seed_tensor, p), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_bits_do_not_depend_on_threads(isa, same_bits_at_any_thread_count, dtype, dropout_p) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(1000, 257).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(257, requires_grad=True) for _ in range(2))

    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        with fastattn.use_backend("cpu"):
            out, total = fastattn.layer_norm(x, weight, bias, residual=residual, dropout_p=dropout_p)
            grads = torch.autograd.grad((out.float().square().sum() + total.float().sum()), (x, residual, weight, bias))
        return [out, total, *grads]

    same_bits_at_any_thread_count(run)


@given(seed=st.integers(0, 1000), dim=st.integers(1, 70), dtype=st.sampled_from(DTYPES))
def test_nan_and_infinity_propagate_as_in_eager(isa: str, seed: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = with_specials(torch.randn(12, dim, generator=generator).to(dtype), generator).requires_grad_()
    residual = torch.randn(12, dim, generator=generator).to(dtype).requires_grad_()
    weight, bias = (torch.randn(dim, generator=generator).requires_grad_() for _ in range(2))
    verify.check(fastattn.layer_norm, x, weight, bias, residual=residual, backend="cpu").raise_if_failed()


def test_no_rows_and_no_features(isa: str) -> None:
    weight, bias = torch.ones(5, requires_grad=True), torch.ones(5, requires_grad=True)
    with fastattn.use_backend("cpu"):
        out = fastattn.layer_norm(torch.randn(3, 0, 5), weight, bias)
        out.sum().backward()
        assert fastattn.layer_norm(torch.randn(3, 0)).shape == (3, 0)
    assert out.shape == (3, 0, 5)
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.randn(2, 3, dtype=torch.float64), "float64"),
        (torch.empty(2, 3, device="meta"), "CPU"),
        (torch.randn((1,) * 8 + (3,)), "8 dimensions"),
    ],
)
def test_unsupported_says_why(x: torch.Tensor, why: str) -> None:
    assert why in layer_norm.unsupported(x, None, None, None, None, 1e-5, 0.0)


def forward_arguments() -> dict:
    x = torch.randn(4, 6)
    return {
        "x": x,
        "weight": torch.ones(6),
        "bias": torch.ones(6),
        "residual": x,
        "seed": torch.tensor([1]),
        "out": torch.empty(4, 6),
        "sum": torch.empty(4, 6),
        "mean": torch.empty(4),
        "rstd": torch.empty(4),
        "eps": 1e-5,
        "dropout_p": 0.5,
    }


def backward_arguments() -> dict:
    names = ("grad_out", "grad_sum", "sum", "grad_residual", "grad_x")
    return {
        **{name: torch.randn(4, 6) for name in names},
        **{name: torch.randn(6) for name in ("weight", "grad_weight", "grad_bias")},
        "mean": torch.zeros(4),
        "rstd": torch.ones(4),
        "seed": torch.tensor([1]),
        "dropout_p": 0.5,
    }


@pytest.mark.parametrize("kernel", ["layer_norm_forward", "layer_norm_backward"])
def test_no_argument_reaches_the_kernel_unchecked(kernel: str) -> None:
    check_every_argument(
        getattr(_native.C, kernel), forward_arguments() if kernel.endswith("forward") else backward_arguments()
    )


def test_a_freed_storage_is_refused() -> None:
    arguments = forward_arguments()
    arguments["out"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed"):
        _native.C.layer_norm_forward(**arguments)

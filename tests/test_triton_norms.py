"""Layer norm and RMS norm in Triton, against the eager definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import NormCase, check_short_rows, norm_cases, with_specials
from triton_backend import DEVICE, DTYPES, check, chips, dtypes, needs_triton

import fastattn
from fastattn.backends.eager import dropout as eager_dropout

pytestmark = needs_triton

# Each width of the table of configurations, and what lies between.
DIMS = st.one_of(st.integers(8, 70), st.sampled_from((128, 200, 384, 513, 1000, 2049, 4097, 8200)))
cases = norm_cases(DTYPES, DIMS)
NORMS = (fastattn.layer_norm, fastattn.rms_norm)


@given(case=cases, chip=chips, norm=st.sampled_from(NORMS))
def test_outputs_and_gradients_obey_the_numerics_rule(case: NormCase, chip: str, norm) -> None:
    affine = (case.weight, case.bias) if norm is fastattn.layer_norm else (case.weight,)
    check(norm, chip, case.x, *affine, case.eps, residual=case.residual, dropout_p=case.dropout_p)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dim", [60, 120, 250, 500, 1000, 2000, 4000, 8000, 16000])
def test_every_row_of_the_table(norm, dim: int) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(5, dim, requires_grad=True) for _ in range(2))
    affine = [torch.randn(dim, requires_grad=True) for _ in range(2 if norm is fastattn.layer_norm else 1)]
    check(norm, "sm_90", x, *affine, residual=residual, dropout_p=0.1)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the rows are drawn on the CPU")
@pytest.mark.parametrize("norm", NORMS)
@given(rows=st.integers(1, 20), dim=st.integers(1, 7), seed=st.integers(0, 2**31))
def test_short_rows(norm, rows: int, dim: int, seed: int) -> None:
    def eager(x, weight):
        with fastattn.use_backend("eager"):
            return norm(x, weight, eps=1e-5)

    def interpreted(x, weight):
        with fastattn.use_backend("triton"):
            return norm(x, weight, eps=1e-5)

    check_short_rows(interpreted, eager, rows, dim, seed, centred=norm is fastattn.layer_norm)


@given(rows=st.integers(1, 40), dim=st.integers(1, 70), p=st.sampled_from((0.1, 0.5, 0.999, 1.0)), seed=st.integers())
def test_dropout_drops_what_eager_drops(rows: int, dim: int, p: float, seed: int) -> None:
    from fastattn.backends.triton import rms_norm

    seed_tensor = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=DEVICE)
    x = torch.ones(rows, dim, device=DEVICE)
    _, total, _ = rms_norm.forward(x, None, None, seed_tensor, 1e-5, p)
    torch.testing.assert_close(total, eager_dropout.dropout(x, seed_tensor, p), rtol=0, atol=0)


@given(seed=st.integers(0, 1000), dim=st.integers(1, 70), dtype=dtypes, chip=chips)
def test_nan_and_infinity_propagate_as_in_eager(seed: int, dim: int, dtype: torch.dtype, chip: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = with_specials(torch.randn(12, dim, generator=generator).to(dtype), generator).requires_grad_()
    residual = torch.randn(12, dim, generator=generator).to(dtype).requires_grad_()
    weight, bias = (torch.randn(dim, generator=generator).requires_grad_() for _ in range(2))
    check(fastattn.layer_norm, chip, x, weight, bias, residual=residual)


@pytest.mark.parametrize("norm", NORMS)
def test_many_rows_go_through_few_programs(norm) -> None:
    """More tiles than the backward has programs: the sums of weight's gradient run over all of them."""
    torch.manual_seed(0)
    x = torch.randn(301, 70, requires_grad=True)
    check(norm, "sm_90", x, torch.randn(70, requires_grad=True), dropout_p=0.2)


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows_and_no_features(norm) -> None:
    weight = torch.ones(5, requires_grad=True, device=DEVICE)
    with fastattn.use_backend("triton"):
        out = norm(torch.randn(3, 0, 5, device=DEVICE), weight)
        out.sum().backward()
        assert norm(torch.randn(3, 0, device=DEVICE)).shape == (3, 0)
    assert out.shape == (3, 0, 5)
    assert not weight.grad.any()


@pytest.mark.parametrize("norm", NORMS)
def test_rows_that_fit_no_registers_are_refused_with_the_reason(norm) -> None:
    reason = fastattn.explain(norm.__name__, torch.empty(1, 20_000, device=DEVICE)).reasons["triton"]
    assert "at most 16384 features, and these have 20000" in reason

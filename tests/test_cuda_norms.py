"""Layer norm and RMS norm in CUDA, against the eager definition: on a GPU, or in the emulation of its blocks and warps."""

import pytest
import torch
from cuda_backend import DEVICE, check, needs_cuda
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import DTYPES, NormCase, check_short_rows, norm_cases, with_specials

import fastattn
from fastattn.backends import BACKENDS
from fastattn.backends.cuda import _native
from fastattn.backends.eager import dropout as eager_dropout

pytestmark = needs_cuda

# Rows by a warp and by blocks of each size, one to four vectors a thread, aligned and not.
DIMS = st.one_of(
    st.integers(16, 70), st.sampled_from((128, 200, 384, 513, 768, 1000, 1024, 2048, 2056, 4099, 8192, 9000))
)
NORMS = (fastattn.layer_norm, fastattn.rms_norm)


@given(case=norm_cases(DTYPES, DIMS), norm=st.sampled_from(NORMS))
def test_outputs_and_gradients_obey_the_numerics_rule(case: NormCase, norm) -> None:
    affine = (case.weight, case.bias) if norm is fastattn.layer_norm else (case.weight,)
    check(norm, case.x, *affine, case.eps, residual=case.residual, dropout_p=case.dropout_p)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the rows are drawn on the CPU")
@pytest.mark.parametrize("norm", NORMS)
@given(rows=st.integers(1, 20), dim=st.integers(1, 15), seed=st.integers(0, 2**31))
def test_short_rows(norm, rows: int, dim: int, seed: int) -> None:
    def on(backend: str):
        def call(x, weight):
            with fastattn.use_backend(backend):
                return norm(x, weight, eps=1e-5)

        return call

    check_short_rows(on("cuda"), on("eager"), rows, dim, seed, centred=norm is fastattn.layer_norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [9000, 16384])
def test_the_longest_rows(dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, dim).to(dtype).requires_grad_(), torch.randn(dim, requires_grad=True)
    check(fastattn.layer_norm, x, weight, weight.detach().clone().requires_grad_(), residual=x.detach().clone())


@pytest.mark.parametrize("norm", NORMS)
def test_more_rows_than_programs(norm) -> None:
    torch.manual_seed(0)
    x = torch.randn(150, 70, requires_grad=True)
    check(norm, x, torch.randn(70, requires_grad=True), dropout_p=0.2)


@given(rows=st.integers(1, 40), dim=st.integers(1, 70), p=st.sampled_from((0.1, 0.5, 0.999, 1.0)), seed=st.integers())
def test_dropout_drops_what_eager_drops(rows: int, dim: int, p: float, seed: int) -> None:
    seed_tensor = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=DEVICE)
    x = torch.ones(rows, dim, device=DEVICE)
    _, total, _ = BACKENDS["cuda"]["rms_norm"].forward(x, None, None, seed_tensor, 1e-5, p)
    torch.testing.assert_close(total, eager_dropout.dropout(x, seed_tensor, p), rtol=0, atol=0)


@given(seed=st.integers(0, 1000), dim=st.integers(1, 70), dtype=st.sampled_from(DTYPES))
def test_nan_and_infinity_propagate_as_in_eager(seed: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = with_specials(torch.randn(12, dim, generator=generator).to(dtype), generator).requires_grad_()
    residual = torch.randn(12, dim, generator=generator).to(dtype).requires_grad_()
    weight, bias = (torch.randn(dim, generator=generator).requires_grad_() for _ in range(2))
    check(fastattn.layer_norm, x, weight, bias, residual=residual)


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows_and_no_features(norm) -> None:
    weight = torch.ones(5, requires_grad=True, device=DEVICE)
    with fastattn.use_backend("cuda"):
        out = norm(torch.randn(3, 0, 5, device=DEVICE), weight)
        out.sum().backward()
        assert norm(torch.randn(3, 0, device=DEVICE)).shape == (3, 0)
    assert out.shape == (3, 0, 5)
    assert not weight.grad.any()


@pytest.mark.parametrize("norm", NORMS)
def test_rows_that_fit_no_registers_are_refused_with_the_reason(norm) -> None:
    reason = fastattn.explain(norm.__name__, torch.empty(1, 20_000, device=DEVICE)).reasons["cuda"]
    assert "at most 16384 features, and these have 20000" in reason


def test_no_wrong_tensor_gets_an_address() -> None:
    like = torch.empty(4, 6, device=DEVICE)
    good = torch.empty(4, 6, device=DEVICE)
    assert _native.address(good, "x", like, (4, 6), torch.float32) == good.data_ptr()
    assert _native.address(None, "x", like, (4, 6), torch.float32) == 0
    for wrong in (good.double(), good[:3], good.t(), good[:, :1].expand(4, 6), torch.empty(4, 6, device="meta")):
        with pytest.raises(ValueError, match=r"x (is|has)"):
            _native.address(wrong, "x", like, (4, 6), torch.float32)

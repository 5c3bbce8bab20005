"""Rotary position embedding in Triton, against the eager definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import with_specials
from rotary_cases import rotary_calls
from triton_backend import DEVICE, DTYPES, check, chips, dtypes, needs_triton

import fastattn

pytestmark = needs_triton


@settings(max_examples=25)
@given(call=rotary_calls(DTYPES, most_heads=6), chip=chips)
def test_outputs_and_gradients_obey_the_numerics_rule(call: tuple, chip: str) -> None:
    check(fastattn.rotary_embedding, chip, *call)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [512, 600])
def test_long_sequences_and_wide_heads(interleaved: bool, rotary_dim: int) -> None:
    """Several tiles of positions, and of pairs."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 70, 600, requires_grad=True), torch.randn(1, 1, 70, 600, requires_grad=True)
    check(fastattn.rotary_embedding, "sm_90", q, k, *torch.randn(2, 70, rotary_dim), interleaved)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), interleaved=st.booleans(), dtype=dtypes, chip=chips)
def test_nan_and_infinity_propagate_as_in_eager(seed: int, interleaved: bool, dtype: torch.dtype, chip: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (with_specials(torch.randn(1, 2, 6, 24, generator=generator).to(dtype), generator) for _ in range(2))
    cos, sin = (torch.randn(6, 22, generator=generator) for _ in range(2))
    check(fastattn.rotary_embedding, chip, q, k, cos, sin, interleaved)


def test_results_lie_in_memory_as_the_inputs_do() -> None:
    q = torch.randn(2, 7, 4, 16, device=DEVICE).transpose(1, 2)
    with fastattn.use_backend("triton"):
        out, _ = fastattn.rotary_embedding(q, q, *torch.randn(2, 7, 16, device=DEVICE))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"q": torch.randn(1, 2, 3, 4).double(), "k": torch.randn(1, 2, 3, 4).double()}, "float64"),
        ({"cos": torch.randn(3, 4, requires_grad=True)}, "cos and sin"),
        ({"sin": torch.randn(3, 4, dtype=torch.float64)}, "float64"),
    ],
)
def test_unsupported_says_why(change: dict, why: str) -> None:
    from fastattn.backends.triton import rotary_embedding

    x, angles = torch.randn(1, 2, 3, 4), torch.randn(3, 4)
    arguments = {"q": x, "k": x, "cos": angles, "sin": angles, **change}
    arguments = {name: x.detach().to(DEVICE).requires_grad_(x.requires_grad) for name, x in arguments.items()}
    assert why in rotary_embedding.unsupported(**arguments, interleaved=False)

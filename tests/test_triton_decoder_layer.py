"""The decoder layer in Triton, a composition of the other kernels, against the eager definition."""

import pytest
import torch
from decoder_cases import cases, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_backend import DEVICE, check, chips, dtypes, needs_triton

pytestmark = needs_triton


@settings(max_examples=16)
@given(data=st.data(), dtype=dtypes, chip=chips)
def test_outputs_and_caches_obey_the_numerics_rule(data: st.DataObject, dtype: torch.dtype, chip: str) -> None:
    tensors, options = cases(data.draw, dtype)
    check(run, chip, *tensors, **options)


@pytest.mark.parametrize(("width", "head_dim", "why"), [(17000, 32, "16384 features"), (32, 520, "at most 512")])
def test_unsupported_says_why(width: int, head_dim: int, why: str) -> None:
    from fastattn.backends.triton import decoder_layer

    args = [value.to(DEVICE) for value in weights(width, 1, 1, head_dim, 8, torch.float32).values()]
    x, cache = torch.zeros(1, 2, width, device=DEVICE), torch.zeros(1, 1, 4, head_dim, device=DEVICE)
    lengths = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert why in decoder_layer.unsupported(x, cache, cache, lengths, *args, None, None)

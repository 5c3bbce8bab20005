"""The summary of attention's weights in Triton, against the eager definition."""

import pytest
import torch
import weights_reference
from attention_cases import AttentionCase, attention_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import with_specials
from test_attention_summary import arguments, turned
from test_triton_attention import HEAD_DIMS, LENGTHS
from triton_backend import DEVICE, DTYPES, check, chips, dtypes, needs_triton, on_device

import fastattn

pytestmark = needs_triton

cases = attention_cases(DTYPES, LENGTHS, HEAD_DIMS, most_scores=1_000)


@settings(max_examples=16)
@given(case=cases, chip=chips)
def test_outputs_obey_the_numerics_rule(case: AttentionCase, chip: str) -> None:
    tensors, options = turned(*arguments(case))
    check(fastattn.attention_summary, chip, *tensors, **options)
    given, given_options = on_device((tensors, options))
    with fastattn.use_backend("triton"):
        argmax = fastattn.attention_summary(*given, **given_options).argmax
    weights_reference.check_argmax(argmax.cpu(), weights_reference.weights(*tensors, **options), tolerance=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, (None, 0), (40, 30), (0, 0)])
def test_several_blocks_of_each_side(dtype: torch.dtype, window) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 140, 24).to(dtype), torch.randn(1, 1, 200, 24).to(dtype)
    mask = torch.randn(140, 200)
    check(fastattn.attention_summary, "sm_90", query, key, mask, enable_gqa=True, window=window)
    check(fastattn.attention_summary, "sm_90", query, key, enable_gqa=True, window=window)


@given(seed=st.integers(0, 1000), dtype=dtypes, where=st.sampled_from(("query", "key", "attn_mask")))
def test_nan_and_infinity_propagate_as_in_eager(seed: int, dtype: torch.dtype, where: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    given = {
        "query": torch.randn(1, 2, 9, 24, generator=generator).to(dtype),
        "key": torch.randn(1, 2, 70, 24, generator=generator).to(dtype),
        "attn_mask": torch.randn(2, 9, 70, generator=generator),
    }
    given[where] = with_specials(given[where], generator)
    check(fastattn.attention_summary, "sm_90", *given.values())


def test_of_equal_scores_the_first_is_named_and_none_where_there_is_none() -> None:
    zeros = torch.zeros(1, 1, 70, 16, device=DEVICE)
    mask = torch.ones(70, 70, dtype=torch.bool, device=DEVICE)
    mask[:, :40], mask[3] = False, False
    with fastattn.use_backend("triton"):
        found = fastattn.attention_summary(zeros, zeros, mask)
    expected = torch.full((70,), 40, device=DEVICE)
    expected[3] = -1
    assert torch.equal(found.argmax[0, 0], expected)
    assert not any(x[0, 0, 3] for x in (found.entropy, found.max_weight, found.distance))

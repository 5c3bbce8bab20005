"""Attention with a key-value cache in Triton, contiguous and paged, against the eager definition."""

import pytest
import torch
from attention_cases import AttentionCase, kvcache_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcache_cases import check_lengths_beyond_the_capacity, check_token_by_token, run, with_special_values
from triton_backend import DEVICE, DTYPES, OWN, check, chips, needs_triton

import fastattn

pytestmark = needs_triton

LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from((63, 64, 65, 129, 300)))
HEAD_DIMS = st.one_of(st.integers(1, 40), st.sampled_from((64, 80, 128)))
cases = kvcache_cases(DTYPES, LENGTHS, HEAD_DIMS, st.booleans())


@settings(max_examples=30)
@given(case=cases, chip=chips)
def test_outputs_and_caches_obey_the_numerics_rule(case: AttentionCase, chip: str) -> None:
    check(run, chip, *case.tensors, **case.options)


@pytest.mark.parametrize(
    ("width", "dtype"), [(256, torch.float32), (512, torch.float32), (256, torch.float16), (640, torch.float16)]
)
def test_wide_heads_and_many_rows(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, cache = torch.randn(1, 8, 12, width).to(dtype), torch.randn(1, 2, 90, width).to(dtype)
    lengths = torch.tensor([77], dtype=torch.int32)
    check(run, "sm_90", query, cache, cache[..., :40], None, None, cache_seqlens=lengths, return_lse=True)


@pytest.mark.parametrize("chip", OWN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_of_the_table(chip: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([55], dtype=torch.int32)
    for width in (64, 128, 256, 512, 1024):
        if width * dtype.itemsize <= 2048:
            query, cache = torch.randn(1, 4, 1, width).to(dtype), torch.randn(1, 1, 70, width).to(dtype)
            check(run, chip, query, cache, cache, None, None, cache_seqlens=lengths, return_lse=True)


@pytest.mark.parametrize("window", [None, (100, 0), (0, 0), (3, 5)])
@pytest.mark.parametrize("queries", [1, 20])
def test_keys_in_parts(window: tuple | None, queries: int) -> None:
    """One sequence and key head, a long cache: several programs share the keys, which do not fill all of them."""
    torch.manual_seed(0)
    query, cache = torch.randn(1, 2, queries, 24), torch.randn(1, 1, 800, 24)
    for length in (0, 17, 500):
        options = {"cache_seqlens": torch.tensor([length], dtype=torch.int32), "return_lse": True}
        check(run, "sm_90", query, cache, cache, None, None, **options, window=window, is_causal=window is None)


def test_nan_and_infinity_propagate_as_in_eager() -> None:
    for tensors, options in with_special_values():
        check(run, "sm_80", *tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_token_by_token_is_causal_attention(dtype: torch.dtype) -> None:
    check_token_by_token("triton", DEVICE, dtype, seq=19)


def test_lengths_beyond_the_capacity_write_and_read_nothing_there() -> None:
    from fastattn.backends.triton import attention_with_kvcache

    check_lengths_beyond_the_capacity(attention_with_kvcache.forward, DEVICE)


def test_heads_that_fit_no_registers_are_refused_with_the_reason() -> None:
    cache, lengths = torch.randn(1, 1, 2, 1025, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    reasons = fastattn.explain("attention_with_kvcache", cache, cache, cache, cache_seqlens=lengths).reasons
    assert "at most 512 in this dtype, and one is 1025" in reasons["triton"]

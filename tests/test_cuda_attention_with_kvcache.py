"""Attention with a key-value cache in CUDA, contiguous and paged, against the eager definition: on a GPU, or in the emulation."""

import pytest
import torch
from attention_cases import AttentionCase, kvcache_cases
from cuda_backend import DEVICE, check, needs_cuda
from hypothesis import assume, given
from hypothesis import strategies as st
from kvcache_cases import check_lengths_beyond_the_capacity, check_token_by_token, run, with_special_values
from norm_cases import DTYPES

import fastattn
from fastattn.backends.cuda import attention_with_kvcache
from fastattn.backends.tensors import along

pytestmark = needs_cuda

LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from((63, 64, 65, 129, 300)))
# A group of 8, 16 and 32 lanes for a key, in float32 twice 16 bytes a lane; aligned and not.
HEAD_DIMS = st.one_of(st.integers(1, 40), st.sampled_from((64, 80, 128, 160, 256)))


@given(case=kvcache_cases(DTYPES, LENGTHS, HEAD_DIMS, st.booleans(), st.integers(1, 2)))
def test_outputs_and_caches_obey_the_numerics_rule(case: AttentionCase) -> None:
    query, k_cache, v_cache, *added = case.tensors
    assume(query.shape[1] // k_cache.shape[1] * query.shape[2] <= attention_with_kvcache.MOST_ROWS)
    check(run, query, along(k_cache), along(v_cache), *added, **case.options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_every_variant(dtype: torch.dtype, rows: int, head_dim: int) -> None:
    torch.manual_seed(0)
    query, cache = torch.randn(2, rows, 1, head_dim).to(dtype), torch.randn(2, 1, 90, head_dim).to(dtype)
    new = torch.randn(2, 1, 2, head_dim).to(dtype)
    lengths = torch.tensor([77, 5], dtype=torch.int32)
    check(run, query, cache, cache, new, new, cache_seqlens=lengths, return_lse=True)


@pytest.mark.parametrize("window", [None, (100, 0), (0, 0), (3, 5)])
@pytest.mark.parametrize("queries", [1, 4])
def test_keys_in_parts(window: tuple | None, queries: int) -> None:
    """One sequence and key head, a long cache: several blocks share the keys, which do not fill all of them."""
    torch.manual_seed(0)
    query, cache = torch.randn(1, 2, queries, 24), torch.randn(1, 1, 800, 24)
    for length in (0, 17, 500):
        options = {"cache_seqlens": torch.tensor([length], dtype=torch.int32), "return_lse": True}
        check(run, query, cache, cache, None, None, **options, window=window, is_causal=window is None)


def test_nan_and_infinity_propagate_as_in_eager() -> None:
    for tensors, options in with_special_values():
        check(run, *tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_token_by_token_is_causal_attention(dtype: torch.dtype) -> None:
    check_token_by_token("cuda", DEVICE, dtype, seq=19)


def test_lengths_beyond_the_capacity_write_and_read_nothing_there() -> None:
    check_lengths_beyond_the_capacity(attention_with_kvcache.forward, DEVICE)


@pytest.mark.parametrize("length", [4, 8])
def test_pages_that_are_not_there_are_neither_read_nor_written(length: int) -> None:
    torch.manual_seed(0)
    memory = torch.randn(4, 1, 4, 16, device=DEVICE)
    before, new = memory.clone(), torch.randn(1, 1, 1, 16, device=DEVICE)
    table = torch.tensor([[1, 2, -1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    pages = memory[1:3]  # the table names the second of them, the one behind them and the one before them
    attention_with_kvcache.forward(new, pages, pages, new, new, lengths, table, *[None] * 3, 1.0, -1, -1, 0.0, False)
    assert torch.equal(memory, before)


def refused(query: torch.Tensor, cache: torch.Tensor, value: torch.Tensor | None = None) -> str | None:
    lengths = torch.ones(query.shape[0], dtype=torch.int32, device=DEVICE)
    query, cache = query.to(DEVICE), cache.to(DEVICE)
    value = cache if value is None else value.to(DEVICE)
    explanation = fastattn.explain("attention_with_kvcache", query, cache, value, cache_seqlens=lengths)
    return explanation.reasons["cuda"]


def test_what_it_cannot_take_is_refused_with_the_reason() -> None:
    cache = torch.randn(1, 1, 2, 16)
    assert refused(torch.randn(1, 8, 1, 16), cache) is None
    assert "1 to 8 queries of heads that share a key head, and there are 9" in refused(torch.randn(1, 9, 1, 16), cache)
    assert "there are 0" in refused(torch.randn(1, 1, 0, 16), cache)
    assert "they are 16 and 257" in refused(torch.randn(1, 1, 1, 16), cache, torch.randn(1, 1, 2, 257))
    assert "gaps" in refused(torch.randn(1, 1, 1, 2), cache.mT)

"""Attention with a key-value cache in Triton, contiguous and paged, against the eager definition."""

import copy

import pytest
import torch
from attention_cases import AttentionCase, kvcache_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_backend import DEVICE, DTYPES, check, chips, needs_triton

import fastattn

pytestmark = needs_triton

LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from((63, 64, 65, 129, 300)))
HEAD_DIMS = st.one_of(st.integers(1, 40), st.sampled_from((64, 80, 128)))
cases = kvcache_cases(DTYPES, LENGTHS, HEAD_DIMS, st.booleans())


def _run(query, k_cache, v_cache, k, v, **options):
    k_cache, v_cache = copy.deepcopy((k_cache, v_cache))  # each of the three runs appends to its own
    out = fastattn.attention_with_kvcache(query, k_cache, v_cache, k, v, **options)
    return *out, k_cache, v_cache


@settings(max_examples=30)
@given(case=cases, chip=chips)
def test_outputs_and_caches_obey_the_numerics_rule(case: AttentionCase, chip: str) -> None:
    check(_run, chip, *case.tensors, **case.options)


@pytest.mark.parametrize(
    ("width", "dtype"), [(256, torch.float32), (512, torch.float32), (256, torch.float16), (640, torch.float16)]
)
def test_wide_heads_and_many_rows(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, cache = torch.randn(1, 8, 12, width).to(dtype), torch.randn(1, 2, 90, width).to(dtype)
    lengths = torch.tensor([77], dtype=torch.int32)
    check(_run, "sm_90", query, cache, cache[..., :40], None, None, cache_seqlens=lengths, return_lse=True)


@pytest.mark.parametrize("window", [None, (100, 0), (0, 0), (3, 5)])
@pytest.mark.parametrize("queries", [1, 20])
def test_keys_in_parts(window: tuple | None, queries: int) -> None:
    """One sequence and key head, a long cache: several programs share the keys, which do not fill all of them."""
    torch.manual_seed(0)
    query, cache = torch.randn(1, 2, queries, 24), torch.randn(1, 1, 800, 24)
    for length in (0, 17, 500):
        options = {"cache_seqlens": torch.tensor([length], dtype=torch.int32), "return_lse": True}
        check(_run, "sm_90", query, cache, cache, None, None, **options, window=window, is_causal=window is None)


def test_nan_and_infinity_propagate_as_in_eager() -> None:
    torch.manual_seed(0)
    query, cache = torch.randn(2, 4, 3, 24), torch.randn(2, 2, 300, 24)
    for tensor, place in ((query, (0, 1, 1, 3)), (cache, (1, 1, 13, 5)), (cache, (0, 0, 201, 5))):
        for special in (torch.nan, torch.inf, -torch.inf):
            changed = tensor.clone()
            changed[place] = special
            tensors = (changed, cache, cache) if tensor is query else (query, changed, changed)
            lengths = torch.tensor([300, 290], dtype=torch.int32)
            check(_run, "sm_80", *tensors, None, None, cache_seqlens=lengths, return_lse=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_token_by_token_is_causal_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, heads, kv_heads, seq, dim = 2, 6, 2, 19, 24
    query = torch.randn(batch, heads, seq, dim, device=DEVICE).to(dtype)
    key, value = (torch.randn(batch, kv_heads, seq, dim, device=DEVICE).to(dtype) for _ in range(2))
    caches = [torch.full((batch, kv_heads, seq, dim), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    outs = []
    for t in range(seq):
        step = slice(t, t + 1)
        lengths = torch.full((batch,), t, dtype=torch.int32, device=DEVICE)
        with fastattn.use_backend("triton"):
            outs.append(
                fastattn.attention_with_kvcache(
                    query[:, :, step], *caches, key[:, :, step], value[:, :, step], cache_seqlens=lengths
                )
            )
    assert torch.equal(caches[0], key)
    assert torch.equal(caches[1], value)

    def causal(query, key, value):
        return fastattn.attention(query, key, value, is_causal=True, enable_gqa=True)

    report = fastattn.verify.check(lambda *_: torch.cat(outs, dim=2), query, key, value, eager=causal)
    report.raise_if_failed()


def test_lengths_beyond_the_capacity_write_and_read_nothing_there() -> None:
    """On a GPU nobody can look at the lengths before the kernel does."""
    from fastattn.backends.triton import attention_with_kvcache

    torch.manual_seed(0)
    memory = torch.randn(3, 1, 8, 16, device=DEVICE)
    before = memory.clone()
    new, lengths = torch.randn(1, 1, 4, 16, device=DEVICE), torch.tensor([6], dtype=torch.int32, device=DEVICE)
    attention_with_kvcache.forward(new, memory[1:2], memory[1:2], new, new, lengths, None, None, 1.0, -1, -1, 0.0)
    assert torch.equal(memory[[0, 2]], before[[0, 2]])
    assert torch.equal(memory[1, :, 6:], new[0, :, :2])


def test_heads_that_fit_no_registers_are_refused_with_the_reason() -> None:
    cache, lengths = torch.randn(1, 1, 2, 1025, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    reasons = fastattn.explain("attention_with_kvcache", cache, cache, cache, cache_seqlens=lengths).reasons
    assert "at most 512 in this dtype, and one is 1025" in reasons["triton"]

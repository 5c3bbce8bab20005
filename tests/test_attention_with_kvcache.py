"""Attention with a key-value cache on the CPU, against the eager definition."""

import copy

import pytest
import torch
from attention_cases import AttentionCase, kvcache_cases
from hypothesis import given
from norm_cases import DTYPES, check_refused

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native, attention_with_kvcache


@given(case=kvcache_cases())
def test_outputs_and_caches_obey_the_numerics_rule(isa: str, case: AttentionCase) -> None:
    def run(query, k_cache, v_cache, k, v, **options):
        k_cache, v_cache = copy.deepcopy((k_cache, v_cache))  # each of the three runs appends to its own
        out = fastattn.attention_with_kvcache(query, k_cache, v_cache, k, v, **options)
        return *out, k_cache, v_cache

    verify.check(run, *case.tensors, backend="cpu", **case.options).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_token_by_token_is_causal_attention(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, heads, kv_heads, seq, dim = 2, 6, 2, 37, 24
    query = torch.randn(batch, heads, seq, dim).to(dtype)
    key, value = (torch.randn(batch, kv_heads, seq, dim).to(dtype) for _ in range(2))
    k_cache, v_cache = (torch.full((batch, kv_heads, seq, dim), torch.nan, dtype=dtype) for _ in range(2))
    outs = []
    for t in range(seq):
        step = slice(t, t + 1)
        lengths = torch.full((batch,), t, dtype=torch.int32)
        with fastattn.use_backend("cpu"):
            outs.append(
                fastattn.attention_with_kvcache(
                    query[:, :, step], k_cache, v_cache, key[:, :, step], value[:, :, step], cache_seqlens=lengths
                )
            )
    assert torch.equal(k_cache, key)
    assert torch.equal(v_cache, value)

    def causal(query, key, value):
        return fastattn.attention(query, key, value, is_causal=True, enable_gqa=True)

    verify.check(lambda *_: torch.cat(outs, dim=2), query, key, value, eager=causal).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(isa, same_bits_at_any_thread_count, dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 1, 64).to(dtype)
    k_cache, v_cache = (torch.randn(1, 1, 5000, 64).to(dtype) for _ in range(2))
    lengths = torch.tensor([4321], dtype=torch.int32)
    same_bits_at_any_thread_count(
        lambda: fastattn.attention_with_kvcache(query, k_cache, v_cache, cache_seqlens=lengths, return_lse=True)
    )


def test_a_paged_cache_is_left_to_others() -> None:
    cache = torch.randn(2, 1, 4, 8)
    lengths, table = torch.tensor([3], dtype=torch.int32), torch.tensor([[1, 0]], dtype=torch.int32)
    explanation = fastattn.explain(
        "attention_with_kvcache", torch.randn(1, 1, 1, 8), cache, cache, cache_seqlens=lengths, block_table=table
    )
    assert explanation.backend != "cpu"
    assert "paged" in explanation.reasons["cpu"]


def arguments() -> dict:
    return {
        "query": torch.randn(2, 4, 3, 6),
        "k_cache": torch.randn(2, 2, 9, 6),
        "v_cache": torch.randn(2, 2, 9, 5),
        "k": torch.randn(2, 2, 3, 6),
        "v": torch.randn(2, 2, 3, 5),
        "cache_seqlens": torch.tensor([0, 6], dtype=torch.int32),
        "block_table": None,
        "alibi_slopes": torch.ones(2, 4),
        "out": torch.empty(2, 4, 3, 5),
        "lse": torch.empty(2, 4, 3),
        "scale": 1.0,
        "window_left": -1,
        "window_right": 0,
        "softcap": 0.0,
    }


def test_no_argument_reaches_the_kernel_unchecked() -> None:
    good = arguments()
    wrong_tensors = (torch.randn(2, 4), torch.randn(3, 3, 4, 7), torch.randn(2, 4, 3, 6).double(), 3)
    wrong = dict.fromkeys(("query", "k_cache", "v_cache", "out", "lse"), (None, *wrong_tensors))
    wrong |= dict.fromkeys(("k", "v"), (None, *wrong_tensors))  # the one without the other
    wrong["cache_seqlens"] = (
        None,
        torch.tensor([0, 7], dtype=torch.int32),
        torch.tensor([-1, 0], dtype=torch.int32),
        torch.tensor([0, 6]),
        torch.tensor([0], dtype=torch.int32),
    )
    wrong["block_table"] = (torch.zeros(2, 1, dtype=torch.int32),)
    wrong["k_cache"] += (torch.randn(2, 1, 9, 6).expand(2, 2, 9, 6),)
    check_refused(_native.C.attention_with_kvcache_forward, good, wrong)
    assert attention_with_kvcache.unsupported(*[good["query"]] * 3, *[None] * 3, torch.zeros(1), *[None] * 5)

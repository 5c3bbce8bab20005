"""Attention with a key-value cache on the CPU, against the eager definition."""

import pytest
import torch
from attention_cases import AttentionCase, kvcache_cases
from hypothesis import given
from hypothesis import strategies as st
from kvcache_cases import check_token_by_token, run
from norm_cases import DTYPES, check_refused

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native, attention_with_kvcache

# Beyond eight queries, and a block of 96, another kernel's.
QUERIES = st.sampled_from((*range(10), 97))


@given(case=kvcache_cases(queries=QUERIES))
def test_outputs_and_caches_obey_the_numerics_rule(isa: str, case: AttentionCase) -> None:
    verify.check(run, *case.tensors, backend="cpu", **case.options).raise_if_failed()


@pytest.mark.parametrize("queries", range(1, 9))
@pytest.mark.parametrize("window", [None, (0, 0), (1, None), (0, 3), (None, 2)])
def test_queries_that_see_nothing_of_a_part_of_the_keys(isa: str, queries: int, window: tuple | None) -> None:
    """Keys are taken in parts of 256 or, of many sequences, of 1024: none, a few, and a few more than whole parts."""
    torch.manual_seed(0)
    for lengths in ([*range(6), *range(1022, 1030)], [1], [3], [257], [259]):
        query, cache = torch.randn(len(lengths), 2, queries, 4), torch.randn(len(lengths), 1, max(lengths), 4)
        options = {"window": window, "is_causal": window is None, "return_lse": True}
        lengths = torch.tensor(lengths, dtype=torch.int32)
        verify.check(run, query, cache, cache, None, None, cache_seqlens=lengths, **options).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_token_by_token_is_causal_attention(isa: str, dtype: torch.dtype) -> None:
    check_token_by_token("cpu", torch.device("cpu"), dtype, seq=37)


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
        "cos": torch.randn(2, 1, 3, 4),
        "sin": torch.randn(2, 1, 3, 4),
        "out": torch.empty(2, 4, 3, 5),
        "lse": torch.empty(2, 4, 3),
        "scale": 1.0,
        "window_left": -1,
        "window_right": 0,
        "softcap": 0.0,
        "interleaved": False,
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
    shapes = ((3, 1, 3, 4), (2, 2, 3, 4), (2, 1, 2, 4), (2, 1, 3, 8), (2, 1, 3, 3))
    wrong_angles = (*wrong_tensors, *map(torch.randn, shapes), torch.randn(2, 1, 3, 8)[..., ::2])
    # The one without the other, or of another shape.
    wrong |= dict.fromkeys(("cos", "sin"), (None, torch.randn(3, 4), torch.ones(2, 1, 3, 4).int(), *wrong_angles))
    wrong["k_cache"] += (torch.randn(2, 1, 9, 6).expand(2, 2, 9, 6),)
    check_refused(_native.C.attention_with_kvcache_forward, good, wrong)
    one_query = {"query": torch.randn(2, 4, 1, 6), "out": torch.empty(2, 4, 1, 5), "lse": torch.empty(2, 4, 1)}
    without_new = {"k": None, "v": None}
    for changed in (one_query, without_new, *({"cos": x, "sin": x} for x in wrong_angles)):
        with pytest.raises((TypeError, ValueError), match=r"\w+ \w+"):
            _native.C.attention_with_kvcache_forward(**{**good, **changed})
    assert attention_with_kvcache.unsupported(*[good["query"]] * 3, *[None] * 3, torch.zeros(1), *[None] * 8)

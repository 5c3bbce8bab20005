"""What the tests of attention with a key-value cache share, whatever the backend."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastattn
from fastattn import verify


def run(query: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, **options):
    """The outputs and what became of the caches; each of verify's runs appends to its own. Nothing else is changed."""
    k_cache, v_cache = copy.deepcopy((k_cache, v_cache))
    given, before = (query, k, v), copy.deepcopy((query, k, v))
    out = fastattn.attention_with_kvcache(query, k_cache, v_cache, k, v, **options)
    torch.testing.assert_close(given, before, rtol=0.0, atol=0.0, equal_nan=True)
    return *out, k_cache, v_cache


def with_special_values() -> Iterator[tuple[tuple[Tensor, ...], dict]]:
    """Calls of `run` in which the query, or keys and values at two places, hold NaN or infinity."""
    torch.manual_seed(0)
    query, cache = torch.randn(2, 4, 3, 24), torch.randn(2, 2, 300, 24)
    for tensor, place in ((query, (0, 1, 1, 3)), (cache, (1, 1, 13, 5)), (cache, (0, 0, 201, 5))):
        for special in (torch.nan, torch.inf, -torch.inf):
            changed = tensor.clone()
            changed[place] = special
            tensors = (changed, cache, cache) if tensor is query else (query, changed, changed)
            lengths = torch.tensor([300, 290], dtype=torch.int32)
            yield (*tensors, None, None), {"cache_seqlens": lengths, "return_lse": True}


def check_token_by_token(backend: str, device: torch.device, dtype: torch.dtype, seq: int) -> None:
    """Decoding a sequence a token at a time is causal attention, and fills the cache with its keys and values."""
    torch.manual_seed(0)
    batch, heads, kv_heads, dim = 2, 6, 2, 24
    query = torch.randn(batch, heads, seq, dim, device=device).to(dtype)
    key, value = (torch.randn(batch, kv_heads, seq, dim, device=device).to(dtype) for _ in range(2))
    caches = [torch.full((batch, kv_heads, seq, dim), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    outs = []
    for t in range(seq):
        step = slice(t, t + 1)
        lengths = torch.full((batch,), t, dtype=torch.int32, device=device)
        with fastattn.use_backend(backend):
            outs.append(
                fastattn.attention_with_kvcache(
                    query[:, :, step], *caches, key[:, :, step], value[:, :, step], cache_seqlens=lengths
                )
            )
    assert torch.equal(caches[0], key)
    assert torch.equal(caches[1], value)

    def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fastattn.attention(query, key, value, is_causal=True, enable_gqa=True)

    report = verify.check(lambda *_: torch.cat(outs, dim=2), query, key, value, eager=causal)
    report.raise_if_failed()


def check_lengths_beyond_the_capacity(forward: Callable, device: torch.device) -> None:
    """On a GPU nobody can look at the lengths before the kernel does: it writes and reads nothing beyond the cache."""
    torch.manual_seed(0)
    memory = torch.randn(3, 1, 8, 16, device=device)
    before = memory.clone()
    new, lengths = torch.randn(1, 1, 4, 16, device=device), torch.tensor([6], dtype=torch.int32, device=device)
    forward(new, memory[1:2], memory[1:2], new, new, lengths, *[None] * 4, 1.0, -1, -1, 0.0, False)
    assert torch.equal(memory[[0, 2]], before[[0, 2]])
    assert torch.equal(memory[1, :, 6:], new[0, :, :2])

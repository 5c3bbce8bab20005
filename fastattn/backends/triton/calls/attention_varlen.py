"""Attention over packed sequences: attention's kernels, in the form that reads boundaries from cu_seqlens."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import attention_varlen

SEQUENCES, HEADS, KV_HEADS, LONGEST = 16, 8, 4, 512
TOKENS = SEQUENCES * LONGEST


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    bias = torch.empty(1, HEADS, LONGEST, LONGEST, dtype=dtype, device="meta")
    yield "causal", partial(_call, 128, dtype, None, (-1, 0))
    yield "bias", partial(_call, 64, dtype, bias, (-1, -1))


def _call(head_dim: int, dtype: torch.dtype, mask: torch.Tensor | None, window: tuple[int, int]) -> None:
    query, key, value = (
        torch.empty(TOKENS, heads, head_dim, dtype=dtype, device="meta") for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    ends = torch.empty(SEQUENCES + 1, dtype=torch.int32, device="meta")
    args = (query, key, value, ends, ends, mask, None, None)
    settings = (LONGEST, LONGEST, 0.125, *window, 0.0, 0.0)
    out, lse = attention_varlen.forward(*args, *settings)
    attention_varlen.backward(out, lse, *args, out, lse, *settings, mask is not None)

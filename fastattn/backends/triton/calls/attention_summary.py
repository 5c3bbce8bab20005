"""The summary of attention's weights: the widths of the table, each with other features."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import attention_summary

BATCH, HEADS, KV_HEADS, TOKENS = 2, 8, 4, 4096


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    padding = empty(BATCH, 1, 1, TOKENS, of=torch.bool)
    yield "causal", partial(_call, 64, dtype, window=(-1, 0))
    yield (
        "padding, softcap, ALiBi, window",
        partial(_call, 80, dtype, padding, empty(HEADS, of=torch.float32), (512, 512), 20.0),
    )
    yield "bias, wide", partial(_call, 256, dtype, empty(1, HEADS, TOKENS, TOKENS))


def _call(
    head_dim: int,
    dtype: torch.dtype,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> None:
    query, key = (
        torch.empty(BATCH, TOKENS, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        for heads in (HEADS, KV_HEADS)
    )
    attention_summary.forward(query, key, mask, slopes, 0.125, *window, 0, softcap)

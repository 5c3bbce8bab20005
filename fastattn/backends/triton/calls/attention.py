"""Attention: the widths of the table, each with other features, so that each feature's code is compiled once."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import attention

BATCH, HEADS, KV_HEADS, TOKENS = 2, 8, 4, 4096


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    bias = empty(1, HEADS, TOKENS, TOKENS)
    padding = empty(BATCH, 1, 1, TOKENS, of=torch.bool)
    slopes = empty(HEADS, of=torch.float32)
    yield "causal", partial(_call, 64, dtype, window=(-1, 0))
    yield "nothing", partial(_call, 128, dtype)
    yield (
        "padding, softcap, ALiBi, window",
        partial(_call, 80, dtype, mask=padding, slopes=slopes, softcap=20.0, window=(512, 512)),
    )
    yield "bias, dropout", partial(_call, 128, dtype, mask=bias, dropout_p=0.1)
    yield "causal, wide", partial(_call, 256, dtype, window=(-1, 0))
    yield "bias, dropout, wide", partial(_call, 256, dtype, mask=bias, dropout_p=0.1)


def _call(
    head_dim: int,
    dtype: torch.dtype,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> None:
    query, key, value = (
        torch.empty(BATCH, TOKENS, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p > 0.0 else None
    args = (query, key, value, mask, slopes, seed)
    settings = (0.125, *window, 0, softcap, dropout_p)
    out, lse = attention.forward(*args, *settings)
    mask_grad = mask is not None and mask.is_floating_point()
    attention.backward(out, lse, *args, out, lse, *settings, mask_grad)

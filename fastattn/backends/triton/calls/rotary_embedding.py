"""Rotary embedding: each width of the table, halves and neighbours in turn, all of the head or half of it."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import rotary_embedding


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    for head_dim, rotary_dim, interleaved in (
        (64, 32, False),
        (64, 64, True),
        (128, 128, False),
        (160, 160, True),
        (256, 256, False),
    ):
        name = f"{rotary_dim} of {head_dim}{', interleaved' if interleaved else ''}"
        yield name, partial(_call, head_dim, rotary_dim, interleaved, dtype)


def _call(head_dim: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    q, k = (torch.empty(2, 512, n, head_dim, dtype=dtype, device="meta").transpose(1, 2) for n in (32, 8))
    cos = torch.empty(512, rotary_dim, device="meta")
    out_q, out_k = rotary_embedding.forward(q, k, cos, cos, interleaved)
    rotary_embedding.backward(out_q, out_k, cos, cos, interleaved)

"""Attention: the head_dims of the table, each with other features, so that each feature's code is compiled once."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import attention

NOTHING = {"mask": None, "slopes": False, "window": (-1, -1), "softcap": 0.0, "dropout_p": 0.0}


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    variants = {
        "causal": (64, {"window": (-1, 0)}),
        "plain": (128, {}),
    }
    for name, (head_dim, features) in variants.items():
        yield f"head_dim {head_dim}, {name}", partial(_call, head_dim, dtype, **{**NOTHING, **features})


def _call(
    head_dim: int,
    dtype: torch.dtype,
    mask: torch.Tensor | None,
    slopes: bool,
    window: tuple[int, int],
    softcap: float,
    dropout_p: float,
) -> None:
    batch, heads, kv_heads, tokens = 2, 8, 4, 4096
    query, key, value = (
        torch.empty(batch, tokens, n, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    alibi_slopes = torch.empty(heads, device="meta") if slopes else None
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p > 0.0 else None
    args = (query, key, value, mask, alibi_slopes, seed)
    settings = (0.125, *window, 0, softcap, dropout_p)
    out, lse = attention.forward(*args, *settings)

"""The feed-forward network: the tiles of its own two kernels, gated with all that there is, and plain."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import feed_forward


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    for rows in (16, 64, 4096):
        yield f"{rows} rows, gated, GELU, dropout", partial(_network, rows, True, "gelu", 0.1, dtype)
    yield "plain, SiLU", partial(_network, 4096, False, "silu", 0.0, dtype)
    yield "rows off 16 bytes, gated, GELU, dropout", partial(_network, 4096, True, "gelu", 0.1, dtype, 1020, 4092)


def _network(
    rows: int, gated: bool, activation: str, dropout_p: float, dtype: torch.dtype, inner: int = 1024, hidden: int = 4096
) -> None:
    x = torch.empty(rows, inner, dtype=dtype, device="meta")
    w1, b1, w2, b2 = (x.new_empty(shape) for shape in ((hidden, inner), (hidden,), (inner, hidden), (inner,)))
    gate = w1 if gated else None
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p > 0.0 else None
    out, pre, pre_gate = feed_forward.forward(x, w1, b1, w2, b2, gate, seed, activation, dropout_p, True)
    needs = [True] * 5 + [gated]
    feed_forward.backward(out, x, w1, b1, w2, b2, gate, pre, pre_gate, seed, activation, dropout_p, needs)

"""Layer norm and RMS norm, which share their kernels: each width of the table with all that a norm can have, and with nothing."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import layer_norm, rms_norm

WIDTHS = (64, 128, 256, 384, 1024, 2048, 4096, 8192, 12288)


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    for width in WIDTHS:
        yield f"{width} features, residual, dropout", partial(_full, width, dtype)
    yield "RMS norm, no residual", partial(_plain, 384, dtype)


def _full(width: int, dtype: torch.dtype) -> None:
    x = torch.empty(4096, width, dtype=dtype, device="meta")
    weight = torch.empty(width, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    out, total, mean, rstd = layer_norm.forward(x, weight, weight, x, seed, 1e-5, 0.1)
    layer_norm.backward(out, x, total, weight, weight, mean, rstd, seed, 0.1)


def _plain(width: int, dtype: torch.dtype) -> None:
    x = torch.empty(4096, width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=dtype, device="meta")
    out, _, rstd = rms_norm.forward(x, weight, None, None, 1e-5, 0.0)
    rms_norm.backward(out, None, x, weight, rstd, None, 0.0)

"""Linear: each tile of the table, with all that an epilogue can have and with nothing, and the sums of the backward."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import linear, matmul


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    for rows in (16, 64, 4096):
        yield f"{rows} rows, bias, GELU, residual", partial(_full, rows, dtype)
    yield "backward", partial(_backward, dtype)
    yield "after torch's product", partial(_after, dtype)


def _full(rows: int, dtype: torch.dtype) -> None:
    x = torch.empty(rows, 1024, dtype=dtype, device="meta")
    linear.forward(x, x.new_empty(4096, 1024), x.new_empty(4096), x.new_empty(rows, 4096), "gelu", True)


def _backward(dtype: torch.dtype) -> None:
    x = torch.empty(4096, 1024, dtype=dtype, device="meta")
    weight, bias, pre = x.new_empty(1024, 1024), x.new_empty(1024), x.new_empty(4096, 1024)
    linear.backward(pre, x, weight, bias, pre, "gelu", [True, True, True])


def _after(dtype: torch.dtype) -> None:
    x = torch.empty(4096, 1024, dtype=dtype, device="meta")
    matmul.finish_apart(x, x, x.new_empty(1024), "gelu", x, None, 0.0, x)

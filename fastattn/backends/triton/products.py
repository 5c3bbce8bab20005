"""Products of large matrices by the vendor's library, in the inputs' dtype and with float32 sums.

For losses that put a kernel of their own between two products: inside a product it would have nothing to save.
"""

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = a . b (+ bias, one a column), rounded once."""
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


class Sum:
    """A matrix that is the sum of products which are made one after the other: added up in float32, rounded once."""

    def __init__(self, out: Tensor, products: int) -> None:
        self.out, self.products, self.done = out, products, 0
        apart = products > 1 and out.dtype != torch.float32
        self.sums = torch.empty_like(out, dtype=torch.float32) if apart else out

    def add(self, a: Tensor, b: Tensor) -> None:
        """The next product. After the last one, `out` is there."""
        self.done += 1
        if self.sums.dtype == a.dtype:
            torch.addmm(self.sums, a, b, beta=float(self.done > 1), out=self.sums)
        else:
            _add_to_float32(self.sums, a, b, float(self.done > 1))
        if self.done == self.products and self.sums is not self.out:
            self.out.copy_(self.sums)
            self.sums = self.out


def _add_to_float32(sums: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    """sums = beta sums + a . b, of 16-bit matrices."""
    if a.is_cpu:
        torch.addmm(sums, a.float(), b.float(), beta=beta, out=sums)
    elif torch.version.hip is None:  # the product itself adds: sums are read and written once
        torch.addmm(sums, a, b, beta=beta, out_dtype=torch.float32, out=sums)
    else:  # AMD's libraries have no such product: each is rounded to 16 bits before it is added
        product = torch.mm(a, b)
        sums.add_(product) if beta else sums.copy_(product)

"""The logarithm of a sum of exponentials, carried along as a pair: (top, total) stands for total * exp(top).

`top` is the greatest value so far, so no exponential overflows. Nothing at all is (-inf, 0). What torch's log_softmax makes
NaN of becomes so only in `finish`, since a part of a row may be all -inf where the row is not.
"""

import triton
import triton.language as tl


@triton.jit
def add(top, total, value):
    """One more value in each lane. One exponential: of the lesser of the two from the greater."""
    fall = tl.exp(tl.where(value == top, 0.0, -tl.abs(value - top)))
    total = tl.where(value > top, total * fall + 1.0, total + fall)
    return tl.maximum(top, value), total


@triton.jit
def merge(top, total, axis: tl.constexpr):
    """The pairs along an axis as one."""
    greatest = tl.max(top, axis=axis)
    above = tl.expand_dims(greatest, axis)
    total *= tl.exp(tl.where(top == above, 0.0, top - above))
    return greatest, tl.sum(total, axis=axis)


@triton.jit
def finish(top, total):
    """The total, NaN where no softmax is defined: of rows with +inf, and of those that are all -inf."""
    return total + (top - top)

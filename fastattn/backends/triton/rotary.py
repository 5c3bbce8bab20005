"""The turn of rows by their tokens' angles on their way into a kernel; rotary_embedding.py has the formula.

There a pair is loaded once and both halves are stored. Here a tile of whole rows is needed: each element's partner is loaded
beside it, which the first-level cache still holds.
"""

import triton
import triton.language as tl


@triton.jit
def load_turned(
    pointers,  # of each row's first element
    column,
    stride,  # from one element of a row to the next
    dim,
    cos,  # of each row's angles, in a row of 2 * half
    sin,
    half,
    rows,  # which rows there are
    INTERLEAVED: tl.constexpr,
):
    """The columns of the rows, turned, in float32; those beyond the angles as they are, and zeros beyond dim."""
    if INTERLEAVED:
        second = column % 2 == 1
        partner = tl.where(second, column - 1, column + 1)
    else:
        second = column >= half
        partner = tl.where(second, column - half, column + half)
    inside = rows[:, None] & (column < dim)
    turned = rows[:, None] & (column < 2 * half)
    values = tl.load(pointers[:, None] + column * stride, mask=inside, other=0.0).to(tl.float32)
    partners = tl.load(pointers[:, None] + partner * stride, mask=turned, other=0.0).to(tl.float32)
    cosines = tl.load(cos[:, None] + column, mask=turned, other=1.0).to(tl.float32)
    sines = tl.load(sin[:, None] + column, mask=turned, other=0.0).to(tl.float32)
    return values * cosines + tl.where(second, partners, -partners) * sines

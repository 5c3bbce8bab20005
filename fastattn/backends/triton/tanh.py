"""tanh inside a kernel, to about two units in the last place (Triton's own exists on GPUs alone, not in its interpreter).

    |x| < 0.6:  x + x^3 P(x^2);   else 1 - 2 / (exp(2 |x|) + 1), with x's sign

The polynomial is the CPU kernels' (csrc/cpu/math.h), a least-maximum fit of the relative error.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Of a float32 tensor; NaN stays NaN, infinity becomes 1."""
    square = x * x
    p = -0.00590586836 * square + 0.0208053845
    p = p * square - 0.0537866836
    p = p * square + 0.133319582
    p = p * square - 0.333332993
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    large = tl.where(x < 0.0, -large, large)
    return tl.where(magnitude < 0.6, p * square * x + x, large)

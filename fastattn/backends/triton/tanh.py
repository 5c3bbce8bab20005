"""The hyperbolic tangent, for kernels: to two units in the last place, which a soft-capped score needs near zero, too.

|x| < 0.625     x + x^3 P(x^2), P of degree 4 by least squares of the relative error (4e-9)
otherwise       (1 - t) / (1 + t) with t = exp(-2 |x|), and x's sign
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """float32 -> float32; 1 and -1 at the infinities, NaN for NaN."""
    size = tl.abs(x)
    square = x * x
    series = 0.02063899300992489 - 0.005704889539629221 * square
    series = series * square - 0.05373968183994293
    series = series * square + 0.13331441581249237
    series = series * square - 0.3333328068256378
    small = x + x * square * series
    t = tl.exp(-2.0 * size)
    large = (1.0 - t) / (1.0 + t)
    return tl.where(size < 0.625, small, tl.where(x < 0.0, -large, large))

"""The activations inside a kernel, and gradients through them, in float32: backends/eager/activation.py defines them.

    relu       max(x, 0)                            1 where x > 0
    gelu       x Phi(x)                             Phi(x) + x phi(x)         of the normal distribution
    gelu_tanh  x s(2 u)                             s(2 u) + x s(2 u) s(-2 u) 2 u'
               with u = sqrt(2 / pi) (x + 0.044715 x^3), since (1 + tanh u) / 2 = s(2 u)
    silu       x s(x)                               s(x) + x s(x) s(-x)

s is the logistic function. NaN stays NaN, and infinities come out as from torch, which computes the same terms.
"""

import triton
import triton.language as tl


@triton.jit
def _logistic(x):
    """s(x) and its derivative s(x) s(-x), from an exponential that does not overflow."""
    small = tl.exp(-tl.abs(x))
    high = 1.0 / (1.0 + small)
    low = small * high
    return tl.where(x < 0, low, high), high * low


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """activation(x) of a float32 tensor."""
    if ACTIVATION == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = x * (0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        s, _ = _logistic(1.5957691216057308 * (x + 0.044715 * (x * x * x)))
        x = x * s
    elif ACTIVATION == "silu":
        s, _ = _logistic(x)
        x = x * s
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x


@triton.jit
def activate_backward(grad, x, ACTIVATION: tl.constexpr):
    """grad times the derivative of the activation at x, both float32."""
    if ACTIVATION == "relu":
        # Selected, not multiplied: grad is dropped where it is infinite, too. NaN in x passes it.
        grad = tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * (x * x)) * 0.3989422804014327
        grad = grad * (0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476) + x * density)
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        s, slope = _logistic(1.5957691216057308 * (x + 0.044715 * (square * x)))
        grad = grad * (s + x * slope * (1.5957691216057308 * (1.0 + 0.134145 * square)))
    elif ACTIVATION == "silu":
        s, slope = _logistic(x)
        grad = grad * (s + x * slope)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return grad

"""Dropout inside a kernel: the counter-based hash of backends/eager/dropout.py, which defines it.

    key  = splitmix64(seed + row * 0x9E3779B97F4A7C15)         one a row, 64 bits
    u    = mix32(column ^ low32(key)) ^ high32(key)            two hashes of 32 bits an element
    keep = mix32(u) >= threshold,                              threshold = floor(dropout_p * 2^32)

About twenty integer instructions an element, and no memory.
"""

import triton
import triton.language as tl


def threshold(dropout_p: float) -> int:
    """What an element's hash is compared with. An int of 33 bits: for dropout_p = 1 nothing is kept."""
    return int(dropout_p * 4294967296.0)


def inverse(dropout_p: float) -> float:
    """The factor of kept values."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


@triton.jit
def _mix32(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_key(seed, row):
    """The key of each row: int64 scalar `seed`, int64 `row` of any shape -> uint64."""
    z = seed.to(tl.uint64, bitcast=True) + row.to(tl.uint64) * 0x9E3779B97F4A7C15
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def keep(key, column, threshold):
    """Which elements survive: bool, of the shape that `key` (uint64) and `column` (int) broadcast to."""
    low = key.to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    u = _mix32(column.to(tl.uint32) ^ low) ^ high
    return _mix32(u).to(tl.int64) >= threshold

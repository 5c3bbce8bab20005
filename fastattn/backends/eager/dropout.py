"""Dropout by a counter-based hash, so that every backend drops the same elements for the same seed.

    key  = splitmix64(seed + row * 0x9E3779B97F4A7C15)
    u    = mix32(column ^ low32(key)) ^ high32(key)
    keep = mix32(u) >= floor(dropout_p * 2^32)

One 64-bit hash a row, two 32-bit hashes an element. Nothing has to be stored for the backward: it hashes again.
splitmix64 is Steele, Lea and Flood's (OOPSLA 2014), mix32 is Wellons' lowbias32 (2018).
"""

import math

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _signed(constant: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant: torch's int64 products wrap as unsigned ones do."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's shift of an int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(z: Tensor) -> Tensor:
    z = z + _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _mix32(x: Tensor) -> Tensor:
    """A hash of 32 bits held in an int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def keep_mask(seed: Tensor, rows: Tensor, columns: int, dropout_p: float) -> Tensor:
    """Which elements survive: bool, of shape (*rows.shape, columns), for int64 row numbers of any shape."""
    key = _splitmix64(seed.reshape(()) + rows * _GOLDEN).unsqueeze(-1)
    column = torch.arange(columns, device=rows.device)
    u = _mix32(column ^ (key & _MASK32)) ^ _shift_right(key, 32)
    return _mix32(u) >= int(dropout_p * 4294967296.0)


def apply(x: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    """x where kept, scaled by 1 / (1 - dropout_p); zero elsewhere."""
    scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return torch.where(keep, x * scale, torch.zeros((), dtype=x.dtype, device=x.device))


def dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Dropout over a tensor seen as a (rows, features) matrix; x itself where dropout_p is 0."""
    if dropout_p == 0.0 or seed is None:
        return x
    rows = torch.arange(math.prod(x.shape[:-1]), device=x.device).reshape(x.shape[:-1])
    return apply(x, keep_mask(seed, rows, x.shape[-1], dropout_p), dropout_p)

"""Scores of attention inside a kernel: from a tile of query . key to what the softmax is of, and which keys a query sees.

    s  = scale * query . key
    s  = softcap * tanh(s / softcap)                  where softcap is given
    s -= slope * |i + diagonal - j|                   ALiBi
    s += floating mask;  s = -inf where a bool mask, the window or the sequence's end excludes the key

A tile has queries along its rows and keys along its columns, or, with KEYS_FIRST, the reverse; first_i and first_j are the
positions, inside their sequences, of its first query and key.

Exponentials are in base 2. Where nothing is added to a score (SCALED false), it is left as query . key, and the scale is part
of the exponential's factor: exp2((s - top) * factor), factor = scale * log2(e). The difference is taken first: rounded products
of huge scores may be further apart than an exponential's range. Otherwise factor = log2(e), and s is as above: in natural
units, since a mask of the lowest float times log2(e) would be -inf.
"""

import triton
import triton.language as tl

from . import dropout
from .tanh import tanh


@triton.jit
def inside_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """The numbers of a tile's queries and keys, shaped to broadcast."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    if KEYS_FIRST:
        i, j = column, row
    else:
        i, j = row, column
    return i, j


@triton.jit
def capped(product, scale, softcap, SCALED: tl.constexpr):
    """The score before anything that depends on positions."""
    s = product
    if SCALED:
        s = product * scale
        if softcap is not None:
            s = softcap * tanh(s / softcap)
    return s


@triton.jit
def placed(
    s,
    first_i,
    first_j,
    q_len,
    k_len,
    diagonal,
    window_left,
    window_right,
    slope,  # of ALiBi, or None
    mask,  # where the mask of this batch element and head begins, or None
    stride_mask_query,
    stride_mask_key,
    KEYS_FIRST: tl.constexpr,
    EDGE: tl.constexpr,  # whether the tile crosses an edge of the band or the end of the keys
):
    """The capped score with what depends on positions: ALiBi, the mask, the window."""
    i, j = inside_tile(s.shape[0], s.shape[1], KEYS_FIRST)
    i, j = first_i + i, first_j + j
    if slope is not None:
        s -= slope * tl.abs(i + diagonal - j).to(tl.float32)
    if mask is not None:
        given = _load_mask(
            mask, first_i, first_j, s.shape[0], s.shape[1], q_len, k_len, stride_mask_query, stride_mask_key, KEYS_FIRST
        )
        if mask.dtype.element_ty == tl.uint8:
            s = tl.where(given != 0, s, float("-inf"))
        else:
            s += given.to(tl.float32)
    if EDGE:
        sees = j < k_len
        if window_left is not None:
            sees &= j >= i + diagonal - window_left
        if window_right is not None:
            sees &= j <= i + diagonal + window_right
        s = tl.where(sees, s, float("-inf"))
    return s


@triton.jit
def _load_mask(
    mask,
    first_i,
    first_j,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    q_len,
    k_len,
    stride_mask_query,
    stride_mask_key,
    KEYS_FIRST: tl.constexpr,
):
    """The mask's elements, of a shape that broadcasts to the tile's: a stride is None where the mask is the same along it."""
    # The tile's corner in 64 bits, what lies in it in 32: half the registers.
    i, j = inside_tile(ROWS, COLUMNS, KEYS_FIRST)
    if stride_mask_query is not None:
        mask += tl.cast(first_i, tl.int64) * stride_mask_query
    if stride_mask_key is not None:
        mask += tl.cast(first_j, tl.int64) * stride_mask_key
    if stride_mask_query is None and stride_mask_key is None:
        given = tl.load(mask)
    elif stride_mask_query is None:
        given = tl.load(mask + j * stride_mask_key, mask=j < k_len - first_j, other=0)
    elif stride_mask_key is None:
        given = tl.load(mask + i * stride_mask_query, mask=i < q_len - first_i, other=0)
    else:
        here = (i < q_len - first_i) & (j < k_len - first_j)
        given = tl.load(mask + (i * stride_mask_query + j * stride_mask_key), mask=here, other=0)
    return given


@triton.jit
def score_gradients(
    product,  # query . key
    received,  # grad_out . value
    first_i,
    first_j,
    row_key,  # of each query, for dropout, or None; as top, shift and delta (queries, 1), or with KEYS_FIRST (1, queries)
    top,
    shift,
    delta,
    q_len,
    k_len,
    diagonal,
    scale,
    factor,
    window_left,
    window_right,
    softcap,
    slope,
    mask,
    stride_mask_query,
    stride_mask_key,
    threshold,
    inverse,
    SCALED: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    EDGE: tl.constexpr,
):
    """w, g and u of the formulas in attention_backward.py, for a tile."""
    t = capped(product, scale, softcap, SCALED)
    s = placed(
        t,
        first_i,
        first_j,
        q_len,
        k_len,
        diagonal,
        window_left,
        window_right,
        slope,
        mask,
        stride_mask_query,
        stride_mask_key,
        KEYS_FIRST,
        EDGE,
    )
    # What takes no part, even where there is NaN: excluded keys, and rows past the last query, whose shift is -inf.
    apart = (s == float("-inf")) | (shift == float("-inf"))
    p = tl.where(apart, 0.0, tl.exp2((s - top) * factor + shift))
    w = p
    if row_key is not None:
        _, j = inside_tile(s.shape[0], s.shape[1], KEYS_FIRST)
        kept = dropout.keep(row_key, first_j + j, threshold)
        w = tl.where(kept, p * inverse, 0.0)
        received = tl.where(kept, received * inverse, 0.0)
    g = tl.where(apart, 0.0, p * (received - delta))
    u = g
    if softcap is not None:
        ratio = t / softcap
        u = tl.where(apart, 0.0, g * (1.0 - ratio * ratio))
    return w, g, u

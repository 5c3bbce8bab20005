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

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import dropout
from .sequence import head_of
from .tanh import tanh


class Pairs(NamedTuple):
    """What makes scores of the products of one head's queries and keys, inside a kernel.

    Attributes:
        q_len, k_len, diagonal: those of the sequence.
        slope: of ALiBi, where the kernel is given slopes.
        mask: where the mask of this batch element and head begins, where it is given one.
    """

    q_len: Any
    k_len: Any
    diagonal: Any
    slope: Any
    mask: Any


class Terms(NamedTuple):
    """What the backward has of some queries (attention_backward.py), (queries, 1), or with KEYS_FIRST (1, queries).

    Attributes:
        row_key: dropout's, where there is any.
    """

    top: Any
    shift: Any
    delta: Any
    row_key: Any


@triton.jit
def pairs_of(given, at, b, h):
    """The pairs of head h of sequence b, which lies `at` (sequence.py)."""
    slope = 0.0  # a function of Triton 3.6 returns no None
    mask = 0
    if given.slopes.base is not None:
        slope = tl.load(given.slopes.base + b * given.slopes.stride_batch + h * given.slopes.stride_head)
    if given.mask.base is not None:
        mask = head_of(given.mask.base, b, h, 0, given.mask.stride_batch, given.mask.stride_head, 0)
    return Pairs(at.q_len, at.k_len, at.diagonal, slope, mask)


@triton.jit
def load_terms(terms, stride_term, given, row, i, q_len, KEYS_FIRST: tl.constexpr):
    """Those of the queries i of the head whose first one has this `row`; past the last query weights of zero."""
    inside = i < q_len
    axis: tl.constexpr = 0 if KEYS_FIRST else 1
    row_key = 0
    if given.dropout.seed is not None:
        row_key = tl.expand_dims(dropout.row_key(tl.load(given.dropout.seed), row + i), axis)
    top = tl.load(terms + row + i, mask=inside, other=0.0)
    shift = tl.load(terms + stride_term + row + i, mask=inside, other=float("-inf"))
    delta = tl.load(terms + 2 * stride_term + row + i, mask=inside, other=0.0)
    return Terms(tl.expand_dims(top, axis), tl.expand_dims(shift, axis), tl.expand_dims(delta, axis), row_key)


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
def capped(product, rules):
    """The score before anything that depends on positions."""
    s = product
    if rules.SCALED:
        s = product * rules.scale
        if rules.softcap is not None:
            s = rules.softcap * tanh(s / rules.softcap)
    return s


@triton.jit
def placed(
    s,
    first_i,
    first_j,
    pairs,
    given,
    KEYS_FIRST: tl.constexpr,
    EDGE: tl.constexpr,  # whether the tile crosses an edge of the band or the end of the keys
):
    """The capped score with what depends on positions: ALiBi, the mask, the window."""
    i, j = inside_tile(s.shape[0], s.shape[1], KEYS_FIRST)
    i, j = first_i + i, first_j + j
    if given.slopes.base is not None:
        s -= pairs.slope * tl.abs(i + pairs.diagonal - j).to(tl.float32)
    if given.mask.base is not None:
        found = _load_mask(pairs, given.mask, first_i, first_j, s.shape[0], s.shape[1], KEYS_FIRST)
        if pairs.mask.dtype.element_ty == tl.uint8:
            s = tl.where(found != 0, s, float("-inf"))
        else:
            s += found.to(tl.float32)
    if EDGE:
        sees = j < pairs.k_len
        if given.rules.window_left is not None:
            sees &= j >= i + pairs.diagonal - given.rules.window_left
        if given.rules.window_right is not None:
            sees &= j <= i + pairs.diagonal + given.rules.window_right
        s = tl.where(sees, s, float("-inf"))
    return s


@triton.jit
def _load_mask(pairs, strides, first_i, first_j, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """The mask's elements, of a shape that broadcasts to the tile's."""
    # The tile's corner in 64 bits, what lies in it in 32: half the registers.
    i, j = inside_tile(ROWS, COLUMNS, KEYS_FIRST)
    along_query, along_key = strides.stride_query, strides.stride_key
    mask = pairs.mask
    if along_query is not None:
        mask += tl.cast(first_i, tl.int64) * along_query
    if along_key is not None:
        mask += tl.cast(first_j, tl.int64) * along_key
    if along_query is None and along_key is None:
        found = tl.load(mask)
    elif along_query is None:
        found = tl.load(mask + j * along_key, mask=j < pairs.k_len - first_j, other=0)
    elif along_key is None:
        found = tl.load(mask + i * along_query, mask=i < pairs.q_len - first_i, other=0)
    else:
        here = (i < pairs.q_len - first_i) & (j < pairs.k_len - first_j)
        found = tl.load(mask + (i * along_query + j * along_key), mask=here, other=0)
    return found


@triton.jit
def score_gradients(
    product,  # query . key
    received,  # grad_out . value
    first_i,
    first_j,
    terms,
    pairs,
    given,
    KEYS_FIRST: tl.constexpr,
    EDGE: tl.constexpr,
):
    """w, g and u of the formulas in attention_backward.py, for a tile."""
    t = capped(product, given.rules)
    s = placed(t, first_i, first_j, pairs, given, KEYS_FIRST, EDGE)
    # What takes no part, even where there is NaN: excluded keys, and rows past the last query, whose shift is -inf.
    apart = (s == float("-inf")) | (terms.shift == float("-inf"))
    p = tl.where(apart, 0.0, tl.exp2((s - terms.top) * given.rules.factor + terms.shift))
    w = p
    if given.dropout.seed is not None:
        _, j = inside_tile(s.shape[0], s.shape[1], KEYS_FIRST)
        kept = dropout.keep(terms.row_key, first_j + j, given.dropout.threshold)
        w = tl.where(kept, p * given.dropout.inverse, 0.0)
        received = tl.where(kept, received * given.dropout.inverse, 0.0)
    g = tl.where(apart, 0.0, p * (received - terms.delta))
    u = g
    if given.rules.softcap is not None:
        ratio = t / given.rules.softcap
        u = tl.where(apart, 0.0, g * (1.0 - ratio * ratio))
    return w, g, u

"""What the backward of attention needs of each row before all else (attention_backward.py): top, shift and delta.

From lse and out for most rows, gathered from the keys for those with a large lse or few keys. A program has a block of queries.
"""

import triton
import triton.language as tl

from . import dropout
from .score import capped, pairs_of, placed
from .sequence import first_row, place, rows_of, sequence_at, visible
from .tile import load_rows

LARGE_LSE = tl.constexpr(16.0)  # beyond, lse's rounding is more than a few units in the last place of a weight
FEW_KEYS = tl.constexpr(128)  # rows of so few are gathered without asking


@triton.jit
def attention_backward_rows(
    given,  # Given (attention_problem.py)
    grad_out,  # Heads (batch, heads, q, value_dim)
    out,  # Heads (batch, heads, q, value_dim)
    lse,  # (batch, heads, q) float32, contiguous
    grad_lse,  # as lse, or None
    terms,  # (3, batch, heads, q) float32: top, shift and delta
    stride_term,
    blocks,  # of queries, of a head
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    block, h, b = place(tl.program_id(0), blocks, given.heads)
    at = sequence_at(given, b)
    first = block * QUERIES
    if first >= at.q_len:
        return
    row = first_row(given, at.batch, h, at.begin_q)
    left, right = given.rules.window_left, given.rules.window_right

    i = first + tl.arange(0, QUERIES)
    inside = i < at.q_len
    of_lse = tl.load(lse + row + i, mask=inside, other=float("-inf"))
    none = of_lse == float("-inf")
    do = load_rows(rows_of(grad_out, at.batch, h, at.begin_q, at.q_len), i, grad_out)
    o = load_rows(rows_of(out, at.batch, h, at.begin_q, at.q_len), i, out)
    top = tl.zeros((QUERIES,), tl.float32)
    shift = tl.where(none, float("-inf"), of_lse * -1.4426950408889634)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)

    last = tl.minimum(first + QUERIES, at.q_len) - 1
    lo, _, _, hi = visible(first, last, at.k_len, at.diagonal, left, right, KEYS)
    gather = hi - lo <= FEW_KEYS
    if left is not None and right is not None:
        gather |= left + right < FEW_KEYS
    large = tl.where(none, 0.0, tl.abs(of_lse)) > LARGE_LSE
    if gather | (tl.max(large.to(tl.int32), axis=0) > 0):
        keys = rows_of(given.key, at.batch, h // given.group, at.begin_k, at.k_len)
        values = rows_of(given.value, at.batch, h // given.group, at.begin_k, at.k_len)
        pairs = pairs_of(given, at, b, h)
        if given.dropout.seed is not None:
            row_key = dropout.row_key(tl.load(given.dropout.seed), row + i)[:, None]
        q = load_rows(rows_of(given.query, at.batch, h, at.begin_q, at.q_len), i, given.query)
        total = tl.zeros((QUERIES,), tl.float32)
        delta = tl.zeros((QUERIES,), tl.float32)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        for start in range(lo, hi, KEYS):
            j = start + tl.arange(0, KEYS)
            k = load_rows(keys, j, given.key)
            v = load_rows(values, j, given.value)
            s = capped(tl.dot(q, tl.trans(k), input_precision=given.PRECISION), given.rules)
            s = placed(s, first, start, pairs, given, False, True)
            received = tl.dot(do, tl.trans(v), input_precision=given.PRECISION)
            if given.dropout.seed is not None:
                kept = dropout.keep(row_key, j[None, :], given.dropout.threshold)
                received = tl.where(kept, received * given.dropout.inverse, 0.0)
            higher = tl.maximum(top, tl.max(s, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2((s - base[:, None]) * given.rules.factor)
            shrink = tl.exp2((top - base) * given.rules.factor)
            total = total * shrink + tl.sum(p, axis=1)
            delta = delta * shrink + tl.sum(tl.where(s == float("-inf"), 0.0, p * received), axis=1)
            top = higher
        top = tl.where(none, 0.0, top)
        total = tl.where(none, 1.0, total)
        shift = tl.where(none, float("-inf"), -tl.log2(total))
        delta = delta / total
    if grad_lse is not None:
        delta -= tl.load(grad_lse + row + i, mask=inside, other=0.0)
    tl.store(terms + row + i, top, mask=inside)
    tl.store(terms + stride_term + row + i, shift, mask=inside)
    tl.store(terms + 2 * stride_term + row + i, tl.where(none, 0.0, delta), mask=inside)

"""Attention's backward for query (attention_backward.py): grad_query = scale * u . key.

A program has QUERIES queries of one head, with grad_query in registers, and walks the blocks of KEYS keys that they see.
"""

import triton
import triton.language as tl

from .score import load_terms, pairs_of, score_gradients
from .sequence import first_row, part_of, place, rows_of, sequence_at, visible
from .tile import load_rows, load_tile, store_rows


@triton.jit
def _walk_keys(
    grad,
    first,
    q,
    do,
    terms,
    lo,
    hi,
    keys,
    values,
    key_tiles,
    value_tiles,
    pairs,
    given,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds u . key of the blocks of keys that begin in [lo, hi)."""
    by_engine: tl.constexpr = not EDGE or given.cu_seqlens_q is None  # attention_problem.py, Problem.tiles
    for start in range(lo, hi, KEYS):
        k = load_tile(keys, key_tiles if by_engine else None, start, KEYS, given.key)
        v = load_tile(values, value_tiles if by_engine else None, start, KEYS, given.value)
        product = tl.dot(q, tl.trans(k), input_precision=given.PRECISION)
        received = tl.dot(do, tl.trans(v), input_precision=given.PRECISION)
        _, _, u = score_gradients(product, received, first, start, terms, pairs, given, False, EDGE)
        grad = tl.dot(u.to(k.dtype), k, grad, input_precision=given.PRECISION)
    return grad


@triton.jit
def attention_backward_query(
    given,  # Given (attention_problem.py)
    key_tiles,  # describes key, in tiles of KEYS rows, or None
    value_tiles,
    grad_out,  # Heads (batch, heads, q, value_dim)
    terms,  # (3, batch, heads, q) float32: top, shift and delta
    grad_query,  # Heads (batch, heads, q, head_dim)
    stride_term,
    blocks,  # of queries, of a head
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    block, h, b = place(tl.program_id(0), blocks, given.heads)
    if given.rules.window_right is not None:
        block = blocks - 1 - block
    at = sequence_at(given, b)
    first = block * QUERIES
    if first >= at.q_len:
        return
    row = first_row(given, at.batch, h, at.begin_q)
    keys = rows_of(given.key, at.batch, h // given.group, at.begin_k, at.k_len)
    values = rows_of(given.value, at.batch, h // given.group, at.begin_k, at.k_len)
    pairs = pairs_of(given, at, b, h)

    i = first + tl.arange(0, QUERIES)
    own_terms = load_terms(terms, stride_term, given, row, i, at.q_len, False)
    q = load_rows(rows_of(given.query, at.batch, h, at.begin_q, at.q_len), i, given.query)
    do = load_rows(rows_of(grad_out, at.batch, h, at.begin_q, at.q_len), i, grad_out)
    grad = tl.zeros((QUERIES, given.key.TILE), tl.float32)

    last = tl.minimum(first + QUERIES, at.q_len) - 1
    left, right = given.rules.window_left, given.rules.window_right
    lo, inner, outer, hi = visible(first, last, at.k_len, at.diagonal, left, right, KEYS)
    for part in tl.static_range(3):  # an edge of the band, what lies inside, the other edge with the end of the keys
        if part != 0 or left is not None:
            begin, end = part_of(part, lo, inner, outer, hi)
            grad = _walk_keys(
                grad, first, q, do, own_terms, begin, end, keys, values, key_tiles, value_tiles, pairs, given, KEYS,
                part != 1,
            )  # fmt: skip
    store_rows(rows_of(grad_query, at.batch, h, at.begin_q, at.q_len), grad * given.rules.scale, i, grad_query)

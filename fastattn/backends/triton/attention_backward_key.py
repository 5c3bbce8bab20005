"""Attention's backward for key and value (attention_backward.py).

    grad_value = w^T . grad_out,   grad_key = scale * u^T . query

A program has KEYS keys of one kv head, with both gradients in registers, and walks the blocks of QUERIES queries that see
them, in all heads of the group: their sum is a loop, and no atomic.
"""

import triton
import triton.language as tl

from .score import load_terms, pairs_of, score_gradients
from .sequence import first_row, part_of, place, rows_of, sequence_at, visible
from .tile import load_rows, load_tile, store_rows


@triton.jit
def _walk_queries(
    grad_k,
    grad_v,
    first,
    row,
    k,
    v,
    lo,
    hi,
    queries,
    grads,
    query_tiles,
    grad_tiles,
    terms,
    stride_term,
    pairs,
    grad_out,
    given,
    QUERIES: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds u^T . query and w^T . grad_out of the blocks of queries that begin in [lo, hi), with keys along the tiles' rows."""
    for start in range(lo, hi, QUERIES):
        i = start + tl.arange(0, QUERIES)
        q = load_tile(queries, query_tiles, start, QUERIES, given.query)
        do = load_tile(grads, grad_tiles, start, QUERIES, grad_out)
        of_queries = load_terms(terms, stride_term, given, row, i, pairs.q_len, True)
        product = tl.dot(k, tl.trans(q), input_precision=given.PRECISION)
        received = tl.dot(v, tl.trans(do), input_precision=given.PRECISION)
        w, _, u = score_gradients(product, received, start, first, of_queries, pairs, given, True, EDGE)
        grad_v = tl.dot(w.to(do.dtype), do, grad_v, input_precision=given.PRECISION)
        grad_k = tl.dot(u.to(q.dtype), q, grad_k, input_precision=given.PRECISION)
    return grad_k, grad_v


@triton.jit
def attention_backward_key(
    given,  # Given (attention_problem.py)
    query_tiles,  # describes query, in tiles of QUERIES rows, or None
    grad_tiles,  # of grad_out
    grad_out,  # Heads (batch, heads, q, value_dim)
    terms,  # (3, batch, heads, q) float32: top, shift and delta
    grad_key,  # Heads (batch, kv_heads, k, head_dim)
    grad_value,  # Heads (batch, kv_heads, k, value_dim)
    stride_term,
    kv_heads,
    blocks,  # of keys, of a head
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    # Under a causal mask a head's first keys are seen by the most queries.
    block, shared, b = place(tl.program_id(0), blocks, kv_heads)
    at = sequence_at(given, b)
    first = block * KEYS
    if first >= at.k_len:
        return
    j = first + tl.arange(0, KEYS)
    k = load_rows(rows_of(given.key, at.batch, shared, at.begin_k, at.k_len), j, given.key)
    v = load_rows(rows_of(given.value, at.batch, shared, at.begin_k, at.k_len), j, given.value)
    grad_k = tl.zeros((KEYS, given.key.TILE), tl.float32)
    grad_v = tl.zeros((KEYS, given.value.TILE), tl.float32)

    # A key sees the queries as a query the keys, with the sides exchanged. What lies past the last key is not stored.
    last = tl.minimum(first + KEYS, at.k_len) - 1
    left, right = given.rules.window_left, given.rules.window_right
    lo, inner, outer, hi = visible(first, last, at.q_len, -at.diagonal, right, left, QUERIES)
    if left is None:
        outer = hi
    for member in range(given.group):
        h = shared * given.group + member
        row = first_row(given, at.batch, h, at.begin_q)
        queries = rows_of(given.query, at.batch, h, at.begin_q, at.q_len)
        grads = rows_of(grad_out, at.batch, h, at.begin_q, at.q_len)
        pairs = pairs_of(given, at, b, h)
        for part in tl.static_range(3):  # an edge of the band, what lies inside, the other edge
            if part == 1 or (part == 0 and right is not None) or (part == 2 and left is not None):
                begin, end = part_of(part, lo, inner, outer, hi)
                grad_k, grad_v = _walk_queries(
                    grad_k, grad_v, first, row, k, v, begin, end, queries, grads, query_tiles, grad_tiles, terms,
                    stride_term, pairs, grad_out, given, QUERIES, part != 1,
                )  # fmt: skip
    store_rows(rows_of(grad_key, at.batch, shared, at.begin_k, at.k_len), grad_k * given.rules.scale, j, grad_key)
    store_rows(rows_of(grad_value, at.batch, shared, at.begin_k, at.k_len), grad_v, j, grad_value)

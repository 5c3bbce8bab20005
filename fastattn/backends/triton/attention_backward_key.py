"""Attention's backward for key and value (attention_backward.py).

    grad_value = w^T . grad_out,   grad_key = scale * u^T . query

A program has KEYS keys of one kv head, with both gradients in registers, and walks the blocks of QUERIES queries that see
them, in all heads of the group: their sum is a loop, and no atomic.
"""

import triton
import triton.language as tl

from . import dropout
from .score import score_gradients
from .sequence import first_row, head_of, place, sequence, visible
from .tile import load_rows, store_rows


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
    query,
    grad_out,
    terms,
    rows,
    seed,
    stride_query_token,
    stride_query_dim,
    stride_grad_out_token,
    stride_grad_out_dim,
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
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds u^T . query and w^T . grad_out of the blocks of queries that begin in [lo, hi), with keys along the tiles' rows."""
    for start in range(lo, hi, QUERIES):
        i = start + tl.arange(0, QUERIES)
        q = load_rows(query, i, q_len, stride_query_token, stride_query_dim, HEAD_DIM, HEAD_TILE)
        do = load_rows(grad_out, i, q_len, stride_grad_out_token, stride_grad_out_dim, VALUE_DIM, VALUE_TILE)
        top = tl.load(terms + row + i, mask=i < q_len, other=0.0)
        shift = tl.load(terms + rows + row + i, mask=i < q_len, other=float("-inf"))  # weights of zero
        delta = tl.load(terms + 2 * rows + row + i, mask=i < q_len, other=0.0)
        row_key = None
        if seed is not None:
            row_key = dropout.row_key(tl.load(seed), row + i)[None, :]
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        received = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        w, _, u = score_gradients(
            product,
            received,
            start,
            first,
            row_key,
            top[None, :],
            shift[None, :],
            delta[None, :],
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
            SCALED,
            True,
            EDGE,
        )
        grad_v = tl.dot(w.to(do.dtype), do, grad_v, input_precision=PRECISION)
        grad_k = tl.dot(u.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def attention_backward_key(
    query,  # (batch, heads, q, head_dim); packed: (1, heads, total_q, head_dim), and so the others
    key,  # (batch, kv_heads, k, head_dim)
    value,  # (batch, kv_heads, k, value_dim)
    cu_seqlens_q,  # (batch + 1,) int32, or None for dense tensors
    cu_seqlens_k,
    mask,  # (batch, heads, q, k) by its strides, uint8 or floating, or None
    alibi_slopes,  # (batch, heads) float32 by its strides, or None
    seed,  # (1,) int64, or None without dropout
    stride_query_batch,
    stride_query_head,
    stride_query_token,
    stride_query_dim,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_key_dim,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_value_dim,
    stride_mask_batch,
    stride_mask_head,
    stride_mask_query,
    stride_mask_key,
    stride_slope_batch,
    stride_slope_head,
    heads,
    group,  # query heads a kv head
    tokens_q,  # rows of a head
    q_len,
    k_len,
    diagonal,
    scale,
    factor,
    window_left,  # or None, and so window_right
    window_right,
    softcap,  # or None
    threshold,
    inverse,
    grad_out,  # (batch, heads, q, value_dim)
    terms,  # (3, batch, heads, q) float32: top, shift and delta
    grad_key,  # (batch, kv_heads, k, head_dim)
    grad_value,  # (batch, kv_heads, k, value_dim)
    stride_grad_out_batch,
    stride_grad_out_head,
    stride_grad_out_token,
    stride_grad_out_dim,
    stride_grad_key_batch,
    stride_grad_key_head,
    stride_grad_key_token,
    stride_grad_key_dim,
    stride_grad_value_batch,
    stride_grad_value_head,
    stride_grad_value_token,
    stride_grad_value_dim,
    rows,  # in all
    kv_heads,
    blocks,  # of keys, of a head
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    # Under a causal mask a head's first keys are seen by the most queries.
    block, shared, b = place(tl.program_id(0), blocks, kv_heads)
    batch, begin_q, begin_k, q_len, k_len, diagonal = sequence(cu_seqlens_q, cu_seqlens_k, b, q_len, k_len, diagonal)
    first = block * KEYS
    if first >= k_len:
        return
    key = head_of(key, batch, shared, begin_k, stride_key_batch, stride_key_head, stride_key_token)
    value = head_of(value, batch, shared, begin_k, stride_value_batch, stride_value_head, stride_value_token)
    grad_key = head_of(
        grad_key, batch, shared, begin_k, stride_grad_key_batch, stride_grad_key_head, stride_grad_key_token
    )
    grad_value = head_of(
        grad_value, batch, shared, begin_k, stride_grad_value_batch, stride_grad_value_head, stride_grad_value_token
    )

    j = first + tl.arange(0, KEYS)
    k = load_rows(key, j, k_len, stride_key_token, stride_key_dim, HEAD_DIM, HEAD_TILE)
    v = load_rows(value, j, k_len, stride_value_token, stride_value_dim, VALUE_DIM, VALUE_TILE)
    grad_k = tl.zeros((KEYS, HEAD_TILE), tl.float32)
    grad_v = tl.zeros((KEYS, VALUE_TILE), tl.float32)

    # A key sees the queries as a query the keys, with the sides exchanged. What lies past the last key is not stored.
    last = tl.minimum(first + KEYS, k_len) - 1
    lo, inner, outer, hi = visible(first, last, q_len, -diagonal, window_right, window_left, QUERIES)
    if window_left is None:
        outer = hi
    for member in range(group):
        h = shared * group + member
        row = first_row(batch, h, begin_q, heads, tokens_q)
        queries = head_of(query, batch, h, begin_q, stride_query_batch, stride_query_head, stride_query_token)
        received = head_of(
            grad_out, batch, h, begin_q, stride_grad_out_batch, stride_grad_out_head, stride_grad_out_token
        )
        slope = None
        mask_of_head = None
        if mask is not None:
            mask_of_head = head_of(mask, b, h, 0, stride_mask_batch, stride_mask_head, 0)
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + b * stride_slope_batch + h * stride_slope_head)
        if window_right is not None:
            grad_k, grad_v = _walk_queries(
                grad_k,
                grad_v,
                first,
                row,
                k,
                v,
                lo,
                inner,
                queries,
                received,
                terms,
                rows,
                seed,
                stride_query_token,
                stride_query_dim,
                stride_grad_out_token,
                stride_grad_out_dim,
                q_len,
                k_len,
                diagonal,
                scale,
                factor,
                window_left,
                window_right,
                softcap,
                slope,
                mask_of_head,
                stride_mask_query,
                stride_mask_key,
                threshold,
                inverse,
                HEAD_DIM,
                VALUE_DIM,
                HEAD_TILE,
                VALUE_TILE,
                SCALED,
                PRECISION,
                QUERIES,
                True,
            )
        grad_k, grad_v = _walk_queries(
            grad_k,
            grad_v,
            first,
            row,
            k,
            v,
            inner,
            outer,
            queries,
            received,
            terms,
            rows,
            seed,
            stride_query_token,
            stride_query_dim,
            stride_grad_out_token,
            stride_grad_out_dim,
            q_len,
            k_len,
            diagonal,
            scale,
            factor,
            window_left,
            window_right,
            softcap,
            slope,
            mask_of_head,
            stride_mask_query,
            stride_mask_key,
            threshold,
            inverse,
            HEAD_DIM,
            VALUE_DIM,
            HEAD_TILE,
            VALUE_TILE,
            SCALED,
            PRECISION,
            QUERIES,
            False,
        )
        if window_left is not None:
            grad_k, grad_v = _walk_queries(
                grad_k,
                grad_v,
                first,
                row,
                k,
                v,
                outer,
                hi,
                queries,
                received,
                terms,
                rows,
                seed,
                stride_query_token,
                stride_query_dim,
                stride_grad_out_token,
                stride_grad_out_dim,
                q_len,
                k_len,
                diagonal,
                scale,
                factor,
                window_left,
                window_right,
                softcap,
                slope,
                mask_of_head,
                stride_mask_query,
                stride_mask_key,
                threshold,
                inverse,
                HEAD_DIM,
                VALUE_DIM,
                HEAD_TILE,
                VALUE_TILE,
                SCALED,
                PRECISION,
                QUERIES,
                True,
            )
    store_rows(grad_key, grad_k * scale, j, k_len, stride_grad_key_token, stride_grad_key_dim, HEAD_DIM, HEAD_TILE)
    store_rows(grad_value, grad_v, j, k_len, stride_grad_value_token, stride_grad_value_dim, VALUE_DIM, VALUE_TILE)

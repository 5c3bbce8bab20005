"""Attention, backward, dense and packed (Dao et al., 2022): what the scores were is computed again from query and key.

    s = score(query . key),   p = softmax(s),   w = dropout(p),   y = dropout(grad_out . value)
    delta = rowsum(p * y) - grad_lse  = rowsum(grad_out * out) - grad_lse
    g = p * (y - delta)                                              gradient of s, and of a floating mask
    u = g * (1 - tanh^2)  with a soft cap, else g                    gradient of scale * query . key
    grad_value = w^T . grad_out,   grad_key = scale * u^T . query,   grad_query = scale * u . key

Three kernels, and a fourth for a mask's gradient (attention_mask_gradient.py):

    attention_backward_rows    a program a block of queries: top, shift and delta of each row
    attention_backward_query   a program a block of queries, walks keys:  grad_query
    attention_backward_key     a program a block of keys, walks queries of all heads of the group:  grad_key, grad_value

so that every sum is a loop, and none an atomic. Weights are p = exp2((s - top) * factor + shift). What lse and out left to the
backward would give top = 0, shift = -lse * log2(e) and delta = rowsum(grad_out * out), and for most rows that is what
attention_backward_rows writes. But it leaves the roundings of lse and out in every weight and gradient of the row, which is
too much where lse is large, and where one key has almost all the weight and its gradient cancels to almost nothing (a row of
one key: to nothing). Rows with a large lse, or of few keys, are gathered from the keys instead: top = max(s),
shift = -log2(sum of exp2), delta = sum of p * y, as exact as a softmax of the whole row.

Work: 2 q k (5 head_dim and value_dim, of which the two products that both kernels need are done twice: 4 head_dim +
3 value_dim) flops a head, half of it if causal, twice q k exponentials; gathered rows 2 q k (head_dim + value_dim) and q k
exponentials more. Memory: query, key, value, out, grad_out and the three gradients, the blocks again from the L2 cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import dropout
from ._launch import launch
from .attention_problem import Problem
from .score import capped, inside_tile, placed
from .sequence import first_row, head_of, place, sequence, visible
from .tile import load_rows, store_rows

LARGE_LSE = tl.constexpr(16.0)  # beyond, lse's rounding is more than a few units in the last place of a weight
FEW_KEYS = tl.constexpr(128)  # rows of so few are gathered without asking


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
    """w, g and u of the formulas above, for a tile (score.py)."""
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
    apart = s == float("-inf")  # takes no part, even in a row that holds NaN
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
        u = g * (1.0 - ratio * ratio)
    return w, g, u


@triton.jit
def attention_backward_rows(
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
    out,
    lse,  # (batch, heads, q) float32, contiguous
    grad_lse,  # as lse, or None
    terms,  # (3, batch, heads, q) float32: top, shift and delta
    stride_grad_out_batch,
    stride_grad_out_head,
    stride_grad_out_token,
    stride_grad_out_dim,
    stride_out_batch,
    stride_out_head,
    stride_out_token,
    stride_out_dim,
    rows,  # in all
    blocks,  # of queries, of a head
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    block, h, b = place(tl.program_id(0), blocks, heads)
    batch, begin_q, begin_k, q_len, k_len, diagonal = sequence(cu_seqlens_q, cu_seqlens_k, b, q_len, k_len, diagonal)
    first = block * QUERIES
    if first >= q_len:
        return
    row = first_row(batch, h, begin_q, heads, tokens_q)
    grad_out = head_of(grad_out, batch, h, begin_q, stride_grad_out_batch, stride_grad_out_head, stride_grad_out_token)
    out = head_of(out, batch, h, begin_q, stride_out_batch, stride_out_head, stride_out_token)

    i = first + tl.arange(0, QUERIES)
    inside = i < q_len
    of_lse = tl.load(lse + row + i, mask=inside, other=float("-inf"))
    none = of_lse == float("-inf")
    do = load_rows(grad_out, i, q_len, stride_grad_out_token, stride_grad_out_dim, VALUE_DIM, VALUE_TILE)
    o = load_rows(out, i, q_len, stride_out_token, stride_out_dim, VALUE_DIM, VALUE_TILE)
    top = tl.zeros((QUERIES,), tl.float32)
    shift = tl.where(none, float("-inf"), of_lse * -1.4426950408889634)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)

    last = tl.minimum(first + QUERIES, q_len) - 1
    lo, _, _, hi = visible(first, last, k_len, diagonal, window_left, window_right, KEYS)
    gather = hi - lo <= FEW_KEYS
    if window_left is not None and window_right is not None:
        gather |= window_left + window_right < FEW_KEYS
    large = tl.where(none, 0.0, tl.abs(of_lse)) > LARGE_LSE
    if gather | (tl.max(large.to(tl.int32), axis=0) > 0):
        query = head_of(query, batch, h, begin_q, stride_query_batch, stride_query_head, stride_query_token)
        key = head_of(key, batch, h // group, begin_k, stride_key_batch, stride_key_head, stride_key_token)
        value = head_of(value, batch, h // group, begin_k, stride_value_batch, stride_value_head, stride_value_token)
        slope = None
        if mask is not None:
            mask = head_of(mask, b, h, 0, stride_mask_batch, stride_mask_head, 0)
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + b * stride_slope_batch + h * stride_slope_head)
        if seed is not None:
            row_key = dropout.row_key(tl.load(seed), row + i)[:, None]
        q = load_rows(query, i, q_len, stride_query_token, stride_query_dim, HEAD_DIM, HEAD_TILE)
        total = tl.zeros((QUERIES,), tl.float32)
        delta = tl.zeros((QUERIES,), tl.float32)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        for start in range(lo, hi, KEYS):
            j = start + tl.arange(0, KEYS)
            k = load_rows(key, j, k_len, stride_key_token, stride_key_dim, HEAD_DIM, HEAD_TILE)
            v = load_rows(value, j, k_len, stride_value_token, stride_value_dim, VALUE_DIM, VALUE_TILE)
            s = capped(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, SCALED)
            s = placed(
                s,
                first,
                start,
                q_len,
                k_len,
                diagonal,
                window_left,
                window_right,
                slope,
                mask,
                stride_mask_query,
                stride_mask_key,
                False,
                True,
            )
            received = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if seed is not None:
                kept = dropout.keep(row_key, j[None, :], threshold)
                received = tl.where(kept, received * inverse, 0.0)
            higher = tl.maximum(top, tl.max(s, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2((s - base[:, None]) * factor)
            shrink = tl.exp2((top - base) * factor)
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
    tl.store(terms + rows + row + i, shift, mask=inside)
    tl.store(terms + 2 * rows + row + i, tl.where(none, 0.0, delta), mask=inside)


@triton.jit
def _walk_keys(
    grad,
    first,
    row_key,
    q,
    do,
    top,
    shift,
    delta,
    lo,
    hi,
    key,
    value,
    stride_key_token,
    stride_key_dim,
    stride_value_token,
    stride_value_dim,
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
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds u . key of the blocks of keys that begin in [lo, hi)."""
    for start in range(lo, hi, KEYS):
        j = start + tl.arange(0, KEYS)
        k = load_rows(key, j, k_len, stride_key_token, stride_key_dim, HEAD_DIM, HEAD_TILE)
        v = load_rows(value, j, k_len, stride_value_token, stride_value_dim, VALUE_DIM, VALUE_TILE)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        received = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        _, _, u = score_gradients(
            product,
            received,
            first,
            start,
            row_key,
            top[:, None],
            shift[:, None],
            delta[:, None],
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
            False,
            EDGE,
        )
        grad = tl.dot(u.to(k.dtype), k, grad, input_precision=PRECISION)
    return grad


@triton.jit
def attention_backward_query(
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
    grad_query,  # (batch, heads, q, head_dim)
    stride_grad_out_batch,
    stride_grad_out_head,
    stride_grad_out_token,
    stride_grad_out_dim,
    stride_grad_batch,
    stride_grad_head,
    stride_grad_token,
    stride_grad_dim,
    rows,  # in all
    blocks,  # of queries, of a head
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    block, h, b = place(tl.program_id(0), blocks, heads)
    if window_right is not None:
        block = blocks - 1 - block
    batch, begin_q, begin_k, q_len, k_len, diagonal = sequence(cu_seqlens_q, cu_seqlens_k, b, q_len, k_len, diagonal)
    first = block * QUERIES
    if first >= q_len:
        return
    row = first_row(batch, h, begin_q, heads, tokens_q)
    query = head_of(query, batch, h, begin_q, stride_query_batch, stride_query_head, stride_query_token)
    key = head_of(key, batch, h // group, begin_k, stride_key_batch, stride_key_head, stride_key_token)
    value = head_of(value, batch, h // group, begin_k, stride_value_batch, stride_value_head, stride_value_token)
    grad_out = head_of(grad_out, batch, h, begin_q, stride_grad_out_batch, stride_grad_out_head, stride_grad_out_token)
    grad_query = head_of(grad_query, batch, h, begin_q, stride_grad_batch, stride_grad_head, stride_grad_token)
    slope = None
    if mask is not None:
        mask = head_of(mask, b, h, 0, stride_mask_batch, stride_mask_head, 0)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * stride_slope_batch + h * stride_slope_head)

    i = first + tl.arange(0, QUERIES)
    row_key = None
    if seed is not None:
        row_key = dropout.row_key(tl.load(seed), row + i)[:, None]
    top = tl.load(terms + row + i, mask=i < q_len, other=0.0)
    shift = tl.load(terms + rows + row + i, mask=i < q_len, other=float("-inf"))
    delta = tl.load(terms + 2 * rows + row + i, mask=i < q_len, other=0.0)
    q = load_rows(query, i, q_len, stride_query_token, stride_query_dim, HEAD_DIM, HEAD_TILE)
    do = load_rows(grad_out, i, q_len, stride_grad_out_token, stride_grad_out_dim, VALUE_DIM, VALUE_TILE)
    grad = tl.zeros((QUERIES, HEAD_TILE), tl.float32)

    last = tl.minimum(first + QUERIES, q_len) - 1
    lo, inner, outer, hi = visible(first, last, k_len, diagonal, window_left, window_right, KEYS)
    if window_left is not None:
        grad = _walk_keys(
            grad,
            first,
            row_key,
            q,
            do,
            top,
            shift,
            delta,
            lo,
            inner,
            key,
            value,
            stride_key_token,
            stride_key_dim,
            stride_value_token,
            stride_value_dim,
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
            HEAD_DIM,
            VALUE_DIM,
            HEAD_TILE,
            VALUE_TILE,
            SCALED,
            PRECISION,
            KEYS,
            True,
        )
    grad = _walk_keys(
        grad,
        first,
        row_key,
        q,
        do,
        top,
        shift,
        delta,
        inner,
        outer,
        key,
        value,
        stride_key_token,
        stride_key_dim,
        stride_value_token,
        stride_value_dim,
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
        HEAD_DIM,
        VALUE_DIM,
        HEAD_TILE,
        VALUE_TILE,
        SCALED,
        PRECISION,
        KEYS,
        False,
    )
    grad = _walk_keys(
        grad,
        first,
        row_key,
        q,
        do,
        top,
        shift,
        delta,
        outer,
        hi,
        key,
        value,
        stride_key_token,
        stride_key_dim,
        stride_value_token,
        stride_value_dim,
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
        HEAD_DIM,
        VALUE_DIM,
        HEAD_TILE,
        VALUE_TILE,
        SCALED,
        PRECISION,
        KEYS,
        True,
    )
    store_rows(grad_query, grad * scale, i, q_len, stride_grad_token, stride_grad_dim, HEAD_DIM, HEAD_TILE)


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


def backward(
    problem: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Fills the gradients of query, key and value. Returns the rows' terms, from which a mask's gradient follows."""
    grad_query, grad_key, grad_value = grads
    rows = lse.numel()
    terms = lse.new_empty((3, *lse.shape))
    config = problem.config("attention_backward_rows")
    blocks = triton.cdiv(problem.q_len, config.tiles["QUERIES"])
    launch(
        attention_backward_rows,
        (blocks * problem.heads * problem.batch,),
        *problem.arguments,
        grad_out,
        out,
        lse.contiguous(),
        None if grad_lse is None else grad_lse.contiguous(),
        terms,
        *grad_out.stride(),
        *out.stride(),
        rows,
        blocks,
        config=config,
        **problem.constants,
    )
    config = problem.config("attention_backward_query")
    blocks = triton.cdiv(problem.q_len, config.tiles["QUERIES"])
    launch(
        attention_backward_query,
        (blocks * problem.heads * problem.batch,),
        *problem.arguments,
        grad_out,
        terms,
        grad_query,
        *grad_out.stride(),
        *grad_query.stride(),
        rows,
        blocks,
        config=config,
        **problem.constants,
    )
    config = problem.config("attention_backward_key")
    blocks = triton.cdiv(problem.k_len, config.tiles["KEYS"])
    launch(
        attention_backward_key,
        (blocks * problem.kv_heads * problem.batch,),
        *problem.arguments,
        grad_out,
        terms,
        grad_key,
        grad_value,
        *grad_out.stride(),
        *grad_key.stride(),
        *grad_value.stride(),
        rows,
        problem.kv_heads,
        blocks,
        config=config,
        **problem.constants,
    )
    return terms

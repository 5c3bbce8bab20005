"""What the backward of attention needs of each row before all else (attention_backward.py): top, shift and delta.

From lse and out for most rows, gathered from the keys for those with a large lse or few keys. A program has a block of queries.
"""

import triton
import triton.language as tl

from . import dropout
from .score import capped, placed
from .sequence import first_row, head_of, place, sequence, visible
from .tile import load_rows

LARGE_LSE = tl.constexpr(16.0)  # beyond, lse's rounding is more than a few units in the last place of a weight
FEW_KEYS = tl.constexpr(128)  # rows of so few are gathered without asking


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

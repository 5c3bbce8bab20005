"""Attention's backward for query (attention_backward.py): grad_query = scale * u . key.

A program has QUERIES queries of one head, with grad_query in registers, and walks the blocks of KEYS keys that they see.
"""

import triton
import triton.language as tl

from . import dropout
from .score import score_gradients
from .sequence import first_row, head_of, place, sequence, visible
from .tile import load_rows, store_rows


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

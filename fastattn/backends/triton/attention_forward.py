"""Attention, forward, dense and packed (Dao et al., 2022): the kernel of attention.py and attention_varlen.py.

    s   = score(query . key)                          score.py
    out = dropout(softmax(s)) . value;  lse = logsumexp(s)

                 keys -->                       A program has QUERIES queries of one head. It walks the blocks of
               +--------+--------+-----+        KEYS keys that one of them sees, with the softmax kept up to date:
      queries  | s -> p |        |     |
               +--------+--------+-----+            top'   = max(top, s)
                   |                                p      = exp2((s - top') * factor)
                   v                                shrink = exp2((top - top') * factor)
      acc += p . value   (QUERIES x value_dim)      total  = shrink * total + sum(p);   acc = shrink * acc + p . value

Blocks outside the band of the window (causal too) are not visited; only those that cross its edge, or the end of the keys,
are masked. Where the band ends on the right (causal) a head's last blocks, which see the most keys, come first.

Work: 2 q k (head_dim + value_dim) flops a head (half of it if causal), and q k exponentials. Memory: query, key, value and
out once; a head's keys and values are read again for every block of queries, from the L2 cache: QUERIES flops a byte in
16 bits, twice what an H100 needs at 128 to be bound by its matrix units.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import dropout
from ._launch import launch
from .attention_problem import Problem
from .score import capped, placed
from .sequence import first_row, head_of, place, sequence, visible
from .tile import load_rows, store_rows


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    first,
    row_key,
    lo,
    hi,
    key,
    value,
    seed,
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
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds the blocks of keys that begin in [lo, hi)."""
    for start in range(lo, hi, KEYS):
        j = start + tl.arange(0, KEYS)
        k = load_rows(key, j, k_len, stride_key_token, stride_key_dim, HEAD_DIM, HEAD_TILE)
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
            EDGE,
        )
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp2(-inf - 0) = 0
        p = tl.exp2((s - base[:, None]) * factor)
        shrink = tl.exp2((top - base) * factor)
        total = total * shrink + tl.sum(p, axis=1)
        if seed is not None:
            p = tl.where(dropout.keep(row_key[:, None], j[None, :], threshold), p, 0.0)
        v = load_rows(value, j, k_len, stride_value_token, stride_value_dim, VALUE_DIM, VALUE_TILE)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc, total, top


@triton.jit
def attention_forward(
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
    out,  # (batch, heads, q, value_dim)
    lse,  # (batch, heads, q) float32, contiguous
    stride_out_batch,
    stride_out_head,
    stride_out_token,
    stride_out_dim,
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
    out = head_of(out, batch, h, begin_q, stride_out_batch, stride_out_head, stride_out_token)
    slope = None
    if mask is not None:
        mask = head_of(mask, b, h, 0, stride_mask_batch, stride_mask_head, 0)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + b * stride_slope_batch + h * stride_slope_head)

    i = first + tl.arange(0, QUERIES)
    row_key = None
    if seed is not None:
        row_key = dropout.row_key(tl.load(seed), row + i)
    q = load_rows(query, i, q_len, stride_query_token, stride_query_dim, HEAD_DIM, HEAD_TILE)
    acc = tl.zeros((QUERIES, VALUE_TILE), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)

    last = tl.minimum(first + QUERIES, q_len) - 1
    lo, inner, outer, hi = visible(first, last, k_len, diagonal, window_left, window_right, KEYS)
    if window_left is not None:
        acc, total, top = _attend(
            acc,
            total,
            top,
            q,
            first,
            row_key,
            lo,
            inner,
            key,
            value,
            seed,
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
            HEAD_DIM,
            VALUE_DIM,
            HEAD_TILE,
            VALUE_TILE,
            SCALED,
            PRECISION,
            KEYS,
            True,
        )
    acc, total, top = _attend(
        acc,
        total,
        top,
        q,
        first,
        row_key,
        inner,
        outer,
        key,
        value,
        seed,
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
        HEAD_DIM,
        VALUE_DIM,
        HEAD_TILE,
        VALUE_TILE,
        SCALED,
        PRECISION,
        KEYS,
        False,
    )
    acc, total, top = _attend(
        acc,
        total,
        top,
        q,
        first,
        row_key,
        outer,
        hi,
        key,
        value,
        seed,
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
        HEAD_DIM,
        VALUE_DIM,
        HEAD_TILE,
        VALUE_TILE,
        SCALED,
        PRECISION,
        KEYS,
        True,
    )

    # Rows without keys: zeros and -inf.
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    if seed is not None:
        acc *= inverse
    store_rows(out, acc / total[:, None], i, q_len, stride_out_token, stride_out_dim, VALUE_DIM, VALUE_TILE)
    top = top if SCALED else top * scale
    tl.store(lse + row + i, tl.where(none, float("-inf"), top + tl.log(total)), mask=i < q_len)


def forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Fills out and lse, which have the layout of the problem's tensors."""
    config = problem.config("attention_forward")
    blocks = triton.cdiv(problem.q_len, config.tiles["QUERIES"])
    launch(
        attention_forward,
        (blocks * problem.heads * problem.batch,),
        *problem.arguments,
        out,
        lse,
        *out.stride(),
        blocks,
        config=config,
        **problem.constants,
    )

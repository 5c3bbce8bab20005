"""The gradient of attention's floating mask: that of the scores, summed over the dimensions along which the mask is broadcast.

A program owns a tile of QUERIES x KEYS of the mask and computes the scores' gradients g (attention_backward.py) of every batch
element and head that has it, and, where the mask has one row for all queries, of every block of queries, one after the other:
each sum has one order, and no memory of the size of the scores is needed.

         mask's tile <--  sum over its (batch, head, block of queries) of  g = p * (y - delta)

Where the mask has few tiles and many terms each, they are split into parts, whose sums are added at the end in order; parts
times tiles is never more than a few programs a multiprocessor, so that is a few megabytes.

A mask that is the same along the keys shifts a row's scores: out does not change, lse does by as much, and the gradient is
the sum of grad_lse, without any rounding of terms that cancel; no kernel is needed for it.

Work: 2 q k (head_dim + value_dim) flops and q k exponentials a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dropout
from ._launch import launch
from .attention_problem import Problem
from .chips import multiprocessors
from .score import score_gradients
from .sequence import first_row, head_of, sequence
from .tile import load_rows


@triton.jit
def attention_mask_gradient(
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
    sums,  # (parts, the mask's four sizes), any floating dtype
    stride_grad_out_batch,
    stride_grad_out_head,
    stride_grad_out_token,
    stride_grad_out_dim,
    stride_sums_part,
    stride_sums_batch,
    stride_sums_head,
    stride_sums_query,
    stride_sums_key,
    rows,  # in all
    batches,  # that a tile is summed over, and so on
    heads_summed,
    blocks_summed,
    mask_heads,
    blocks_q,  # of the mask
    blocks_k,
    per_part,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_ROW: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tl.program_id(0)
    block_k, block_q = tile % blocks_k, tile // blocks_k % blocks_q
    mask_h, mask_b = tile // blocks_k // blocks_q % mask_heads, tile // blocks_k // blocks_q // mask_heads
    j = block_k * KEYS + tl.arange(0, KEYS)
    total = tl.zeros((QUERIES, KEYS), tl.float32)
    first = tl.program_id(1) * per_part
    for term in range(first, tl.minimum(first + per_part, batches * heads_summed * blocks_summed)):
        block = block_q + term % blocks_summed
        h = mask_h + term // blocks_summed % heads_summed
        b = mask_b + term // blocks_summed // heads_summed
        batch, begin_q, begin_k, queries, keys, offset = sequence(cu_seqlens_q, cu_seqlens_k, b, q_len, k_len, diagonal)
        # Whether the tile has anything of the band.
        low, high = block * QUERIES + offset, tl.minimum(block * QUERIES + QUERIES, queries) - 1 + offset
        seen = (block * QUERIES < queries) & (block_k * KEYS < keys)
        if window_left is not None:
            seen &= block_k * KEYS + KEYS - 1 >= low - window_left
        if window_right is not None:
            seen &= block_k * KEYS <= high + window_right
        if seen:
            row = first_row(batch, h, begin_q, heads, tokens_q)
            query_of = head_of(query, batch, h, begin_q, stride_query_batch, stride_query_head, stride_query_token)
            key_of = head_of(key, batch, h // group, begin_k, stride_key_batch, stride_key_head, stride_key_token)
            value_of = head_of(
                value, batch, h // group, begin_k, stride_value_batch, stride_value_head, stride_value_token
            )
            grad_of = head_of(
                grad_out, batch, h, begin_q, stride_grad_out_batch, stride_grad_out_head, stride_grad_out_token
            )
            mask_of = head_of(mask, b, h, 0, stride_mask_batch, stride_mask_head, 0)
            slope = None
            if alibi_slopes is not None:
                slope = tl.load(alibi_slopes + b * stride_slope_batch + h * stride_slope_head)
            i = block * QUERIES + tl.arange(0, QUERIES)
            row_key = None
            if seed is not None:
                row_key = dropout.row_key(tl.load(seed), row + i)[:, None]
            top = tl.load(terms + row + i, mask=i < queries, other=0.0)
            shift = tl.load(terms + rows + row + i, mask=i < queries, other=float("-inf"))
            delta = tl.load(terms + 2 * rows + row + i, mask=i < queries, other=0.0)
            q = load_rows(query_of, i, queries, stride_query_token, stride_query_dim, HEAD_DIM, HEAD_TILE)
            k = load_rows(key_of, j, keys, stride_key_token, stride_key_dim, HEAD_DIM, HEAD_TILE)
            do = load_rows(grad_of, i, queries, stride_grad_out_token, stride_grad_out_dim, VALUE_DIM, VALUE_TILE)
            v = load_rows(value_of, j, keys, stride_value_token, stride_value_dim, VALUE_DIM, VALUE_TILE)
            product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            received = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            _, g, _ = score_gradients(
                product,
                received,
                block * QUERIES,
                block_k * KEYS,
                row_key,
                top[:, None],
                shift[:, None],
                delta[:, None],
                queries,
                keys,
                offset,
                scale,
                factor,
                window_left,
                window_right,
                softcap,
                slope,
                mask_of,
                stride_mask_query,
                stride_mask_key,
                threshold,
                inverse,
                SCALED,
                False,
                True,
            )
            total += g

    sums = head_of(sums, mask_b, mask_h, 0, stride_sums_batch, stride_sums_head, 0)
    sums += tl.program_id(1).to(tl.int64) * stride_sums_part
    if ONE_ROW:
        column = tl.sum(total, axis=0)
        tl.store(sums + j.to(tl.int64) * stride_sums_key, column.to(sums.dtype.element_ty), mask=j < k_len)
    else:
        i = block_q * QUERIES + tl.arange(0, QUERIES)
        at = sums + i.to(tl.int64)[:, None] * stride_sums_query + j.to(tl.int64)[None, :] * stride_sums_key
        tl.store(at, total.to(sums.dtype.element_ty), mask=(i[:, None] < q_len) & (j[None, :] < k_len))


def mask_gradient(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, lse: Tensor, terms: Tensor, grad_mask: Tensor
) -> None:
    """Fills grad_mask, of the mask's shape; `terms` are those of attention_backward.py."""
    if grad_mask.numel() == 0:
        return
    if grad_mask.shape[3] == 1:
        shifts = _shifts(problem, grad_lse, lse, terms)
        grad_mask.copy_(shifts[..., None].sum_to_size(grad_mask.shape))
        return
    batches, mask_heads, mask_q, mask_k = grad_mask.shape
    config = problem.config("attention_mask_gradient")
    queries, keys = config.tiles["QUERIES"], config.tiles["KEYS"]
    # A dimension of size 1 is summed over even where that is one term.
    summed_batch = problem.batch if batches == 1 else 1
    summed_heads = problem.heads if mask_heads == 1 else 1
    blocks = triton.cdiv(problem.q_len, queries)
    blocks_q, summed_blocks = (1, blocks) if mask_q == 1 else (blocks, 1)
    blocks_k = triton.cdiv(mask_k, keys)
    tiles, summed = batches * mask_heads * blocks_q * blocks_k, summed_batch * summed_heads * summed_blocks
    parts = max(1, min(summed, 4 * multiprocessors(grad_mask.device) // tiles))
    per_part = triton.cdiv(summed, parts)
    parts = max(1, triton.cdiv(summed, max(per_part, 1)))
    sums = grad_mask[None] if parts == 1 else grad_mask.new_empty((parts, *grad_mask.shape), dtype=torch.float32)
    launch(
        attention_mask_gradient,
        (tiles, parts),
        *problem.arguments,
        grad_out,
        terms,
        sums,
        *grad_out.stride(),
        *sums.stride(),
        lse.numel(),
        summed_batch,
        summed_heads,
        summed_blocks,
        mask_heads,
        blocks_q,
        blocks_k,
        per_part,
        config=config,
        **problem.constants,
        ONE_ROW=mask_q == 1,
    )
    if parts > 1:
        grad_mask.copy_(sums.sum(0))


def _shifts(problem: Problem, grad_lse: Tensor | None, lse: Tensor, terms: Tensor) -> Tensor:
    """What each row gets from a shift of all its scores, (batch, heads, q)."""
    found = terms[2] * 0.0  # NaN where the row's gradients are
    if grad_lse is not None:
        found = torch.where(lse == -torch.inf, 0.0, found + grad_lse)
    if problem.cu_seqlens_q is None:
        return found
    begin, end = problem.cu_seqlens_q[:-1, None].long(), problem.cu_seqlens_q[1:, None].long()
    token = begin + torch.arange(problem.q_len, device=lse.device)
    rows = found[0][:, token.clamp(max=max(lse.shape[2] - 1, 0))]
    return torch.where(token < end, rows, 0.0).transpose(0, 1)

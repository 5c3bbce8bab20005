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

from ._launch import launch
from .attention_problem import Problem, heads_of
from .chips import multiprocessors
from .score import load_terms, pairs_of, score_gradients
from .sequence import first_row, head_of, rows_of, sequence_at
from .tile import load_rows


@triton.jit
def attention_mask_gradient(
    given,  # Given (attention_problem.py)
    grad_out,  # Heads (batch, heads, q, value_dim)
    terms,  # (3, batch, heads, q) float32: top, shift and delta
    sums,  # (parts, the mask's four sizes), any floating dtype
    stride_term,
    stride_sums_part,
    stride_sums_batch,
    stride_sums_head,
    stride_sums_query,
    stride_sums_key,
    batches,  # that a tile is summed over, and so on
    heads_summed,
    blocks_summed,
    mask_heads,
    blocks_q,  # of the mask
    blocks_k,
    per_part,
    ONE_ROW: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tl.program_id(0)
    block_k, block_q = tile % blocks_k, tile // blocks_k % blocks_q
    mask_h, mask_b = tile // blocks_k // blocks_q % mask_heads, tile // blocks_k // blocks_q // mask_heads
    left, right = given.rules.window_left, given.rules.window_right
    j = block_k * KEYS + tl.arange(0, KEYS)
    total = tl.zeros((QUERIES, KEYS), tl.float32)
    first = tl.program_id(1) * per_part
    for term in range(first, tl.minimum(first + per_part, batches * heads_summed * blocks_summed)):
        block = block_q + term % blocks_summed
        h = mask_h + term // blocks_summed % heads_summed
        b = mask_b + term // blocks_summed // heads_summed
        at = sequence_at(given, b)
        # Whether the tile has anything of the band.
        low, high = block * QUERIES + at.diagonal, tl.minimum(block * QUERIES + QUERIES, at.q_len) - 1 + at.diagonal
        seen = (block * QUERIES < at.q_len) & (block_k * KEYS < at.k_len)
        if left is not None:
            seen &= block_k * KEYS + KEYS - 1 >= low - left
        if right is not None:
            seen &= block_k * KEYS <= high + right
        if seen:
            row = first_row(given, at.batch, h, at.begin_q)
            i = block * QUERIES + tl.arange(0, QUERIES)
            of_queries = load_terms(terms, stride_term, given, row, i, at.q_len, False)
            q = load_rows(rows_of(given.query, at.batch, h, at.begin_q, at.q_len), i, given.query)
            k = load_rows(rows_of(given.key, at.batch, h // given.group, at.begin_k, at.k_len), j, given.key)
            do = load_rows(rows_of(grad_out, at.batch, h, at.begin_q, at.q_len), i, grad_out)
            v = load_rows(rows_of(given.value, at.batch, h // given.group, at.begin_k, at.k_len), j, given.value)
            product = tl.dot(q, tl.trans(k), input_precision=given.PRECISION)
            received = tl.dot(do, tl.trans(v), input_precision=given.PRECISION)
            pairs = pairs_of(given, at, b, h)
            _, g, _ = score_gradients(
                product, received, block * QUERIES, block_k * KEYS, of_queries, pairs, given, False, True
            )
            total += g

    sums = head_of(sums, mask_b, mask_h, 0, stride_sums_batch, stride_sums_head, 0)
    sums += tl.program_id(1).to(tl.int64) * stride_sums_part
    if ONE_ROW:
        column = tl.sum(total, axis=0)
        tl.store(sums + j.to(tl.int64) * stride_sums_key, column.to(sums.dtype.element_ty), mask=j < given.k_len)
    else:
        i = block_q * QUERIES + tl.arange(0, QUERIES)
        where = sums + i.to(tl.int64)[:, None] * stride_sums_query + j.to(tl.int64)[None, :] * stride_sums_key
        here = (i[:, None] < given.q_len) & (j[None, :] < given.k_len)
        tl.store(where, total.to(sums.dtype.element_ty), mask=here)


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
        problem.given,
        heads_of(grad_out),
        terms,
        sums,
        lse.numel(),
        *sums.stride(),
        summed_batch,
        summed_heads,
        summed_blocks,
        mask_heads,
        blocks_q,
        blocks_k,
        per_part,
        config=config,
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

"""Where the sequences of attention lie, dense or packed, and which of their positions see each other."""

import triton
import triton.language as tl


@triton.jit
def place(program, blocks, heads):
    """Its block, head and sequence: the blocks of a head come one after the other, so that its keys stay in the L2 cache."""
    return program % blocks, program // blocks % heads, program // blocks // heads


@triton.jit
def sequence(cu_seqlens_q, cu_seqlens_k, b, q_len, k_len, diagonal):
    """Sequence b: its index along the tensors' batch, its first query and key there, its numbers of them, its diagonal.

    In packed tensors, whose batch is 1, q_len and k_len are the most that a sequence may have.
    """
    if cu_seqlens_q is None:
        batch, begin_q, begin_k, queries, keys, offset = b, 0, 0, q_len, k_len, diagonal
    else:
        batch = b * 0
        begin_q, begin_k = tl.load(cu_seqlens_q + b), tl.load(cu_seqlens_k + b)
        queries = tl.load(cu_seqlens_q + b + 1) - begin_q
        keys = tl.load(cu_seqlens_k + b + 1) - begin_k
        offset = keys - queries
        queries, keys = tl.minimum(queries, q_len), tl.minimum(keys, k_len)
    return batch, begin_q, begin_k, queries, keys, offset


@triton.jit
def head_of(tensor, batch, head, begin, stride_batch, stride_head, stride_token):
    """Where the tokens of one head of one sequence begin."""
    return (
        tensor
        + tl.cast(batch, tl.int64) * stride_batch
        + tl.cast(head, tl.int64) * stride_head
        + tl.cast(begin, tl.int64) * stride_token
    )


@triton.jit
def first_row(batch, head, begin_q, heads, tokens_q):
    """The row of a head's first query in tensors of one element a query, (batch, heads, tokens_q), and in dropout's hash."""
    return (tl.cast(batch, tl.int64) * heads + head) * tokens_q + begin_q


@triton.jit
def visible(first, last, length, diagonal, before, after, BLOCK: tl.constexpr):
    """What first … last see of `length` positions: those from first + diagonal - before to last + diagonal + after.

    Returns lo, inner, outer, hi: the blocks that begin in [lo, inner) and [outer, hi) cross an edge of the band or the end of
    the sequence, those in [inner, outer) are seen whole by all. lo, inner and outer are multiples of BLOCK, unless the ranges
    that they begin are empty. `before` or `after` is None where there is no limit on that side.
    """
    lo = 0
    hi = length
    inner = 0
    outer = length
    if before is not None:
        lo = tl.maximum(first + diagonal - before, 0) // BLOCK * BLOCK
        inner = tl.maximum(last + diagonal - before + BLOCK - 1, 0) // BLOCK * BLOCK
    if after is not None:
        hi = tl.minimum(length, last + diagonal + after + 1)
        outer = tl.minimum(length, tl.maximum(first + diagonal + after + 1, 0))
    hi = tl.maximum(hi, lo)
    inner = tl.minimum(tl.maximum(inner, lo), hi)
    outer = tl.maximum(outer // BLOCK * BLOCK, inner)
    return lo, inner, outer, hi

"""Where the sequences of attention lie, dense or packed, and which of their positions see each other."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import Rows


class Sequence(NamedTuple):
    """One sequence, inside a kernel.

    Attributes:
        batch: its index along the tensors' batch, which is 1 for packed tensors.
        begin_q, begin_k: its first query and key there.
        q_len, k_len: its numbers of them.
        diagonal: query i stands at key i + diagonal.
    """

    batch: Any
    begin_q: Any
    begin_k: Any
    q_len: Any
    k_len: Any
    diagonal: Any


@triton.jit
def place(program, blocks, heads):
    """Its block, head and sequence: the blocks of a head come one after the other, so that its keys stay in the L2 cache."""
    return program % blocks, program // blocks % heads, program // blocks // heads


@triton.jit
def sequence_at(given, b):
    """Sequence b of what a kernel is given (attention_problem.py)."""
    if given.cu_seqlens_q is None:
        found = Sequence(b, 0, 0, given.q_len, given.k_len, given.diagonal)
    else:
        begin_q, queries = _between(given.cu_seqlens_q + b, given.tokens_q)
        begin_k, keys = _between(given.cu_seqlens_k + b, given.tokens_k)
        most_queries, most_keys = tl.minimum(queries, given.q_len), tl.minimum(keys, given.k_len)
        found = Sequence(b * 0, begin_q, begin_k, most_queries, most_keys, keys - queries)
    return found


@triton.jit
def _between(boundary, tokens):
    """Where a sequence begins and how long it is, cut to the tokens that there are: nobody has looked at the boundaries."""
    begin = tl.minimum(tl.maximum(tl.load(boundary), 0), tokens)
    end = tl.minimum(tl.load(boundary + 1), tokens)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def head_of(base, batch, head, begin, stride_batch, stride_head, stride_token):
    """Where the tokens of one head of one sequence begin."""
    return (
        base
        + tl.cast(batch, tl.int64) * stride_batch
        + tl.cast(head, tl.int64) * stride_head
        + tl.cast(begin, tl.int64) * stride_token
    )


@triton.jit
def rows_of(heads, batch, head, begin, count):
    """The `count` tokens of one head of one sequence, of a tensor that a kernel is given as `Heads` (attention_problem.py)."""
    base = head_of(heads.base, batch, head, begin, heads.stride_batch, heads.stride_head, heads.stride_token)
    return Rows(base, count, heads.stride_token, heads.stride_dim, batch, head, begin)


@triton.jit
def first_row(given, batch, head, begin_q):
    """The row of a head's first query in tensors of one element a query, (batch, heads, tokens_q), and in dropout's hash."""
    return (tl.cast(batch, tl.int64) * given.heads + head) * given.tokens_q + begin_q


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


@triton.jit
def part_of(part: tl.constexpr, lo, inner, outer, hi):
    """Part 0, 1 or 2 of the blocks that `visible` found: where its blocks begin, and end."""
    if part == 0:
        begin, end = lo, inner
    elif part == 1:
        begin, end = inner, outer
    else:
        begin, end = outer, hi
    return begin, end

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
from .attention_problem import Problem, heads_of
from .score import capped, pairs_of, placed
from .sequence import first_row, part_of, place, rows_of, sequence_at, visible
from .tile import load_rows, load_tile, store_rows


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
    keys,
    values,
    key_tiles,
    value_tiles,
    pairs,
    given,
    KEYS: tl.constexpr,
    SPECIALISED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds the blocks of keys that begin in [lo, hi)."""
    by_engine: tl.constexpr = not EDGE or given.cu_seqlens_q is None  # attention_problem.py, Problem.tiles
    for start in tl.range(lo, hi, KEYS, warp_specialize=SPECIALISED):
        j = start + tl.arange(0, KEYS)
        k = load_tile(keys, key_tiles if by_engine else None, start, KEYS, given.key)
        s = capped(tl.dot(q, tl.trans(k), input_precision=given.PRECISION), given.rules)
        s = placed(s, first, start, pairs, given, False, EDGE)
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp2(-inf - 0) = 0
        p = tl.exp2((s - base[:, None]) * given.rules.factor)
        shrink = tl.exp2((top - base) * given.rules.factor)
        total = total * shrink + tl.sum(p, axis=1)
        if given.dropout.seed is not None:
            p = tl.where(dropout.keep(row_key[:, None], j[None, :], given.dropout.threshold), p, 0.0)
        v = load_tile(values, value_tiles if by_engine else None, start, KEYS, given.value)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=given.PRECISION)
        top = higher
    return acc, total, top


@triton.jit
def attention_forward(
    given,  # Given (attention_problem.py)
    key_tiles,  # describes key, in tiles of KEYS rows, or None
    value_tiles,
    out,  # Heads (batch, heads, q, value_dim)
    lse,  # (batch, heads, q) float32, contiguous
    blocks,  # of queries, of a head
    SPECIALISED: tl.constexpr,  # whether some warps load, some multiply, and others compute the softmax
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    block, h, b = place(tl.program_id(0), blocks, given.heads)
    if given.rules.window_right is not None:
        block = blocks - 1 - block
    at = sequence_at(given, b)
    first = block * QUERIES
    if first >= at.q_len:
        return
    row = first_row(given, at.batch, h, at.begin_q)
    queries = rows_of(given.query, at.batch, h, at.begin_q, at.q_len)
    keys = rows_of(given.key, at.batch, h // given.group, at.begin_k, at.k_len)
    values = rows_of(given.value, at.batch, h // given.group, at.begin_k, at.k_len)
    pairs = pairs_of(given, at, b, h)

    i = first + tl.arange(0, QUERIES)
    row_key = None
    if given.dropout.seed is not None:
        row_key = dropout.row_key(tl.load(given.dropout.seed), row + i)
    q = load_rows(queries, i, given.query)
    acc = tl.zeros((QUERIES, given.value.TILE), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)

    last = tl.minimum(first + QUERIES, at.q_len) - 1
    left, right = given.rules.window_left, given.rules.window_right
    lo, inner, outer, hi = visible(first, last, at.k_len, at.diagonal, left, right, KEYS)
    for part in tl.static_range(3):  # an edge of the band, what lies inside, the other edge with the end of the keys
        if part != 0 or left is not None:
            begin, end = part_of(part, lo, inner, outer, hi)
            acc, total, top = _attend(
                acc, total, top, q, first, row_key, begin, end, keys, values, key_tiles, value_tiles, pairs, given,
                KEYS, SPECIALISED, part != 1,
            )  # fmt: skip

    # Rows without keys: zeros and -inf.
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    if given.dropout.seed is not None:
        acc *= given.dropout.inverse
    store_rows(rows_of(out, at.batch, h, at.begin_q, at.q_len), acc / total[:, None], i, out)
    top = top if given.rules.SCALED else top * given.rules.scale
    tl.store(lse + row + i, tl.where(none, float("-inf"), top + tl.log(total)), mask=i < at.q_len)


def forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Fills out and lse, which have the layout of the problem's tensors."""
    config = problem.config("attention_forward")
    blocks = triton.cdiv(problem.q_len, config.tiles["QUERIES"])
    tiles = problem.tiles(config, config.tiles["KEYS"], problem.key, problem.value)
    # The compiler takes loops apart whose every tile comes by the copy engine.
    specialised = config.specialised and tiles[0] is not None and problem.cu_seqlens_q is None
    launch(
        attention_forward,
        (blocks * problem.heads * problem.batch,),
        problem.given,
        *tiles,
        heads_of(out),
        lse,
        blocks,
        config=config,
        SPECIALISED=specialised,
    )

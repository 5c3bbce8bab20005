"""How attention spreads its weights: entropy, largest weight, its key, and mean distance, for each query.

    s  = score(query . key)                           score.py
    entropy = -sum p log p;  max_weight, argmax;  distance = sum p |i + diagonal - j|      with p = softmax(s)

A program has QUERIES queries of one head, and walks the blocks of keys that one of them sees, as attention_forward.py does:

    top' = max(top, s);   y = (s - top') * factor;   p = exp2(y);   step = (top - top') * factor;   shrink = exp2(step)
    weighted = shrink * (weighted + step * total) + sum(p y)
    distance = shrink * distance + sum(p |i + diagonal - j|);   total = shrink * total + sum(p)

All terms of a sum have one sign: nothing cancels. Of total, rest = total - 1 is kept, without the weight 1 of the key at top, so
that an entropy near zero keeps its last places. entropy = log(1 + rest) - log(2) weighted / total; max_weight = 1 / total.

Work: 2 q k head_dim flops a head (half of it if causal), and q k exponentials. Memory: query and key once, 20 bytes a query out.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..attention_outputs import summary_outputs
from . import attention_problem
from ._launch import launch
from .attention_problem import Problem
from .score import capped, pairs_of, placed
from .sequence import first_row, part_of, place, rows_of, sequence_at, visible
from .tile import load_rows


@triton.jit
def _gather(
    rest,
    weighted,
    far,
    top,
    argmax,
    q,
    first,
    lo,
    hi,
    keys,
    pairs,
    given,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds the blocks of keys that begin in [lo, hi)."""
    position = first + pairs.diagonal + tl.arange(0, QUERIES)
    for start in range(lo, hi, KEYS):
        j = start + tl.arange(0, KEYS)
        k = load_rows(keys, j, given.key)
        s = capped(tl.dot(q, tl.trans(k), input_precision=given.PRECISION), given.rules)
        s = placed(s, first, start, pairs, given, False, EDGE)
        here = tl.max(s, axis=1)
        found = tl.min(tl.where(s == here[:, None], j[None, :], start + KEYS), axis=1)  # the first of equal ones
        higher = tl.maximum(top, here)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp2(-inf - 0) = 0
        y = (s - base[:, None]) * given.rules.factor
        p = tl.exp2(y)
        rises = here > top
        # From here on down p is next to nothing, and y may be infinite; a NaN is in p, too.
        lowest = tl.where(y > -126.0, y, -126.0)
        step = (top - base) * given.rules.factor
        step = tl.where(step > -200.0, step, -200.0)
        shrink = tl.exp2(step)
        distance = tl.abs(position[:, None] - j[None, :]).to(tl.float32)
        far = shrink * far + tl.sum(p * distance, axis=1)
        # The key at top does not count, but one that was at top until now does. (Infinity less infinity is to be NaN.)
        highest = (rises & (here < float("inf")))[:, None] & (j[None, :] == found[:, None])
        p = tl.where(highest, 0.0, p)
        earlier = tl.where(rises & (argmax >= 0), 1.0, 0.0)
        weighted = shrink * (weighted + step * (rest + earlier)) + tl.sum(p * lowest, axis=1)
        rest = shrink * (rest + earlier) + tl.sum(p, axis=1)
        argmax = tl.where(rises, found, argmax)
        top = higher
    return rest, weighted, far, top, argmax


@triton.jit
def attention_summary(
    given,  # Given (attention_problem.py); value, cu_seqlens and dropout are not used
    entropy,  # (batch, heads, q) float32, contiguous, and so the others
    max_weight,
    argmax,  # int64
    distance,
    blocks,  # of queries, of a head
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    block, h, b = place(tl.program_id(0), blocks, given.heads)
    if given.rules.window_right is not None:
        block = blocks - 1 - block
    at = sequence_at(given, b)
    first = block * QUERIES
    row = first_row(given, b, h, 0)
    keys = rows_of(given.key, b, h // given.group, 0, at.k_len)
    pairs = pairs_of(given, at, b, h)

    i = first + tl.arange(0, QUERIES)
    q = load_rows(rows_of(given.query, b, h, 0, at.q_len), i, given.query)
    rest = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES,), tl.float32)
    far = tl.zeros((QUERIES,), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    most = tl.full((QUERIES,), -1, tl.int32)

    last = tl.minimum(first + QUERIES, at.q_len) - 1
    left, right = given.rules.window_left, given.rules.window_right
    lo, inner, outer, hi = visible(first, last, at.k_len, at.diagonal, left, right, KEYS)
    for part in tl.static_range(3):  # an edge of the band, what lies inside, the other edge with the end of the keys
        if part != 0 or left is not None:
            begin, end = part_of(part, lo, inner, outer, hi)
            rest, weighted, far, top, most = _gather(
                rest, weighted, far, top, most, q, first, begin, end, keys, pairs, given, QUERIES, KEYS,
                part != 1,
            )  # fmt: skip

    total = tl.where(most >= 0, 1.0 + rest, rest)
    none = total == 0.0  # no key: zeros, and -1
    whole = tl.where(none, 1.0, total)
    there = i < at.q_len
    # log(1 + rest): rounding 1 + rest does the same to both factors.
    above = whole - 1.0
    log_whole = tl.where(above == 0.0, rest, tl.log(whole) * (rest / tl.where(above == 0.0, 1.0, above)))
    spread = log_whole - weighted / whole * 0.6931471805599453
    tl.store(entropy + row + i, spread, mask=there)
    tl.store(max_weight + row + i, tl.where(none, 0.0, 1.0 / whole), mask=there)
    tl.store(argmax + row + i, tl.where(total > 0.0, most, -1).to(tl.int64), mask=there)  # -1 where it is NaN, too
    tl.store(distance + row + i, far / whole, mask=there)


def unsupported(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    return attention_problem.unsupported(query, key, key)


def forward(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    outputs = summary_outputs(query)
    problem = Problem(
        query,
        key,
        key,
        None,
        None,
        attn_mask,
        alibi_slopes,
        None,
        query.shape[2],
        key.shape[2],
        scale,
        window_left,
        window_right,
        diagonal,
        softcap,
        0.0,
    )
    config = problem.config("attention_summary")
    blocks = triton.cdiv(problem.q_len, config.tiles["QUERIES"])
    launch(
        attention_summary,
        (blocks * problem.heads * problem.batch,),
        problem.given,
        *outputs,
        blocks,
        config=config,
    )
    return outputs

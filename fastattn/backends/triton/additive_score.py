"""Scores of additive attention inside a kernel, a tile of queries and keys at a time.

    s_ij = sum over h of v_h tanh(a_ih + b_jh) + mask_ij             a, b: the projected queries and keys

The hidden units go by in chunks. A chunk's tanhs, HIDDEN x QUERIES x KEYS of them, exist in registers alone, the hidden units of
one query and key in one thread, so that their sum needs no other: about fifteen instructions a tanh, which bounds the op.

    with a floating mask, -inf takes a key out; with a boolean one, False does
"""

import triton
import triton.language as tl

from .tanh import tanh


@triton.jit
def products(
    a,  # (queries, hidden) of one batch element, contiguous
    b,  # (keys, hidden), the same
    v,  # (hidden,)
    i,  # (QUERIES,)
    j,  # (KEYS,)
    queries,
    keys,
    hidden,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """v . tanh(a_i + b_j), (QUERIES, KEYS) in float32."""
    score = tl.zeros((QUERIES, KEYS), tl.float32)
    a_rows = a + i.to(tl.int64) * hidden
    b_rows = b + j.to(tl.int64) * hidden
    for start in range(0, hidden, HIDDEN):
        h = start + tl.arange(0, HIDDEN)
        some = (h < hidden)[:, None]
        left = tl.load(a_rows[None, :] + h[:, None], mask=some & (i < queries)[None, :], other=0.0).to(tl.float32)
        right = tl.load(b_rows[None, :] + h[:, None], mask=some & (j < keys)[None, :], other=0.0).to(tl.float32)
        weight = tl.load(v + h, mask=h < hidden, other=0.0).to(tl.float32)
        score += tl.sum(weight[:, None, None] * tanh(left[:, :, None] + right[:, None, :]), axis=0)
    return score


@triton.jit
def masked(
    score,  # (QUERIES, KEYS)
    mask,  # (queries, keys) of one batch element, float32, or uint8 for a boolean one; or None
    i,
    j,
    queries,
    keys,
    stride_mask_query,  # 0 where it is the same for all
    stride_mask_key,
):
    """The score with the mask, and -inf beyond the keys."""
    inside = (j < keys)[None, :]
    if mask is not None:
        at = i.to(tl.int64)[:, None] * stride_mask_query + j.to(tl.int64)[None, :] * stride_mask_key
        given = tl.load(mask + at, mask=inside & (i < queries)[:, None], other=0)
        if mask.dtype.element_ty == tl.uint8:
            score = tl.where(given != 0, score, float("-inf"))
        else:
            score += given
    return tl.where(inside, score, float("-inf"))

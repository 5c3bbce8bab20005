"""Rotary position embedding of queries and keys, in one kernel for both and for both directions.

    halves:       y1 = x1 cos1 - x2 sin1,   y2 = x2 cos2 + x1 sin2        x1, x2: the halves of the rotary dimensions,
    interleaved:  the same                                               or x1: those of even, x2: those of odd number
    backward:     g1' = g1 cos1 + g2 sin2,  g2' = g2 cos2 - g1 sin1       the transposed matrix

A program takes a few positions of one batch element and HEADS heads of q, or of k, and goes through them one after the other with
the positions' angles in registers. What lies beyond the rotary dimensions it copies.

               BLOCK   BLOCK                       Must move: q and k in and out, and the angles once. About six operations for
    TOKENS   [  x1  |   x2  |  copied ]            a pair, so memory bounds it: the floor is the copy of q and k. Programs of the
                                                   same positions are neighbours in the grid, and find the angles in L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import along
from . import _launch
from ._launch import launch
from .chips import chip_of
from .configs import choose


@triton.jit
def _pair_tile(pointers, start, half, rows, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Two (rows, BLOCK) tiles in float32: pairs start … start + BLOCK - 1 of rows whose first element is at `pointers`."""
    if INTERLEAVED:
        both = start * 2 + tl.arange(0, 2 * BLOCK)
        tile = tl.load(pointers[:, None] + both, mask=rows[:, None] & (both < 2 * half), other=0.0)
        first, second = tl.split(tile.reshape((tile.shape[0], BLOCK, 2)))
    else:
        column = start + tl.arange(0, BLOCK)
        here = rows[:, None] & (column < half)
        first = tl.load(pointers[:, None] + column, mask=here, other=0.0)
        second = tl.load(pointers[:, None] + half + column, mask=here, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _turn_heads(
    x,  # (heads, seq, head_dim) of one batch element
    out,  # the same shape
    cos,  # (seq, rotary_dim) of the batch element
    sin,
    position,  # (TOKENS,) int64
    seq,
    first_head,
    heads,
    head_dim,
    half,
    stride_head,
    stride_token,
    stride_out_head,
    stride_out_token,
    stride_cos_token,
    stride_sin_token,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = position < seq
    source = x + position * stride_token
    target = out + position * stride_out_token
    end_head = tl.minimum(first_head + HEADS, heads)
    for start in range(0, half, BLOCK):
        cos_first, cos_second = _pair_tile(cos + position * stride_cos_token, start, half, rows, INTERLEAVED, BLOCK)
        sin_first, sin_second = _pair_tile(sin + position * stride_sin_token, start, half, rows, INTERLEAVED, BLOCK)
        for head in range(first_head, end_head):
            at = tl.cast(head, tl.int64)
            first, second = _pair_tile(source + at * stride_head, start, half, rows, INTERLEAVED, BLOCK)
            if INVERSE:
                turned_first = first * cos_first + second * sin_second
                turned_second = second * cos_second - first * sin_first
            else:
                turned_first = first * cos_first - second * sin_first
                turned_second = second * cos_second + first * sin_second
            turned_first = turned_first.to(out.dtype.element_ty)
            turned_second = turned_second.to(out.dtype.element_ty)
            to = (target + at * stride_out_head)[:, None]
            if INTERLEAVED:
                column = start * 2 + tl.arange(0, 2 * BLOCK)
                tile = tl.join(turned_first, turned_second).reshape((rows.shape[0], 2 * BLOCK))
                tl.store(to + column, tile, mask=rows[:, None] & (column < 2 * half))
            else:
                column = start + tl.arange(0, BLOCK)
                here = rows[:, None] & (column < half)
                tl.store(to + column, turned_first, mask=here)
                tl.store(to + half + column, turned_second, mask=here)

    for start in range(2 * half, head_dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        here = rows[:, None] & (column < head_dim)
        for head in range(first_head, end_head):
            at = tl.cast(head, tl.int64)
            tile = tl.load((source + at * stride_head)[:, None] + column, mask=here)
            tl.store((target + at * stride_out_head)[:, None] + column, tile, mask=here)


@triton.jit
def rotary_embedding(
    q,  # (batch, heads, seq, head_dim), unit stride along head_dim
    k,  # (batch, kv_heads, seq, head_dim), the same
    cos,  # (batch, seq, rotary_dim), unit stride along rotary_dim; a stride of 0 repeats the one for all
    sin,  # the same
    out_q,  # as q
    out_k,  # as k
    heads,
    kv_heads,
    seq,
    head_dim,
    half,  # rotary_dim / 2
    stride_q_batch,
    stride_q_head,
    stride_q_token,
    stride_k_batch,
    stride_k_head,
    stride_k_token,
    stride_cos_batch,
    stride_cos_token,
    stride_sin_batch,
    stride_sin_token,
    stride_out_q_batch,
    stride_out_q_head,
    stride_out_q_token,
    stride_out_k_batch,
    stride_out_k_head,
    stride_out_k_token,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,  # the backward's direction
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    q_blocks = tl.cdiv(heads, HEADS)
    blocks = q_blocks + tl.cdiv(kv_heads, HEADS)
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks
    tiles = tl.cdiv(seq, TOKENS)
    batch = (tile // tiles).to(tl.int64)
    position = (tile % tiles) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    cos += batch * stride_cos_batch
    sin += batch * stride_sin_batch
    if block < q_blocks:
        _turn_heads(
            q + batch * stride_q_batch,
            out_q + batch * stride_out_q_batch,
            cos,
            sin,
            position,
            seq,
            block * HEADS,
            heads,
            head_dim,
            half,
            stride_q_head,
            stride_q_token,
            stride_out_q_head,
            stride_out_q_token,
            stride_cos_token,
            stride_sin_token,
            INTERLEAVED,
            INVERSE,
            HEADS,
            BLOCK,
        )
    else:
        _turn_heads(
            k + batch * stride_k_batch,
            out_k + batch * stride_out_k_batch,
            cos,
            sin,
            position,
            seq,
            (block - q_blocks) * HEADS,
            kv_heads,
            head_dim,
            half,
            stride_k_head,
            stride_k_token,
            stride_out_k_head,
            stride_out_k_token,
            stride_cos_token,
            stride_sin_token,
            INTERLEAVED,
            INVERSE,
            HEADS,
            BLOCK,
        )


def unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    reason = _launch.unsupported(q, k) or _launch.unsupported(cos) or _launch.unsupported(sin)
    if reason is None and torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        reason = "it has no gradients for cos and sin; detach them if you need none"
    return reason


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    return _turn(q, k, cos, sin, interleaved, False)


def backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    return _turn(grad_q, grad_k, cos, sin, interleaved, True)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    batch, heads, seq, head_dim = q.shape
    kv_heads, half = k.shape[1], cos.shape[-1] // 2
    angles = [along(x).expand(batch, 1, -1, -1) for x in (cos, sin)]
    config = choose("rotary_embedding", chip_of(q.device), q.dtype, half)
    tiles = batch * triton.cdiv(seq, config.tiles["TOKENS"])
    blocks = sum(triton.cdiv(n, config.tiles["HEADS"]) for n in (heads, kv_heads))
    launch(
        rotary_embedding,
        (tiles * blocks,),
        q,
        k,
        *angles,
        out_q,
        out_k,
        heads,
        kv_heads,
        seq,
        head_dim,
        half,
        *q.stride()[:3],
        *k.stride()[:3],
        *(stride for x in angles for stride in (x.stride(0), x.stride(2))),
        *out_q.stride()[:3],
        *out_k.stride()[:3],
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        config=config,
    )
    return out_q, out_k

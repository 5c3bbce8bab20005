"""Additive attention, backward, as far as the gradients of the projections, of v, of the values and of the mask.

    t_ijh = tanh(a_ih + b_jh)                                        a, b: the projections that the forward kept
    y = grad_out . value^T,   g = dropout(y),   w = dropout(p)        p: the softmax of the scores, made again
    u_ij = p_ij (g_ij - sum over j of p g)                            the scores' gradient, and the mask's
    grad_a_ih = v_h sum over j of u_ij (1 - t_ijh^2)                  grad_b_jh: the same, over i
    grad_v_h  = sum over i, j of u_ij t_ijh,                          grad_value = w^T . grad_out

As many queries at a time as have _MOST_SCORES scores with all keys, so that a matrix of (queries, keys) exists for these alone:

    additive_scores           a tile of queries and keys a program: the scores                         every tanh once
    additive_weights          a row a program: from scores and y to u, in their place, and w
    additive_projection_grad  a few queries and hidden units a program, all keys go by: grad_a, and grad_v by program
                              the same with the roles of queries and keys exchanged: grad_b            every tanh twice

The products with value and grad_out are torch's. Three times the forward's tanhs bound it. Each sum is one program's, or is taken
of the programs' in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import additive_score, dropout
from ._launch import launch
from .additive_forward import ROWS, tile_rows
from .chips import chip_of
from .configs import choose
from .tanh import tanh

_MOST_SCORES = 1 << 24


@triton.jit
def additive_scores(
    a,  # (batch, queries, hidden) float32, some of a longer tensor's queries
    b,  # (batch, keys, hidden) float32
    v,  # (hidden,)
    mask,  # (batch, queries, keys) with strides of 0 where it is the same, float32 or uint8; or None
    score,  # (batch, queries, keys) float32
    queries,
    keys,
    hidden,
    stride_a_batch,
    stride_mask_batch,
    stride_mask_query,
    stride_mask_key,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HIDDEN: tl.constexpr,  # with ROWS queries; with fewer there are more
):
    query_blocks = tl.cdiv(queries, QUERIES)
    key_blocks = tl.cdiv(keys, KEYS)
    i = tl.program_id(0) % query_blocks * QUERIES + tl.arange(0, QUERIES)
    j = tl.program_id(0) // query_blocks % key_blocks * KEYS + tl.arange(0, KEYS)
    batch = (tl.program_id(0) // query_blocks // key_blocks).to(tl.int64)
    a += batch * stride_a_batch
    b += batch * keys * hidden
    if mask is not None:
        mask += batch * stride_mask_batch
    CHUNK: tl.constexpr = HIDDEN * (ROWS // QUERIES)
    found = additive_score.products(a, b, v, i, j, queries, keys, hidden, QUERIES, KEYS, CHUNK)
    found = additive_score.masked(found, mask, i, j, queries, keys, stride_mask_query, stride_mask_key)
    at = (batch * queries + i)[:, None] * keys + j
    tl.store(score + at, found, mask=(i < queries)[:, None] & (j < keys))


@triton.jit
def additive_weights(
    score,  # (batch, queries, keys) float32: in their place, the gradient u
    grad_weight,  # (batch, queries, keys) float32: y
    weight,  # (batch, queries, keys): w, or None
    seed,  # (1,) int64, or None without dropout
    queries,
    keys,
    first_batch,  # where these lie in the whole
    first_query,
    whole_queries,
    threshold,
    inverse,
    KEYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    score += row * keys
    grad_weight += row * keys
    if seed is not None:
        numbered = (first_batch + row // queries) * whole_queries + first_query + row % queries
        row_key = dropout.row_key(tl.load(seed), numbered)

    top = float("-inf")
    total = 0.0
    product = 0.0
    for start in range(0, keys, KEYS):
        j = start + tl.arange(0, KEYS)
        s = tl.load(score + j, mask=j < keys, other=float("-inf"))
        g = tl.load(grad_weight + j, mask=j < keys, other=0.0)
        if seed is not None:
            g = tl.where(dropout.keep(row_key, j, threshold), g * inverse, 0.0)
        before = top
        top = tl.maximum(top, tl.max(s, axis=0))
        base = tl.where(top == float("-inf"), 0.0, top)
        exponential = tl.exp(s - base)
        shrink = tl.exp(before - base)
        total = total * shrink + tl.sum(tl.where(s == float("-inf"), 0.0, exponential), axis=0)
        product = product * shrink + tl.sum(tl.where(s == float("-inf"), 0.0, exponential * g), axis=0)

    base = tl.where(top == float("-inf"), 0.0, top)
    scale = 1.0 / tl.where(total == 0.0, 1.0, total)
    mean = product * scale
    for start in range(0, keys, KEYS):
        j = start + tl.arange(0, KEYS)
        s = tl.load(score + j, mask=j < keys, other=float("-inf"))
        g = tl.load(grad_weight + j, mask=j < keys, other=0.0)
        p = tl.where(s == float("-inf"), 0.0, tl.exp(s - base) * scale)
        w = p
        if seed is not None:
            kept = dropout.keep(row_key, j, threshold)
            g = tl.where(kept, g * inverse, 0.0)
            w = tl.where(kept, p * inverse, 0.0)
        tl.store(score + j, tl.where(s == float("-inf"), 0.0, p * (g - mean)), mask=j < keys)
        if weight is not None:
            tl.store(weight + row * keys + j, w.to(weight.dtype.element_ty), mask=j < keys)


@triton.jit
def additive_projection_grad(
    own,  # (batch, owns, hidden) float32: a, whose gradient this is, or b
    other,  # (batch, others, hidden) float32: b, or a
    v,  # (hidden,)
    grad_score,  # (batch, owns, others) float32, any strides: u
    grad_own,  # (batch, owns, hidden) float32, added to
    partial_v,  # (batch, blocks of owns, hidden) float32, or None
    owns,
    others,
    hidden,
    stride_own_batch,  # of own and grad_own
    stride_other_batch,
    stride_grad_batch,
    stride_grad_own,
    stride_grad_other,
    OWNS: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OTHERS: tl.constexpr,  # at a time, with ROWS owns; with fewer there are more
    RUN: tl.constexpr,  # how many others are summed before they are added to the sum of all
):
    hidden_blocks = tl.cdiv(hidden, HIDDEN)
    blocks = tl.cdiv(owns, OWNS)
    block = tl.program_id(0) // hidden_blocks % blocks
    batch = (tl.program_id(0) // hidden_blocks // blocks).to(tl.int64)
    i = (block * OWNS + tl.arange(0, OWNS)).to(tl.int64)
    h = tl.program_id(0) % hidden_blocks * HIDDEN + tl.arange(0, HIDDEN)
    here = (i < owns)[:, None] & (h < hidden)
    at = batch * stride_own_batch + i[:, None] * hidden + h
    left = tl.load(own + at, mask=here, other=0.0)
    other += batch * stride_other_batch
    grad_score += batch * stride_grad_batch + i * stride_grad_own
    CHUNK: tl.constexpr = OTHERS * (ROWS // OWNS)

    through = tl.zeros((OWNS, HIDDEN), tl.float32)
    of_v = tl.zeros((OWNS, HIDDEN), tl.float32)
    for run in range(0, others, RUN):
        run_through = tl.zeros((OWNS, HIDDEN), tl.float32)
        run_of_v = tl.zeros((OWNS, HIDDEN), tl.float32)
        for start in range(run, tl.minimum(run + RUN, others), CHUNK):
            j = (start + tl.arange(0, CHUNK)).to(tl.int64)
            some = (j < others)[:, None]
            right = tl.load(other + j[:, None] * hidden + h, mask=some & (h < hidden), other=0.0)
            u = tl.load(
                grad_score[None, :] + j[:, None] * stride_grad_other, mask=some & (i < owns)[None, :], other=0.0
            )
            t = tanh(left[None, :, :] + right[:, None, :])
            run_through += tl.sum(u[:, :, None] * (1.0 - t * t), axis=0)
            if partial_v is not None:
                run_of_v += tl.sum(u[:, :, None] * t, axis=0)
        through += run_through
        of_v += run_of_v

    weight = tl.load(v + h, mask=h < hidden, other=0.0).to(tl.float32)
    tl.store(grad_own + at, tl.load(grad_own + at, mask=here, other=0.0) + through * weight, mask=here)
    if partial_v is not None:
        tl.store(partial_v + (batch * blocks + block) * hidden + h, tl.sum(of_v, axis=0), mask=h < hidden)


def backward(
    grad_out: Tensor,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    grad_value: Tensor | None,
    grad_mask: Tensor | None,
    through_query: bool,
    through_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills grad_value and grad_mask where they are there; grad_a and grad_v (through_query) and grad_b, in float32.

    The projections are (batch, queries or keys, hidden), float32, contiguous; the mask is as `additive_forward.spread` gives it.
    """
    batch, queries, hidden = a.shape
    keys = b.shape[1]
    grad_a, grad_b, grad_v = torch.zeros_like(a), torch.zeros_like(b), a.new_zeros(hidden)
    sums = None if grad_value is None else value.new_zeros(value.shape, dtype=torch.float32)
    if grad_mask is not None:
        grad_mask.zero_()
    at_once = max(_MOST_SCORES // max(queries * keys, 1), 1)
    some_queries = max(min(queries, _MOST_SCORES // max(keys, 1)), 1)
    for first_batch in range(0, batch, at_once):
        for first in range(0, queries, some_queries):
            of_batch = slice(first_batch, first_batch + at_once)
            part = (of_batch, slice(first, first + some_queries))
            grad, projected = grad_out[part], a[part]
            u = _scores(projected, b[of_batch], v, None if mask is None else mask[part])
            w = _weigh(u, grad, value[of_batch], seed, dropout_p, first_batch, first, queries, grad_value is not None)
            if sums is not None and w is not None:
                sums[of_batch] += torch.bmm(w.mT, grad)
            if grad_mask is not None:
                _add_mask_gradient(grad_mask, u, *part)
            if through_query:
                _project(projected, b[of_batch], v, u, grad_a[part], grad_v)
            if through_key:
                _project(b[of_batch], projected, v, u.mT, grad_b[of_batch], None)
    if grad_value is not None and sums is not None:
        grad_value.copy_(sums)
    return grad_a, grad_b, grad_v


def _scores(a: Tensor, b: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    batch, queries, hidden = a.shape
    keys = b.shape[1]
    score = a.new_empty((batch, queries, keys))
    config = choose("additive_scores", chip_of(a.device), a.dtype, hidden)
    rows = tile_rows(queries)
    launch(
        additive_scores,
        (batch * triton.cdiv(queries, rows) * triton.cdiv(keys, config.tiles["KEYS"]),),
        a,
        b,
        v,
        mask,
        score,
        queries,
        keys,
        hidden,
        a.stride(0),
        *((0, 0, 0) if mask is None else mask.stride()),
        QUERIES=rows,
        ROWS=ROWS,
        config=config,
    )
    return score


def _weigh(
    score: Tensor,
    grad_out: Tensor,
    value: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    first_batch: int,
    first_query: int,
    whole_queries: int,
    wanted: bool,
) -> Tensor | None:
    """The weights, where they are wanted; the scores become their gradients."""
    batch, queries, keys = score.shape
    grad_weight = torch.bmm(grad_out.float(), value.float().mT)  # few flops beside the tanhs', and nothing is rounded
    weight = torch.empty_like(grad_weight, dtype=value.dtype) if wanted else None
    launch(
        additive_weights,
        (batch * queries if keys else 0,),
        score,
        grad_weight,
        weight,
        seed,
        queries,
        keys,
        first_batch,
        first_query,
        whole_queries,
        dropout.threshold(dropout_p),
        dropout.inverse(dropout_p),
        config=choose("additive_weights", chip_of(score.device), score.dtype, keys),
    )
    return weight


def _add_mask_gradient(grad_mask: Tensor, grad_score: Tensor, of_batch: slice, of_queries: slice) -> None:
    every = slice(None)
    target = grad_mask[every if grad_mask.shape[0] == 1 else of_batch, every if grad_mask.shape[1] == 1 else of_queries]
    if grad_mask.shape[2] == 1:
        # It shifts all scores of a row alike, which changes nothing: NaN or else zero.
        grad_score = grad_score.sum(2, keepdim=True)
        grad_score = grad_score - grad_score
    target += grad_score.sum_to_size(target.shape)


def _project(
    own: Tensor, other: Tensor, v: Tensor, grad_score: Tensor, grad_own: Tensor, grad_v: Tensor | None
) -> None:
    """Adds to grad_own, and to grad_v where it is there."""
    batch, owns, hidden = own.shape
    others = other.shape[1]
    config = choose("additive_projection_grad", chip_of(own.device), own.dtype, hidden)
    rows = tile_rows(owns)
    blocks = batch * triton.cdiv(owns, rows)
    partial = None if grad_v is None else own.new_empty((blocks, hidden))
    launch(
        additive_projection_grad,
        (blocks * triton.cdiv(hidden, config.tiles["HIDDEN"]),),
        own,
        other,
        v,
        grad_score,
        grad_own,
        partial,
        owns,
        others,
        hidden,
        own.stride(0),
        other.stride(0),
        *(grad_score.stride(0), grad_score.stride(1), grad_score.stride(2)),
        OWNS=rows,
        ROWS=ROWS,
        config=config,
    )
    if grad_v is not None and partial is not None:
        grad_v += partial.sum(0)

"""Additive attention (Bahdanau, Cho and Bengio, 2015), forward, from the projected queries and keys.

    out_i = sum over j of dropout(p_ij) value_j,   p = softmax(s)            s: additive_score.py

A program has a few queries of one batch element and goes through the keys, or through a part of them (key_parts.py) where queries
are too few to fill the chip, with the softmax's running maximum and sum:

                     KEYS                   The tanhs, queries keys hidden of them, bound it; the weights and values are a
    QUERIES   +------+------+--             product on the matrix units. A single query, a decoder's, has a tile of one row,
              |  ->  |  ->  |  …            which is repeated for that product alone. Must move: all tensors once; the
              +------+------+--             projected keys and the values come from L2 for each block of queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import additive_score, dropout, key_parts
from ._launch import launch, precision
from .chips import chip_of
from .configs import choose

ROWS = 16  # of a matrix product
_MOST_COLUMNS = 1024


def tile_rows(count: int) -> int:
    """How many of so many rows go in a tile."""
    return 1 if count == 1 else 4 if count <= 4 else ROWS


@triton.jit
def _repeated(x, QUERIES: tl.constexpr, ROWS: tl.constexpr):
    """A number for each query as one for each of ROWS rows: row r is query r % QUERIES."""
    return tl.broadcast_to(x[None, :], (ROWS // QUERIES, QUERIES)).reshape((ROWS,))


@triton.jit
def additive_forward(
    a,  # (batch, queries, hidden)
    b,  # (batch, keys, hidden)
    v,  # (hidden,)
    value,  # (batch, keys, value_dim)
    mask,  # (batch, queries, keys) with strides of 0 where it is the same, float32 or uint8; or None
    seed,  # (1,) int64, or None without dropout
    out,  # (batch, queries, value_dim), or float32 (parts, batch, queries, value_dim)
    lse,  # float32 (parts, batch, queries), or None where the keys are in one part
    batches,
    queries,
    keys,
    hidden,
    value_dim,
    parts,
    threshold,
    inverse,
    stride_value_batch,
    stride_value_key,
    stride_value_dim,
    stride_mask_batch,
    stride_mask_query,
    stride_mask_key,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    HIDDEN: tl.constexpr,  # with ROWS queries; with fewer there are more
):
    blocks = tl.cdiv(queries, QUERIES)
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks % parts
    columns = tl.cdiv(value_dim, VALUE_DIM)
    column = (tl.program_id(0) // blocks // parts % columns) * VALUE_DIM + tl.arange(0, VALUE_DIM)
    batch = (tl.program_id(0) // blocks // parts // columns).to(tl.int64)
    i = block * QUERIES + tl.arange(0, QUERIES)
    in_part = tl.cdiv(tl.cdiv(keys, KEYS), parts) * KEYS
    begin = part * in_part
    end = tl.minimum(begin + in_part, keys)
    a += batch * queries * hidden
    b += batch * keys * hidden
    value += batch * stride_value_batch
    if mask is not None:
        mask += batch * stride_mask_batch
    if seed is not None:
        row_key = dropout.row_key(tl.load(seed), batch * queries + i)
        left = tl.zeros((QUERIES,), tl.int32)  # how many keys dropout leaves: where none, NaN is dropped as well

    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((ROWS, VALUE_DIM), tl.float32)
    for start in range(begin, end, KEYS):
        j = start + tl.arange(0, KEYS)
        CHUNK: tl.constexpr = HIDDEN * (ROWS // QUERIES)
        score = additive_score.products(a, b, v, i, j, queries, keys, hidden, QUERIES, KEYS, CHUNK)
        score = additive_score.masked(score, mask, i, j, queries, keys, stride_mask_query, stride_mask_key)

        before = top
        top = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(top == float("-inf"), 0.0, top)
        # A key at -inf has no weight, even in a row that holds NaN.
        weight = tl.where(score == float("-inf"), 0.0, tl.exp(score - base[:, None]))
        shrink = tl.exp(before - base)
        total = total * shrink + tl.sum(weight, axis=1)
        if seed is not None:
            kept = dropout.keep(row_key[:, None], j[None, :], threshold)
            left += tl.sum((kept & (score != float("-inf"))).to(tl.int32), axis=1)
            weight = tl.where(kept, weight * inverse, 0.0)
        values = tl.load(
            value + j.to(tl.int64)[:, None] * stride_value_key + column * stride_value_dim,
            mask=(j < keys)[:, None] & (column < value_dim),
            other=0.0,
        )
        rows = tl.broadcast_to(weight.to(values.dtype)[None, :, :], (ROWS // QUERIES, QUERIES, KEYS))
        weighted *= _repeated(shrink, QUERIES, ROWS)[:, None]
        weighted = tl.dot(rows.reshape((ROWS, KEYS)), values, weighted, input_precision=PRECISION)

    none = total == 0.0
    total = tl.where(none, 1.0, total)
    weighted /= _repeated(total, QUERIES, ROWS)[:, None]
    if seed is not None:
        weighted = tl.where(_repeated(left, QUERIES, ROWS)[:, None] > 0, weighted, 0.0)
    row = batch * queries + i
    if lse is not None:
        row += part.to(tl.int64) * batches * queries
        whole = tl.where(none, float("-inf"), top + tl.log(total))
        tl.store(lse + row, whole, mask=i < queries)
    r = tl.arange(0, ROWS)
    here = ((r < QUERIES) & (block * QUERIES + r < queries))[:, None] & (column < value_dim)
    at = _repeated(row, QUERIES, ROWS)[:, None] * value_dim + column
    tl.store(out + at, weighted.to(out.dtype.element_ty), mask=here)


def forward(
    a: Tensor,
    b: Tensor,
    v: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """out, from the projections (batch, queries or keys, hidden), contiguous; the mask as `spread` gives it."""
    batch, queries, hidden = a.shape
    keys, value_dim = value.shape[1:]
    out = value.new_empty((batch, queries, value_dim))
    config = choose("additive_forward", chip_of(value.device), value.dtype, value_dim)
    tile_columns = min(max(triton.next_power_of_2(value_dim), 16), _MOST_COLUMNS)
    programs = batch * triton.cdiv(queries, tile_rows(queries)) * triton.cdiv(value_dim, tile_columns)
    parts = key_parts.count(programs, keys, config.tiles["KEYS"], value.device)
    found, lse = out, None
    if parts > 1:
        found = value.new_empty((parts, batch * queries, value_dim), dtype=torch.float32)
        lse = found.new_empty((parts, batch * queries))
    launch(
        additive_forward,
        (programs * parts,),
        a,
        b,
        v,
        value,
        mask,
        seed,
        found,
        lse,
        batch,
        queries,
        keys,
        hidden,
        value_dim,
        parts,
        dropout.threshold(dropout_p),
        dropout.inverse(dropout_p),
        *value.stride(),
        *((0, 0, 0) if mask is None else mask.stride()),
        PRECISION=precision(value.dtype),
        QUERIES=tile_rows(queries),
        ROWS=ROWS,
        VALUE_DIM=tile_columns,
        config=config,
    )
    if lse is not None:
        key_parts.combine(found, lse, out, None, queries, 1)
    return out


def spread(mask: Tensor | None, batch: int, queries: int, keys: int) -> Tensor | None:
    """The mask as the kernels take it: of full size, with strides of 0 where it is the same, and bytes for booleans."""
    if mask is None:
        return None
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).expand(batch, queries, keys)

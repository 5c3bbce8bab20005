"""Attention of a few new queries to a key-value cache, contiguous or paged, with the new keys and values appended first.

    s = scale * query . key;   s = softcap * tanh(s / softcap);   s -= slope * |i + diagonal - j|;   -inf outside the window
    out = softmax(s) . value,   lse = logsumexp(s),   diagonal = keys - queries of each sequence

append_to_cache writes k and v behind each sequence's keys. Then a program of attend_to_cache has one sequence, one key head and
a part of the keys that its queries see: the queries of all heads that share the key head are the rows of one tile. Given angles,
the one turns k and the other the queries as they are loaded (rotary.py).

                   KEYS                     Must move: the keys and values of each sequence once. The 4 dim flops for each
    ROWS  +------+------+--                 key and query are no bound until a key head has some hundred of rows (query,
          |  ->  |  ->  |  …  part          head), so tiles need few rows, and what counts is that all multiprocessors read:
          +------+------+--                 where sequences and key heads are too few, the keys go in parts (key_parts.py).

The lengths stay on the device. The number of parts follows from the cache's capacity, and each sequence's own keys, those its
window admits, are shared out evenly between them. Lengths beyond the capacity are cut.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..attention_outputs import attention_outputs
from ..tensors import along, cache_capacity
from . import _launch, key_parts
from ._launch import launch
from .chips import chip_of
from .configs import choose
from .rotary import load_turned
from .tanh import tanh

MOST_BYTES = 2048  # of a key or a value


@triton.jit
def _cache_rows(position, block_table, block_size, stride_block, stride_token, inside):
    """Where each position's row is, counted from the first row of block 0; block_table is the sequence's own, or None."""
    if block_table is None:
        rows = position.to(tl.int64) * stride_token
    else:
        block = tl.load(block_table + position // block_size, mask=inside, other=0).to(tl.int64)
        rows = block * stride_block + (position % block_size).to(tl.int64) * stride_token
    return rows


@triton.jit
def append_to_cache(
    k,  # (batch, kv_heads, new, head_dim)
    v,  # (batch, kv_heads, new, value_dim)
    k_cache,  # (batch, kv_heads, capacity, head_dim), or paged (blocks, kv_heads, block_size, head_dim)
    v_cache,  # the same of value_dim
    cache_seqlens,  # (batch,) int32
    block_table,  # (batch, blocks_per_sequence) int32, or None
    cos,  # (batch, new, 2 * half), unit stride along the last; a stride of 0 repeats one for all. Or None
    sin,  # the same
    batches,
    kv_heads,
    new,
    head_dim,
    value_dim,
    half,
    capacity,
    block_size,
    stride_k_batch,
    stride_k_head,
    stride_k_token,
    stride_k_dim,
    stride_v_batch,
    stride_v_head,
    stride_v_token,
    stride_v_dim,
    stride_k_cache_block,
    stride_k_cache_head,
    stride_k_cache_token,
    stride_k_cache_dim,
    stride_v_cache_block,
    stride_v_cache_head,
    stride_v_cache_token,
    stride_v_cache_dim,
    stride_table_batch,
    stride_cos_batch,
    stride_cos_token,
    stride_sin_batch,
    stride_sin_token,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(new, TOKENS)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    position = tl.load(cache_seqlens + batch) + token
    rows = (token < new) & (position >= 0) & (position < capacity)
    k += batch * stride_k_batch + head * stride_k_head
    v += batch * stride_v_batch + head * stride_v_head
    k_cache += head * stride_k_cache_head
    v_cache += head * stride_v_cache_head
    if block_table is not None:
        block_table += batch * stride_table_batch
    else:
        k_cache += batch * stride_k_cache_block
        v_cache += batch * stride_v_cache_block
    from_k = k + token.to(tl.int64) * stride_k_token
    from_v = v + token.to(tl.int64) * stride_v_token
    to_k = k_cache + _cache_rows(position, block_table, block_size, stride_k_cache_block, stride_k_cache_token, rows)
    to_v = v_cache + _cache_rows(position, block_table, block_size, stride_v_cache_block, stride_v_cache_token, rows)
    if cos is not None:
        cos += batch * stride_cos_batch + token.to(tl.int64) * stride_cos_token
        sin += batch * stride_sin_batch + token.to(tl.int64) * stride_sin_token
    for start in range(0, head_dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        here = rows[:, None] & (column < head_dim)
        if cos is None:
            values = tl.load(from_k[:, None] + column * stride_k_dim, mask=here)
        else:
            values = load_turned(from_k, column, stride_k_dim, head_dim, cos, sin, half, rows, INTERLEAVED)
            values = values.to(k_cache.dtype.element_ty)
        tl.store(to_k[:, None] + column * stride_k_cache_dim, values, mask=here)
    for start in range(0, value_dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        here = rows[:, None] & (column < value_dim)
        values = tl.load(from_v[:, None] + column * stride_v_dim, mask=here)
        tl.store(to_v[:, None] + column * stride_v_cache_dim, values, mask=here)


@triton.jit
def attend_to_cache(
    query,  # (batch, heads, queries, head_dim), unit stride along head_dim
    k_cache,  # (batch, kv_heads, capacity, head_dim), or paged (blocks, kv_heads, block_size, head_dim)
    v_cache,  # the same of value_dim
    cache_seqlens,  # (batch,) int32: without the new keys
    block_table,  # (batch, blocks_per_sequence) int32, or None
    slopes,  # (batch, heads) float32, with a stride of 0 where they are the same for all sequences, or None
    cos,  # (batch, queries, 2 * half), as append_to_cache has it, or None
    sin,
    out,  # (batch, queries, heads, value_dim), or float32 (parts, batch, queries, heads, value_dim)
    lse,  # (batch, heads, queries) float32, or (parts, batch, queries, heads)
    batches,
    heads,
    kv_heads,
    queries,
    new,
    head_dim,
    value_dim,
    half,
    capacity,
    block_size,
    parts,
    scale,
    softcap,
    window_left,  # -1: no limit
    window_right,
    stride_query_batch,
    stride_query_head,
    stride_query_token,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_k_dim,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    stride_v_dim,
    stride_table_batch,
    stride_slopes_batch,
    stride_cos_batch,
    stride_cos_token,
    stride_sin_batch,
    stride_sin_token,
    INTERLEAVED: tl.constexpr,
    CAPPED: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether out and lse are of parts
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,  # head_dim and value_dim, rounded up to powers of two
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    # Row blocks that read the same keys are neighbours.
    group = heads // kv_heads
    row_blocks = tl.cdiv(group * queries, ROWS)
    row_block = tl.program_id(0) % row_blocks
    part = tl.program_id(0) // row_blocks % parts
    kv_head = tl.program_id(0) // row_blocks // parts % kv_heads
    batch = (tl.program_id(0) // row_blocks // parts // kv_heads).to(tl.int64)

    row = row_block * ROWS + tl.arange(0, ROWS)
    i = row // group  # a tile has all heads of a query, so that its rows see about the same keys
    head = kv_head * group + row % group
    exists = row < group * queries

    length = tl.minimum(tl.maximum(tl.load(cache_seqlens + batch) + new, 0), capacity)
    diagonal = length - queries
    first = tl.zeros((ROWS,), tl.int32)
    last = tl.zeros((ROWS,), tl.int32) + length  # exclusive
    low = 0
    high = length
    if window_left >= 0:
        first = i + diagonal - window_left
        low = tl.maximum(row_block * ROWS // group + diagonal - window_left, 0)
    if window_right >= 0:
        last = tl.minimum(i + diagonal + window_right + 1, length)
        last_query = tl.minimum((row_block * ROWS + ROWS - 1) // group, queries - 1)
        high = tl.minimum(last_query + diagonal + window_right + 1, length)
    low = tl.minimum(low, tl.maximum(high, 0))
    in_part = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), KEYS), parts) * KEYS
    begin = low + part * in_part
    end = tl.minimum(begin + in_part, high)

    dim = tl.arange(0, HEAD_DIM)
    value_column = tl.arange(0, VALUE_DIM)
    of_row = batch * stride_query_batch + head.to(tl.int64) * stride_query_head + i.to(tl.int64) * stride_query_token
    if cos is None:
        q = tl.load(query + of_row[:, None] + dim, mask=exists[:, None] & (dim < head_dim), other=0.0)
    else:
        cos += batch * stride_cos_batch + i.to(tl.int64) * stride_cos_token
        sin += batch * stride_sin_batch + i.to(tl.int64) * stride_sin_token
        q = load_turned(query + of_row, dim, 1, head_dim, cos, sin, half, exists, INTERLEAVED)
        q = q.to(query.dtype.element_ty)
    if slopes is not None:
        slope = tl.load(slopes + batch * stride_slopes_batch + head, mask=exists, other=0.0)
    k_cache += kv_head.to(tl.int64) * stride_k_head
    v_cache += kv_head.to(tl.int64) * stride_v_head
    if block_table is not None:
        block_table += batch * stride_table_batch
    else:
        k_cache += batch * stride_k_block
        v_cache += batch * stride_v_block

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, VALUE_DIM), tl.float32)
    for start in range(begin, end, KEYS):
        j = start + tl.arange(0, KEYS)
        inside = j < end
        k_rows = _cache_rows(j, block_table, block_size, stride_k_block, stride_k_token, inside)
        keys = tl.load(
            k_cache + k_rows[:, None] + dim * stride_k_dim, mask=inside[:, None] & (dim < head_dim), other=0.0
        )
        score = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        if CAPPED:
            score = softcap * tanh(score / softcap)
        if slopes is not None:
            score -= slope[:, None] * tl.abs((i + diagonal)[:, None] - j).to(tl.float32)
        sees = (j >= first[:, None]) & (j < last[:, None])
        score = tl.where(sees, score, float("-inf"))

        before = top
        top = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(top == float("-inf"), 0.0, top)
        # A key at -inf has no weight, even in a row that holds NaN.
        weight = tl.where(score == float("-inf"), 0.0, tl.exp(score - base[:, None]))
        shrink = tl.exp(before - base)
        total = total * shrink + tl.sum(weight, axis=1)
        v_rows = _cache_rows(j, block_table, block_size, stride_v_block, stride_v_token, inside)
        values = tl.load(
            v_cache + v_rows[:, None] + value_column * stride_v_dim,
            mask=inside[:, None] & (value_column < value_dim),
            other=0.0,
        )
        weighted *= shrink[:, None]
        weighted = tl.dot(weight.to(values.dtype), values, weighted, input_precision=PRECISION)

    none = total == 0.0
    total = tl.where(none, 1.0, total)
    weighted /= total[:, None]
    whole = tl.where(none, float("-inf"), top + tl.log(total))
    out_row = (batch * queries + i) * heads + head
    here = exists[:, None] & (value_column < value_dim)
    if PARTIAL:
        out_row += part.to(tl.int64) * batches * queries * heads
        tl.store(lse + out_row, whole, mask=exists)
        here &= begin < end
    else:
        tl.store(lse + (batch * heads + head) * queries + i, whole, mask=exists)
    tl.store(out + out_row[:, None] * value_dim + value_column, weighted.to(out.dtype.element_ty), mask=here)


def unsupported(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
) -> str | None:
    """Why the kernel cannot take this call; None if it can."""
    reason = _launch.unsupported(query, k_cache, v_cache, k, v)
    if reason is None and cos is not None and sin is not None:
        reason = _launch.unsupported(cos) or _launch.unsupported(sin)
    widest, most = max(query.shape[3], v_cache.shape[3]), MOST_BYTES // query.dtype.itemsize
    if reason is None and widest > most:
        reason = f"it keeps rows in registers, head_dim and value_dim at most {most} in this dtype, and one is {widest}"
    return reason


def forward(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in docs/architecture.md, "Normalised arguments"."""
    cache_seqlens = cache_seqlens.contiguous()
    block_table = None if block_table is None else along(block_table)
    if cos is not None and sin is not None:
        cos, sin = (along(x).expand(query.shape[0], 1, -1, -1) for x in (cos, sin))
    if k is not None and v is not None:
        _append(k, v, k_cache, v_cache, cache_seqlens, block_table, cos, sin, interleaved)
    return _attend(
        query,
        k_cache,
        v_cache,
        0 if k is None else k.shape[2],
        cache_seqlens,
        block_table,
        alibi_slopes,
        cos,
        sin,
        scale,
        window_left,
        window_right,
        softcap,
        interleaved,
    )


def _angles(cos: Tensor | None, sin: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Half of rotary_dim, and the strides that the kernels take."""
    if cos is None or sin is None:
        return 0, (0, 0, 0, 0)
    return cos.shape[-1] // 2, tuple(stride for x in (cos, sin) for stride in (x.stride(0), x.stride(2)))


def _append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    batch, kv_heads, new, head_dim = k.shape
    value_dim = v.shape[3]
    half, angle_strides = _angles(cos, sin)
    config = choose("append_to_cache", chip_of(k.device), k.dtype, max(head_dim, value_dim))
    launch(
        append_to_cache,
        (batch * kv_heads * triton.cdiv(new, config.tiles["TOKENS"]),),
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        cos,
        sin,
        batch,
        kv_heads,
        new,
        head_dim,
        value_dim,
        half,
        cache_capacity(k_cache, block_table),
        k_cache.shape[2],
        *k.stride(),
        *v.stride(),
        *k_cache.stride(),
        *v_cache.stride(),
        0 if block_table is None else block_table.stride(0),
        *angle_strides,
        INTERLEAVED=interleaved,
        config=config,
    )


def _attend(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    new: int,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    query = along(query)
    out, lse = attention_outputs(query, v_cache)
    batch, heads, queries, head_dim = query.shape
    kv_heads, value_dim = k_cache.shape[1], v_cache.shape[3]
    capacity = cache_capacity(k_cache, block_table)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous().expand(batch, heads)
    half, angle_strides = _angles(cos, sin)
    width = max(head_dim, value_dim)
    config = choose("attend_to_cache", chip_of(query.device), query.dtype, width)
    rows = heads // kv_heads * queries
    # What a row keeps in registers grows with its width, and products of float32 keep more.
    most_rows = (8192 if query.dtype.itemsize == 2 else 2048) // triton.next_power_of_2(width)
    if interleaved and cos is not None:
        most_rows //= 2  # partners that are neighbours are loaded one by one, each by an address of its own
    tile_rows = min(max(triton.next_power_of_2(rows), 16), max(most_rows, 16), 64)
    programs = batch * kv_heads * triton.cdiv(rows, tile_rows)
    parts = key_parts.count(programs, capacity, config.tiles["KEYS"], query.device)
    found, found_lse = out, lse
    if parts > 1:
        found = lse.new_empty((parts, batch * queries * heads, value_dim))
        found_lse = lse.new_empty((parts, batch * queries * heads))
    launch(
        attend_to_cache,
        (programs * parts,),
        query,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        alibi_slopes,
        cos,
        sin,
        found,
        found_lse,
        batch,
        heads,
        kv_heads,
        queries,
        new,
        head_dim,
        value_dim,
        half,
        capacity,
        k_cache.shape[2],
        parts,
        scale,
        softcap,
        min(window_left, capacity + queries),
        min(window_right, capacity + queries),
        *query.stride()[:3],
        *k_cache.stride(),
        *v_cache.stride(),
        0 if block_table is None else block_table.stride(0),
        0 if alibi_slopes is None else alibi_slopes.stride(0),
        *angle_strides,
        INTERLEAVED=interleaved,
        CAPPED=softcap > 0.0,
        PARTIAL=parts > 1,
        PRECISION=_launch.precision(query.dtype),
        ROWS=tile_rows,
        HEAD_DIM=max(triton.next_power_of_2(head_dim), 16),
        VALUE_DIM=max(triton.next_power_of_2(value_dim), 16),
        config=config,
    )
    if parts > 1:
        key_parts.combine(found, found_lse, out, lse, queries, heads)
    return out, lse

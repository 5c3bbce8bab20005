"""Cases for the tests of the three forms of attention, drawn by hypothesis."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from isas import draw_dtype
from norm_cases import DTYPES, LAYOUTS, strided
from torch import Tensor

# One, the tiles' edges (12, 32, 64), the blocks' (96 queries, 128 or 256 keys), and what lies between.
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from((2, 13, 0, 64, 95, 96, 97, 127, 128, 129, 200, 257, 300)))
# Remainders of the vectors and tiles; the head_dims of real models.
HEAD_DIMS = st.one_of(st.integers(1, 40), st.sampled_from((64, 72, 80, 96, 128, 256)))
CONTIGUOUS = st.just(False)
QUERIES = st.integers(0, 9)
MOST_SCORES = 120_000  # keeps a case below a tenth of a second


@dataclass
class AttentionCase:
    """Arguments of one call, ready for verify.check: `check(op, *case.tensors, **case.options)`."""

    tensors: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Draw:
    """Draws the parts of a case from one generator and one dtype."""

    draw: st.DrawFn
    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return strided(values.to(self.dtype), self.draw(LAYOUTS)).requires_grad_()

    def mask(self, batch: int, heads: int, q: int, k: int) -> Tensor | None:
        """None, padding, or bool or floating, each dimension full or 1, sometimes with whole rows off."""
        kind = self.draw(st.sampled_from(("none", "none", "bool", "float32", "own", "padding")))
        if kind == "none":
            return None
        if kind == "padding":
            return self.padding(batch, heads, q, k)
        shape = tuple(n if self.draw(st.booleans()) else 1 for n in (batch, heads, q, k))
        off = torch.rand(shape, generator=self.generator) < self.draw(st.sampled_from((0.0, 0.3, 0.95)))
        if self.draw(st.booleans()):
            off[..., : self.draw(st.integers(0, shape[2])), :] = True
        if kind == "bool":
            return ~off
        dtype = torch.float32 if kind == "float32" else self.dtype
        values = torch.randn(shape, generator=self.generator).masked_fill(off, -torch.inf)
        return values.to(dtype).requires_grad_(self.draw(st.booleans()))

    def padding(self, batch: int, heads: int, q: int, k: int) -> Tensor:
        """One stretch of keys for each sequence (or for all), as it is, expanded, or written out for each query."""
        batch = batch if self.draw(st.booleans()) else 1
        on = torch.zeros(batch, 1, 1, k, dtype=torch.bool)
        for row in on:
            first = self.draw(st.sampled_from((0, 0, 1, k // 3)))
            row[..., first : self.draw(st.integers(0, k))] = True
        form = self.draw(st.sampled_from(("own", "expanded", "written out")))
        if form == "expanded":
            on = on.expand(batch, heads, q, k)
        elif form == "written out":
            on = on.expand(batch, 1, q, k).contiguous()
        kind = self.draw(st.sampled_from((torch.bool, torch.float32, self.dtype)))
        return on if kind == torch.bool else torch.zeros((), dtype=kind).masked_fill(~on, -torch.inf)

    def options(self, batch: int, heads: int, causal: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"return_lse": True}
        if self.draw(st.booleans()):
            options["scale"] = self.draw(st.sampled_from((1.0, 0.05, 0.0, -0.3)))
        if self.draw(st.integers(0, 3)) == 0:
            options["softcap"] = self.draw(st.sampled_from((0.5, 20.0)))
        if causal:
            return options
        if self.draw(st.integers(0, 2)) == 0:
            side = st.one_of(st.none(), st.integers(0, 150))
            options["window"] = (self.draw(side), self.draw(side))
        if self.draw(st.integers(0, 3)) == 0:
            shape = (batch, heads) if self.draw(st.booleans()) else (heads,)
            options["alibi_slopes"] = torch.rand(shape, generator=self.generator)
        return options

    def angles(self, batch: int, seq: int, head_dim: int) -> dict[str, Any]:
        """Rotary angles for seq tokens, of all of a head's features or of some; they need not stand twice."""
        half = self.draw(st.one_of(st.just(head_dim // 2), st.integers(0, head_dim // 2)))
        leading = self.draw(st.sampled_from(((), (1,), (batch,), (1, 1), (batch, 1))))
        dtype = self.draw(st.sampled_from((torch.float32, self.dtype)))

        def one() -> Tensor:
            values = torch.randn(*leading, seq, 2 * half, generator=self.generator)
            return strided(values.to(dtype), self.draw(LAYOUTS))

        return {"cos": one(), "sin": one(), "interleaved": self.draw(st.booleans())}

    def dropout_p(self) -> float:
        return self.draw(st.sampled_from((0.0, 0.1, 0.0, 0.6, 0.0, 1.0)))


def _drawing(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES) -> _Draw:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return _Draw(draw, generator, draw_dtype(draw, dtypes))


def _heads(draw: st.DrawFn) -> tuple[int, int]:
    kv_heads = draw(st.integers(1, 3))
    return kv_heads * draw(st.sampled_from((1, 1, 2, 3))), kv_heads


@st.composite
def attention_cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = DTYPES,
    lengths: st.SearchStrategy[int] = LENGTHS,
    head_dims: st.SearchStrategy[int] = HEAD_DIMS,
    most_scores: int = MOST_SCORES,
) -> AttentionCase:
    """For `fastattn.attention`."""
    d = _drawing(draw, dtypes)
    heads, kv_heads = _heads(draw)
    q, k, head_dim, value_dim = draw(lengths), draw(lengths), draw(head_dims), draw(head_dims)
    fits = max(1, most_scores // max(heads * q * k, 1))
    batch = min(fits, draw(st.sampled_from((2, 1, 3, 0))))
    causal = draw(st.integers(0, 3)) == 0
    magnitude = draw(st.sampled_from((1.0, 1.0, 6.0)))
    query = d.normal(batch, heads, q, head_dim, scale=magnitude)
    key = d.normal(batch, kv_heads, k, head_dim)
    value = d.normal(batch, kv_heads, k, value_dim)
    options = d.options(batch, heads, causal)
    options |= {"attn_mask": d.mask(batch, heads, q, k), "dropout_p": d.dropout_p(), "is_causal": causal}
    return AttentionCase((query, key, value), options | {"enable_gqa": True})


@st.composite
def varlen_cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = DTYPES,
    lengths: st.SearchStrategy[int] = LENGTHS,
    head_dims: st.SearchStrategy[int] = HEAD_DIMS,
    most_sequences: int = 5,
) -> AttentionCase:
    """For `fastattn.attention_varlen`; sequences may be empty."""
    d = _drawing(draw, dtypes)
    heads, kv_heads = _heads(draw)
    pairs = draw(st.lists(st.tuples(lengths, lengths), max_size=most_sequences))
    q_lens, k_lens = [q for q, _ in pairs], [k for _, k in pairs]
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).to(torch.int32) for lens in (q_lens, k_lens))
    max_q, max_k = max(q_lens, default=0), max(k_lens, default=0) + draw(st.integers(0, 2))
    head_dim, value_dim = draw(head_dims), draw(head_dims)
    query = d.normal(sum(q_lens), heads, head_dim)
    key, value = d.normal(sum(k_lens), kv_heads, head_dim), d.normal(sum(k_lens), kv_heads, value_dim)
    causal = draw(st.booleans())
    options = d.options(len(pairs), heads, causal)
    options |= {"attn_mask": d.mask(len(pairs), heads, max_q, max_k), "dropout_p": d.dropout_p()}
    return AttentionCase((query, key, value, cu_q, cu_k, max_q, max_k), options | {"is_causal": causal})


@st.composite
def kvcache_cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = DTYPES,
    lengths: st.SearchStrategy[int] = LENGTHS,
    head_dims: st.SearchStrategy[int] = HEAD_DIMS,
    paged: st.SearchStrategy[bool] = CONTIGUOUS,
    queries: st.SearchStrategy[int] = QUERIES,
) -> AttentionCase:
    """For `fastattn.attention_with_kvcache`: the caches hold NaN beyond their keys. No gradients: it has none."""
    d = _drawing(draw, dtypes)
    heads, kv_heads = _heads(draw)
    batch, q, turned = draw(st.integers(0, 3)), draw(queries), draw(st.booleans())
    new = q if turned else draw(st.integers(0, 9))
    seqlens = torch.tensor([draw(lengths) for _ in range(batch)], dtype=torch.int32)
    capacity = int(seqlens.max() if batch else 0) + new + draw(st.integers(0, 3))
    head_dim, value_dim = draw(head_dims), draw(head_dims)
    caches = [d.normal(batch, kv_heads, capacity, dim).detach() for dim in (head_dim, value_dim)]
    for cache in caches:
        for b, length in enumerate(seqlens.tolist()):
            cache[b, :, length:] = torch.nan
    table = None
    if draw(paged):
        table = _block_table(d, batch, capacity)
        caches = [_in_pages(d, cache, table) for cache in caches]
    added = [d.normal(batch, kv_heads, new, dim).detach() for dim in (head_dim, value_dim)]
    query = d.normal(batch, heads, q, head_dim).detach()
    options = d.options(batch, heads, causal=False)
    options |= {"cache_seqlens": seqlens, "block_table": table, "is_causal": draw(st.booleans())}
    if turned:
        options |= d.angles(batch, new, head_dim)
    return AttentionCase((query, *caches, *(added if new or turned else (None, None))), options)


def _block_table(d: _Draw, batch: int, capacity: int) -> Tensor:
    """Blocks in random order, of which some belong to nobody."""
    blocks = -(-capacity // d.draw(st.sampled_from((1, 5, 16, 64)))) + d.draw(st.integers(0, 1))
    order = torch.randperm(batch * blocks + 2, generator=d.generator)
    return order[: batch * blocks].reshape(batch, blocks).to(torch.int32)


def _in_pages(d: _Draw, cache: Tensor, table: Tensor) -> Tensor:
    """The contiguous cache as blocks, with NaN where nothing is."""
    batch, kv_heads, capacity, dim = cache.shape
    blocks = table.shape[1]
    block_size = -(-capacity // max(blocks, 1))
    whole = cache.new_full((batch, kv_heads, blocks * block_size, dim), torch.nan)
    whole[:, :, :capacity] = cache
    paged = cache.new_full((batch * blocks + 2, kv_heads, block_size, dim), torch.nan)
    if batch * blocks:
        paged[table.long()] = whole.unflatten(2, (blocks, block_size)).transpose(1, 2)
    return strided(paged, d.draw(LAYOUTS))

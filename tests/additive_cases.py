"""Calls of additive_attention for its tests, drawn by hypothesis or of given sizes."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from isas import draw_dtype
from norm_cases import DTYPES, LAYOUTS, strided
from torch import Tensor

import fastattn

# The edges of tiles (2 or 4 queries, 2 to 16 keys) and blocks (64 keys), and what lies between. The gradients of scores add up
# to nothing over the keys, and of fewer than these the rule would ask for luck: see test_few_of_everything.
QUERIES = st.one_of(st.integers(4, 20), st.sampled_from((33, 70)))
KEYS = st.one_of(st.integers(12, 40), st.sampled_from((63, 64, 65, 130, 200)))
# Remainders of the vectors; the widths of real models.
DIMS = st.one_of(st.integers(8, 40), st.sampled_from((64, 100, 128)))
LEADS = st.sampled_from(((2,), (1,), (), (3,), (2, 3), (0,), (2, 1, 2)))
FEW = st.integers(0, 5)
MOST_ELEMENTS = 400_000  # of (query, key, hidden)


@st.composite
def additive_calls(
    draw: st.DrawFn,
    few: bool = False,
    dtypes: Sequence[torch.dtype] = DTYPES,
    queries: st.SearchStrategy[int] = QUERIES,
    keys: st.SearchStrategy[int] = KEYS,
    dims: st.SearchStrategy[int] = DIMS,
    leads: st.SearchStrategy[tuple[int, ...]] = LEADS,
) -> tuple[tuple, dict]:
    """Arguments of one call; with few of everything in float32."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = torch.float32 if few else draw_dtype(draw, dtypes)
    lead = draw(leads)
    q, k = draw(FEW if few else queries), draw(FEW if few else keys)
    query_dim, key_dim, value_dim = (draw(FEW if few else dims) for _ in range(3))
    hidden = min(draw(FEW if few else dims), max(MOST_ELEMENTS // max(q * k * max(torch.Size(lead).numel(), 1), 1), 1))
    # Sums a + b from small, where tanh is almost the sum, to those beyond the kernel's reach; weights v from small to large.
    # (Of smaller ones the gradients of query and key are the rounding of what adds up to nothing: test_sums_of_every_size.)
    scale, v_scale = draw(st.sampled_from((1.0, 1.0, 0.1, 3.0, 30.0))), draw(st.sampled_from((1.0, 0.1, 4.0)))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = (torch.randn(shape, generator=generator) * scale).to(dtype)
        return strided(values, draw(LAYOUTS)).requires_grad_(draw(st.integers(0, 3)) > 0)

    def mask() -> Tensor | None:
        kind = draw(st.sampled_from(("none", "none", "bool", "float32", "own", "float64")))
        if kind == "none":
            return None
        full = (*lead, q, k)
        shape = tuple(n if draw(st.integers(0, 2)) else 1 for n in full)[draw(st.integers(0, len(full))) :]
        off = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.3, 0.95)))
        if len(shape) > 1 and draw(st.booleans()):
            off[..., : draw(st.integers(0, shape[-2])), :] = True
        if kind == "bool":
            return ~off
        values = torch.randn(shape, generator=generator).masked_fill(off, -torch.inf)
        values = values.to({"own": dtype, "float32": torch.float32, "float64": torch.float64}[kind])
        return values.requires_grad_(draw(st.booleans()))

    tensors = (
        normal(*lead, q, query_dim),
        normal(*lead, k, key_dim),
        normal(*lead, k, value_dim),
        normal(hidden, query_dim, scale=scale / max(query_dim, 1) ** 0.5),
        normal(hidden, key_dim, scale=scale / max(key_dim, 1) ** 0.5),
        normal(hidden, scale=v_scale / max(hidden, 1) ** 0.5),
    )
    return tensors, {"attn_mask": mask(), "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.1, 0.6, 1.0)))}


def check_few(call: tuple, backend: str) -> None:
    """Against eager in float64."""
    tensors, options = call
    leaves = [x for x in (*tensors, options["attn_mask"]) if x is not None and x.requires_grad]

    def run(backend: str, change) -> list[Tensor]:
        torch.manual_seed(0)
        with fastattn.use_backend(backend):
            made = {x: change(x) for x in leaves}
            args = [made.get(x, change(x)) for x in tensors]
            mask = options["attn_mask"]
            out = fastattn.additive_attention(*args, made.get(mask, mask), options["dropout_p"])
        direction = torch.arange(out.numel()).reshape(out.shape).remainder(7) - 3.0
        return [out, *torch.autograd.grad(out, list(made.values()), direction.to(out.dtype))] if leaves else [out]

    found = run(backend, lambda x: x.detach().requires_grad_(x.requires_grad))
    expected = run("eager", lambda x: x.detach().double().requires_grad_(x.requires_grad))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4)


def drawn(
    batch: int, q: int, k: int, dim: int, hidden: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The six tensors, with a + b of size `scale` and scores of size 1."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, q, dim), (batch, k, dim), (batch, k, dim), (hidden, dim), (hidden, dim), (hidden,))
    factors = (1.0, 1.0, 1.0, scale * dim**-0.5, scale * dim**-0.5, hidden**-0.5)
    made = (torch.randn(s, generator=generator) * f for s, f in zip(shapes, factors, strict=True))
    return [x.to(dtype).requires_grad_() for x in made]

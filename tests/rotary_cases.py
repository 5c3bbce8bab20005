"""Calls of rotary_embedding for its tests, drawn by hypothesis."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from norm_cases import DTYPES, LAYOUTS, strided
from torch import Tensor

# Every remainder of the vectors, for halves and for neighbours; the head_dims of real models.
HALVES = st.one_of(st.integers(0, 20), st.sampled_from((32, 40, 64)))


@st.composite
def rotary_calls(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES, most_heads: int = 3) -> tuple:
    """(q, k, cos, sin, interleaved); angles need not stand twice."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    batch, heads, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, most_heads)), draw(st.integers(1, most_heads))
    seq, rotary_dim = draw(st.integers(0, 40)), 2 * draw(HALVES)
    head_dim = max(rotary_dim + draw(st.sampled_from((0, 0, 1, 16))), 1)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def head(heads: int) -> Tensor:
        layout = draw(st.one_of(LAYOUTS, st.just("tokens first"), st.just("expanded")))
        if layout == "tokens first":
            x = normal(batch, seq, heads, head_dim, dtype=dtype).transpose(1, 2)
        elif layout == "expanded":
            x = normal(1, heads, seq, head_dim, dtype=dtype).expand(batch, -1, -1, -1)
        else:
            x = strided(normal(batch, heads, seq, head_dim, dtype=dtype), layout)
        return x.requires_grad_(draw(st.booleans()))

    angle_dtype = draw(st.sampled_from((torch.float32, dtype)))
    leading = draw(st.sampled_from(((), (1,), (batch,))))
    cos, sin = (strided(normal(*leading, seq, rotary_dim, dtype=angle_dtype), draw(LAYOUTS)) for _ in range(2))
    return head(heads), head(kv_heads), cos, sin, draw(st.booleans())

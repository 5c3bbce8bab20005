"""Outputs beyond the caches are written past them: to the bit what is written into the caches, a part at a time."""

import pytest
import torch
from norm_cases import DTYPES
from torch import Tensor

import fastattn
from fastattn import ops

pytestmark = pytest.mark.kernel

# From 12 MiB on outputs are streamed, and from 32 MiB on not.
MEBIBYTES = 13


def norm(op: str, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    """Outputs and the gradients of x and residual."""
    leaves = x.detach().requires_grad_(), residual.detach().requires_grad_()
    with fastattn.use_backend("cpu"):
        out, total = getattr(ops, op)(leaves[0], torch.full(x.shape[-1:], 0.7, dtype=x.dtype), residual=leaves[1])
    return out, total, *torch.autograd.grad((out, total), leaves, (x, residual))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [768, 760])  # 760: rows of 16 bits that are no whole cache lines are not streamed
def test_norms(isa: str, op: str, dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    rows = MEBIBYTES * 2**20 // (dim * dtype.itemsize)
    x, residual = (torch.randn(rows, dim).to(dtype) for _ in range(2))
    parts = [norm(op, *part) for part in zip(x.split(rows // 2), residual.split(rows // 2), strict=True)]
    for found, expected in zip(norm(op, x, residual), map(torch.cat, zip(*parts, strict=True)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(isa: str, dtype: torch.dtype, interleaved: bool) -> None:
    torch.manual_seed(0)
    heads, dim = 8, 64
    seq = MEBIBYTES * 2**20 // (heads * dim * dtype.itemsize)
    q = torch.randn(1, seq, heads, dim).to(dtype).transpose(1, 2)
    cos, sin = torch.randn(2, seq, dim)

    def turn(*arguments: Tensor) -> Tensor:
        q, cos, sin = arguments
        with fastattn.use_backend("cpu"):
            return ops.rotary_embedding(q, q[:, :1], cos, sin, interleaved)[0]

    parts = [turn(*part) for part in zip(q.split(999, 2), cos.split(999), sin.split(999), strict=True)]
    assert torch.equal(turn(q, cos, sin), torch.cat(parts, 2))

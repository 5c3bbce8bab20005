"""Tensor descriptors: what the copy engine of sm_90 and sm_100 can read goes by it, all else by addresses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_backend import DEVICE, OWN, WITH_ENGINE, check, needs_engine, needs_triton

import fastattn
from fastattn.backends.triton._launch import record_launches
from fastattn.backends.triton.chips import use_chip

pytestmark = needs_triton

DTYPE = torch.float16
CHIPS = st.sampled_from(WITH_ENGINE or ("sm_90",))

# How (batch, heads, tokens, dim) can lie in memory so that the copy engine reads it.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda x: x.contiguous(),
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a projection": lambda x: torch.cat((x, torch.zeros_like(x)), -1)[..., : x.shape[-1]],
    "part of a cache": lambda x: torch.cat((x, torch.full_like(x, torch.nan)), 2)[:, :, : x.shape[2]],
}

# And so that it does not.
UNREADABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "begins at an odd element": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "rows of an odd number of bytes": lambda x: torch.cat((x, x[..., :3]), -1)[..., : x.shape[-1]],
    "features apart": lambda x: x.mT.contiguous().mT,
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "float32": lambda x: x.float(),
}


def drawn(q: int, k: int, dim: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(q + k + dim)
    shapes = ((2, heads, q, dim), (2, kv_heads, k, dim), (2, kv_heads, k, dim))
    query, key, value = (torch.randn(shape).to(DTYPE) for shape in shapes)
    return query, key, value


@needs_engine
@settings(max_examples=12)
@given(
    chip=CHIPS,
    layout=st.sampled_from(sorted(LAYOUTS)),
    q=st.sampled_from((1, 20, 64, 65)),
    k=st.sampled_from((1, 40, 64, 130)),
    dim=st.sampled_from((8, 24, 64)),
    kv_heads=st.sampled_from((1, 2)),
    window=st.sampled_from((None, (None, 0), (20, 10))),
    dropout_p=st.sampled_from((0.0, 0.2)),
)
def test_attention_obeys_the_numerics_rule(chip, layout, q, k, dim, kv_heads, window, dropout_p) -> None:
    tensors = (LAYOUTS[layout](x).detach().requires_grad_() for x in drawn(q, k, dim, 2, kv_heads))
    options = {"enable_gqa": True, "window": window, "return_lse": True, "dropout_p": dropout_p}
    check(fastattn.attention, chip, *tensors, **options)


@needs_engine
@settings(max_examples=6)
@given(
    chip=CHIPS,
    lengths=st.lists(st.sampled_from((0, 1, 30, 64, 130)), min_size=1, max_size=3),
    window=st.sampled_from((None, (None, 0), (70, 0))),
)
def test_packed_attention_obeys_the_numerics_rule(chip, lengths, window) -> None:
    torch.manual_seed(sum(lengths))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tensors = (torch.randn(sum(lengths), 2, 16).to(DTYPE).requires_grad_() for _ in range(3))
    most = max(lengths)
    check(fastattn.attention_varlen, chip, *tensors, cu, cu, most, most, window=window, return_lse=True)


@pytest.mark.parametrize("chip", OWN)
def test_a_sequences_nan_stays_in_it(chip: str) -> None:
    """A tile at the end of a sequence would have the next one's first rows."""
    torch.manual_seed(0)
    cu = torch.tensor([0, 70, 100, 170], dtype=torch.int32)
    query, key, value = (torch.randn(170, 2, 16).to(DTYPE) for _ in range(3))
    for x in (query, key, value):
        x[70:100] = torch.nan
    leaves = [x.requires_grad_() for x in (query, key, value)]
    check(fastattn.attention_varlen, chip, *leaves, cu, cu, 70, 70, return_lse=True)


OPTIONS = (None, None, None, 1.0, -1, -1, 0, 0.0, 0.0)  # of the backends, from attn_mask to dropout_p


def described(chip: str, tensors: tuple[Tensor, ...]) -> dict[str, bool]:
    """Which of attention's kernels got descriptors."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fastattn.backends.triton import attention

    found: dict[str, bool] = {}

    def record(kernel: Any, args: tuple, constants: dict, config: Any) -> None:
        found[kernel.__name__] = any(isinstance(arg, TensorDescriptor) for arg in args)

    with use_chip(chip), record_launches(record):
        out, lse = attention.forward(*tensors, *OPTIONS)
        grad_out = LAYOUTS["tokens first"](torch.empty_like(out))
        attention.backward(grad_out, None, *tensors, *OPTIONS[:3], out, lse, *OPTIONS[3:], False)
    return found


WALKS = {"attention_forward", "attention_backward_query", "attention_backward_key"}


@pytest.mark.parametrize("chip", ["sm_90", "sm_100"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_what_the_copy_engine_can_read_goes_by_it(chip: str, layout: str) -> None:
    tensors = tuple(LAYOUTS[layout](x).to(DEVICE) for x in drawn(64, 64, 16, 2, 2))
    assert {kernel for kernel, by_engine in described(chip, tensors).items() if by_engine} == WALKS


@pytest.mark.parametrize("layout", sorted(UNREADABLE))
def test_what_it_cannot_read_goes_by_addresses(layout: str) -> None:
    tensors = tuple(UNREADABLE[layout](x) for x in drawn(40, 70, 16, 2, 2))
    assert not any(described("sm_90", tensors).values())
    check(fastattn.attention, "sm_90", *(x.detach().requires_grad_() for x in tensors), is_causal=True)


def test_chips_without_it_take_addresses() -> None:
    assert not any(described("sm_80", drawn(64, 64, 16, 2, 2)).values())


def test_tensors_made_inside_a_transform_can_be_described() -> None:
    """A tensor that has outlived its transform stands for another, whose memory is meant."""
    from fastattn.backends.triton import attention

    query, key, value = (x.to(DEVICE) for x in drawn(20, 40, 16, 2, 2))
    kept = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    torch.func.grad(keep)(key)
    with use_chip("sm_90"):
        of_dead, expected = (attention.forward(query, x, value, *OPTIONS) for x in (kept[0], key))
    assert torch.equal(of_dead[0], expected[0])

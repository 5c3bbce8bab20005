"""Attention over packed sequences in Triton, forward and backward, against the eager definition."""

import pytest
import torch
from attention_cases import AttentionCase, varlen_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_backend import DEVICE, DTYPES, check, chips, needs_triton

import fastattn
from fastattn.backends.triton.chips import use_chip

pytestmark = needs_triton

LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from((0, 1, 64, 65)))
HEAD_DIMS = st.one_of(st.integers(1, 40), st.sampled_from((64, 80)))
cases = varlen_cases(DTYPES, LENGTHS, HEAD_DIMS, most_sequences=2)


@settings(max_examples=12)
@given(case=cases, chip=chips)
def test_outputs_and_gradients_obey_the_numerics_rule(case: AttentionCase, chip: str) -> None:
    check(fastattn.attention_varlen, chip, *case.tensors, **case.options)


@pytest.mark.parametrize("mask_shape", [(3, 1, 80, 80), (1, 2, 1, 80), (3, 2, 80, 1)])
def test_a_masks_gradient(mask_shape: tuple[int, ...]) -> None:
    """Indexed by position in the sequence; where no sequence reaches, it is zero."""
    torch.manual_seed(0)
    cu = torch.tensor([0, 5, 5, 75], dtype=torch.int32)
    query, key, value = (torch.randn(75, 2, 16, requires_grad=True) for _ in range(3))
    mask = torch.randn(mask_shape, requires_grad=True)
    options = {"attn_mask": mask, "return_lse": True, "is_causal": True}
    check(fastattn.attention_varlen, "sm_90", query, key, value, cu, cu, 80, 80, **options)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("wrong", [[0, 30, 5000], [-4000, 30, 50], [0, 70, 50], [60, 30, 50]])
def test_boundaries_that_nobody_has_looked_at_read_nothing_outside(chip: str, wrong: list[int]) -> None:
    """On a GPU they are not read back before the kernels run: what lies outside must not be touched, whatever they say."""
    from fastattn.backends.triton import attention_varlen

    torch.manual_seed(0)
    memory = torch.full((3, 9050, 16), torch.nan, device=DEVICE, dtype=torch.float16)
    inside = memory[:, 4500:4550].normal_()
    query, key, value = (x[:, None] for x in inside)
    cu = torch.tensor(wrong, dtype=torch.int32, device=DEVICE)
    begin = cu[:-1].clamp(0, 50)
    length = (cu[1:].clamp(max=50) - begin).clamp(min=0)
    with use_chip(chip):
        arguments = (query, key, value, cu, cu, None, None, None, 5000, 5000, 1.0, -1, 0, 0.0, 0.0)
        out, lse = attention_varlen.forward(*arguments)
        grads = attention_varlen.backward(torch.ones_like(out), None, *arguments[:8], out, lse, *arguments[8:], False)
    for b in range(2):
        part = slice(int(begin[b]), int(begin[b] + length[b]))
        assert out[part].isfinite().all()
        assert all(grad[part].isfinite().all() for grad in grads[:3])
    assert memory[:, :4500].isnan().all()
    assert memory[:, 4550:].isnan().all()


def test_results_are_those_of_each_sequence_alone() -> None:
    """What stands beside a sequence in the pack does not touch its result."""
    torch.manual_seed(0)
    lengths = (5, 0, 70, 33)
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    query, key, value = (torch.randn(sum(lengths), 2, 24, device=DEVICE) for _ in range(3))
    with fastattn.use_backend("triton"):
        out = fastattn.attention_varlen(query, key, value, cu, cu, 70, 70, is_causal=True)
        for b in range(len(lengths)):
            part = slice(int(cu[b]), int(cu[b + 1]))
            packed = (x[part].transpose(0, 1)[None] for x in (query, key, value))
            alone = fastattn.attention(*packed, is_causal=True)[0].transpose(0, 1)
            torch.testing.assert_close(out[part], alone, rtol=1e-6, atol=1e-6)

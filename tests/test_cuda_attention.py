"""Attention's forward for Hopper, against the eager definition: on such a GPU, or in the emulation of what it has.

Off on a GPU unless FASTATTN_HOPPER_ATTENTION=1 asks for it.
"""

import pytest
import torch
from attention_cases import AttentionCase
from cuda_backend import DEVICE, check, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.backends.cuda import attention

HOPPER = DEVICE.type == "cpu" or torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    needs_cuda,
    pytest.mark.skipif(not attention.ASKED, reason="FASTATTN_HOPPER_ATTENTION=1 asks for it"),
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
]

HALVES = (torch.float16, torch.bfloat16)
SIDES = st.one_of(st.none(), st.integers(0, 300))


@st.composite
def cases(draw: st.DrawFn) -> AttentionCase:
    """Lengths around the tiles' (64, 128), whole and in windows, with heads that share keys, in several layouts."""
    lengths = st.one_of(st.integers(1, 300), st.sampled_from((64, 128, 256, 129)))
    q, k, dim = draw(lengths), draw(lengths), draw(st.sampled_from(attention.HEAD_DIMS))
    kv_heads, group, batch = draw(st.sampled_from(((1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(HALVES))

    def normal(heads: int, seq: int) -> torch.Tensor:
        layout = draw(st.sampled_from(("heads first", "tokens first", "with room", "gaps")))
        x = torch.randn(batch, heads, seq, dim, generator=generator).to(dtype)
        if layout == "tokens first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "with room":  # rows do not begin at multiples of 16 bytes
            return torch.nn.functional.pad(x, (3, 1))[..., 3:-1]
        return x.repeat_interleave(2, dim=-1)[..., ::2] if layout == "gaps" else x

    options = {"enable_gqa": True, "return_lse": True, "is_causal": draw(st.booleans())}
    if not options["is_causal"]:
        options["window"] = draw(st.tuples(SIDES, SIDES))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from((1.0, 0.02)))
    return AttentionCase((normal(kv_heads * group, q), normal(kv_heads, k), normal(kv_heads, k)), options)


@settings(max_examples=20)
@given(case=cases())
def test_outputs_obey_the_numerics_rule(case: AttentionCase) -> None:
    check(fastattn.attention, *case.tensors, **case.options)


@pytest.mark.parametrize("dim", attention.HEAD_DIMS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", [True, False])
def test_several_tiles_of_queries_and_keys(dim: int, dtype: torch.dtype, causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 520, dim).to(dtype) for _ in range(3))
    check(fastattn.attention, query, key, value, is_causal=causal, return_lse=True)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_heads_in_sections(monkeypatch: pytest.MonkeyPatch, key_heads: int) -> None:
    """Heads whose keys and values are more than the second-level cache has room for; the last section is not full."""
    monkeypatch.setattr(attention, "SECTION_BYTES", key_heads * 2 * 100 * 64 * 2)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, n, 64).half() for heads, n in ((6, 130), (3, 100), (3, 100)))
    check(fastattn.attention, query, key, value, enable_gqa=True, return_lse=True)


def test_gradients_are_those_of_the_triton_backend() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 64).half().requires_grad_() for n in (70, 140, 140))
    check(fastattn.attention, query, key, value)


def test_nan_and_infinity_propagate_as_in_eager() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 150, 64).half() for _ in range(3))
    for tensor, place in ((query, (0, 0, 3, 5)), (key, (0, 0, 140, 5)), (value, (0, 0, 7, 5))):
        for special in (torch.nan, torch.inf, -torch.inf):
            changed = tensor.clone()
            changed[place] = special
            check(fastattn.attention, *(changed if x is tensor else x for x in (query, key, value)), return_lse=True)


def test_what_it_cannot_take_is_refused_with_the_reason() -> None:
    query = torch.randn(1, 2, 9, 64, device=DEVICE).half()
    mask = torch.ones(9, 9, dtype=torch.bool, device=DEVICE)

    def reason(*tensors: torch.Tensor, **options) -> str | None:
        return fastattn.explain("attention", *tensors, **options).reasons["cuda"]

    assert reason(query, query, query) is None
    assert "not float32" in reason(*[query.float()] * 3)
    assert "they are 64 and 32" in reason(query, query, query[..., :32])
    assert "has no mask" in reason(query, query, query, mask)
    assert "has no dropout" in reason(query, query, query, dropout_p=0.1)
    assert "has no softcap" in reason(query, query, query, softcap=3.0)
    assert "has no ALiBi" in reason(query, query, query, alibi_slopes=torch.ones(2, device=DEVICE))
    assert "scales above 0" in reason(query, query, query, scale=-1.0)
    assert "no keys" in reason(query, query[:, :, :0], query[:, :, :0])

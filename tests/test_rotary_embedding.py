"""Rotary position embedding on the CPU, against the eager definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from norm_cases import DTYPES, check_refused, with_specials
from rotary_cases import rotary_calls
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native, rotary_embedding


@given(call=rotary_calls())
def test_outputs_and_gradients_obey_the_numerics_rule(isa: str, call: tuple) -> None:
    verify.check(fastattn.rotary_embedding, *call, backend="cpu").raise_if_failed()


@given(seed=st.integers(0, 1000), interleaved=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_nan_and_infinity_propagate_as_in_eager(isa: str, seed: int, interleaved: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (with_specials(torch.randn(1, 2, 6, 24, generator=generator).to(dtype), generator) for _ in range(2))
    cos, sin = (torch.randn(6, 22, generator=generator) for _ in range(2))
    verify.check(fastattn.rotary_embedding, q, k, cos, sin, interleaved, backend="cpu").raise_if_failed()


def test_bits_do_not_depend_on_threads(isa, same_bits_at_any_thread_count) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 300, 64, requires_grad=True), torch.randn(2, 1, 300, 64, requires_grad=True)
    cos, sin = torch.randn(300, 64), torch.randn(300, 64)

    def run() -> list[Tensor]:
        with fastattn.use_backend("cpu"):
            outputs = fastattn.rotary_embedding(q, k, cos, sin)
            grads = torch.autograd.grad(outputs, (q, k), [out.detach() for out in outputs])
        return [*outputs, *grads]

    same_bits_at_any_thread_count(run)


@pytest.mark.parametrize("fused", [False, True])
def test_results_lie_in_memory_as_the_inputs_do(fused: bool) -> None:
    """Heads that come from one product stay next to each other, whether or not keys and values lie between them."""
    rows = torch.randn(2, 7, 3 * 4 * 16 if fused else 4 * 16)
    q = rows.unflatten(-1, (-1, 16)).transpose(1, 2)[:, :4]
    with fastattn.use_backend("cpu"):
        out, _ = fastattn.rotary_embedding(q, q, torch.randn(7, 16), torch.randn(7, 16))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"q": torch.randn(1, 2, 3, 4).double(), "k": torch.randn(1, 2, 3, 4).double()}, "float64"),
        ({"q": torch.empty(1, 2, 3, 4, device="meta")}, "CPU"),
        ({"cos": torch.randn(3, 4, requires_grad=True)}, "cos and sin"),
        ({"sin": torch.randn(3, 4, dtype=torch.float64)}, "float64"),
    ],
)
def test_unsupported_says_why(change: dict, why: str) -> None:
    x, angles = torch.randn(1, 2, 3, 4), torch.randn(3, 4)
    arguments = {"q": x, "k": x, "cos": angles, "sin": angles, "interleaved": False, **change}
    assert why in rotary_embedding.unsupported(**arguments)


def test_no_argument_reaches_the_kernel_unchecked() -> None:
    names = ("q", "k", "out_q", "out_k")
    good = {
        **{name: torch.randn(2, 3, 5, 8) for name in names},
        **{name: torch.randn(5, 6) for name in ("cos", "sin")},
        "interleaved": False,
        "inverse": False,
    }
    unfit = (
        torch.tensor(1.0),
        torch.ones(5, 6, dtype=torch.int64),
        torch.empty(5, 6, device="meta"),
        None,
        "text",
        1.0,
    )
    shapes = ((3, 5, 8), (2, 4, 5, 8), (2, 3, 6, 8), (2, 3, 5, 9), (3, 3, 5, 8))
    heads = (
        *(torch.randn(shape) for shape in shapes),
        torch.randn(2, 3, 8, 5).transpose(2, 3),
        torch.randn(2, 3, 5, 8).bfloat16(),
        *unfit,
    )
    angle_shapes = ((5, 7), (5, 4), (5, 10), (4, 6), (2, 5, 6), (3, 1, 5, 6), (2, 2, 5, 6))
    angles = (
        *(torch.randn(shape) for shape in angle_shapes),
        torch.randn(6, 5).t(),
        torch.randn(5, 6).double(),
        *unfit,
    )
    expanded = torch.randn(1, 3, 5, 8).expand(2, -1, -1, -1)
    check_refused(
        _native.C.rotary_embedding,
        good,
        {
            **dict.fromkeys(("q", "k"), heads),
            **dict.fromkeys(("out_q", "out_k"), (*heads, expanded)),
            **dict.fromkeys(("cos", "sin"), angles),
            **dict.fromkeys(("interleaved", "inverse"), ("text",)),
        },
    )

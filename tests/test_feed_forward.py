"""The feed-forward network on the CPU, against the eager definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import (
    ACTIVATIONS,
    MATRICES,
    SIZES,
    SMALL,
    VECTORS,
    Values,
    check_exact,
    check_specials,
    leading,
    network,
)
from memory import most_memory_of, needs_linux
from norm_cases import DTYPES, check_refused, with_specials
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native, feed_forward


@given(data=st.data())
def test_outputs_and_gradients_obey_the_numerics_rule(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    *arguments, w_gate = network(Values(draw), draw(leading(SIZES)), draw(SMALL), draw(SIZES), draw(SIZES))
    activation, dropout_p = draw(st.sampled_from(ACTIVATIONS)), draw(st.sampled_from((0.0, 0.0, 0.1, 1.0)))
    verify.check(fastattn.feed_forward, *arguments, activation, w_gate, dropout_p, backend="cpu").raise_if_failed()


@given(data=st.data())
def test_whole_numbers_are_exact(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    values = Values(draw, whole=True, dtypes=(torch.float32,))
    *arguments, w_gate = network(values, draw(leading(SMALL)), draw(SMALL), draw(SMALL), draw(SMALL))
    activation, dropout_p = draw(st.sampled_from((None, "relu"))), draw(st.sampled_from((0.0, 0.5)))
    check_exact(fastattn.feed_forward, *arguments, activation, w_gate, dropout_p, generator=values.generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_many_tokens(isa: str, dtype: torch.dtype, gated: bool) -> None:
    """More rows than the forward takes at a time, and more features than the backward does."""
    torch.manual_seed(0)
    shapes = (2100, 40), (450, 40), (450,), (50, 450), (50,), (450, 40)
    x, w1, b1, w2, b2, w_gate = ((torch.randn(s) * s[-1] ** -0.5).to(dtype).requires_grad_() for s in shapes)
    verify.check(
        fastattn.feed_forward, x, w1, b1, w2, b2, "gelu", w_gate if gated else None, 0.1, backend="cpu"
    ).raise_if_failed()


@given(
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 1000),
    gated=st.booleans(),
)
def test_nan_and_infinity_stand_where_the_definition_has_them(
    isa: str, dtype: torch.dtype, activation: str | None, seed: int, gated: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w1, w2, w_gate = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((20, 9), (33, 9), (18, 33), (33, 9))
    )
    x = with_specials(x.detach(), generator).requires_grad_()
    check_specials(fastattn.feed_forward, x, w1, None, w2, None, activation, w_gate if gated else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "inner", "hidden", "outer"), [(1300, 33, 70, 50), (3, 300, 700, 400), (2100, 20, 450, 30)]
)
def test_bits_do_not_depend_on_threads(isa, same_bits_at_any_thread_count, dtype, rows, inner, hidden, outer) -> None:
    torch.manual_seed(0)
    shapes = (rows, inner), (hidden, inner), (hidden,), (outer, hidden), (outer,), (hidden, inner)
    inputs = [(torch.randn(s) * s[-1] ** -0.5).to(dtype).requires_grad_() for s in shapes]

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        with fastattn.use_backend("cpu"):
            out = fastattn.feed_forward(*inputs[:5], "silu", inputs[5], 0.2)
            return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    same_bits_at_any_thread_count(run)


@needs_linux
@pytest.mark.parametrize("gated", [False, True])
def test_a_training_step_takes_no_more_than_twice_what_it_keeps(gated: bool) -> None:
    """Of the hidden values and their gradients, a part exists at a time."""
    rows, hidden = 8192, 2048
    x, w1, w2, w_gate = (
        torch.ones(s, requires_grad=True) for s in ((rows, 16), (hidden, 16), (16, hidden), (hidden, 16))
    )
    kept = (1 + gated) * rows * hidden * x.itemsize

    def step() -> None:
        fastattn.feed_forward(x, w1, None, w2, None, "silu", w_gate if gated else None).sum().backward()

    with fastattn.use_backend("cpu"):
        step()
        assert most_memory_of(step) < 2 * kept


@pytest.mark.parametrize("sizes", [(0, 3, 5, 4), (3, 0, 5, 4), (3, 5, 0, 4), (3, 5, 4, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty_sizes(isa: str, sizes: tuple[int, ...], gated: bool, dropout_p: float) -> None:
    rows, inner, hidden, outer = sizes
    shapes = (rows, inner), (hidden, inner), (hidden,), (outer, hidden), (outer,), (hidden, inner)
    *arguments, w_gate = (torch.randn(shape, requires_grad=True) for shape in shapes)
    verify.check(
        fastattn.feed_forward, *arguments, "gelu", w_gate if gated else None, dropout_p, backend="cpu"
    ).raise_if_failed()


def test_gradients_have_the_layout_of_their_inputs(isa: str) -> None:
    x = torch.randn(6, 3, 4).permute(2, 1, 0).requires_grad_()
    w1, w2 = torch.randn(6, 5).t().requires_grad_(), torch.randn(5, 7).t().requires_grad_()
    with fastattn.use_backend("cpu"):
        grads = torch.autograd.grad(fastattn.feed_forward(x, w1, None, w2, None).sum(), (x, w1, w2))
    for grad, tensor in zip(grads, (x, w1, w2), strict=True):
        assert grad.stride() == torch.empty_like(tensor).stride()


@pytest.mark.parametrize(
    ("dtype", "device", "why"), [(torch.float64, "cpu", "float64"), (torch.float32, "meta", "CPU")]
)
def test_unsupported_says_why(dtype: torch.dtype, device: str, why: str) -> None:
    x, w1, w2 = (torch.empty(shape, dtype=dtype, device=device) for shape in ((2, 3), (4, 3), (5, 4)))
    assert why in feed_forward.unsupported(x, w1, None, w2, None, None, None, "gelu", 0.0, False)


SEEDS = (None, torch.tensor([1, 2]), torch.tensor([1.0]), torch.tensor([], dtype=torch.int64), 1)
PROBABILITIES = (None, "text", float("nan"), -0.1, 1.5)


def forward_arguments() -> dict:
    return {
        "x": torch.randn(4, 3),
        "w1": torch.randn(6, 3),
        "b1": torch.randn(6),
        "w2": torch.randn(6, 6),
        "b2": torch.randn(6),
        "w_gate": torch.randn(6, 3),
        "seed": torch.tensor([1]),
        **{name: torch.randn(4, 6) for name in ("out", "pre", "pre_gate")},
        "activation": "gelu",
        "dropout_p": 0.5,
    }


def test_no_argument_reaches_the_forward_unchecked() -> None:
    outputs = (*MATRICES, torch.randn(4, 1).expand(4, 6), torch.randn(6).expand(4, 6))
    wrong = {
        **dict.fromkeys(("x", "w1", "w2"), (None, *MATRICES)),
        "w_gate": MATRICES,
        "b1": VECTORS,
        "b2": VECTORS,
        "seed": SEEDS,
        "out": (None, *outputs),
        "pre": outputs,
        "pre_gate": outputs,
        "activation": (None, "sigmoid", 3),
        "dropout_p": PROBABILITIES,
    }
    check_refused(_native.C.feed_forward_forward, forward_arguments(), wrong)


def test_no_argument_reaches_the_backward_unchecked() -> None:
    arguments = forward_arguments()
    inputs = {name: arguments[name] for name in ("x", "w1", "w2", "w_gate", "pre", "pre_gate", "seed")}
    good = {
        "grad_out": torch.randn(4, 6),
        **inputs,
        **{f"grad_{name}": torch.empty_like(arguments[name]) for name in ("x", "w1", "b1", "w2", "b2", "w_gate")},
        "activation": "gelu",
        "dropout_p": 0.5,
    }
    wrong = {
        **dict.fromkeys(("grad_out", "x", "w1", "w2", "pre", "pre_gate"), (None, *MATRICES)),
        "w_gate": (None, *MATRICES),
        "seed": SEEDS,
        "grad_x": (*MATRICES, torch.randn(4, 1).expand(4, 3)),
        **{name: (*MATRICES, torch.randn(1, 1).expand(6, 3)) for name in ("grad_w1", "grad_w_gate")},
        "grad_w2": (*MATRICES, torch.randn(6, 12)[:, ::2]),
        **{name: (*VECTORS, torch.randn(1).expand(6)) for name in ("grad_b1", "grad_b2")},
        "activation": (None, "sigmoid"),
        "dropout_p": PROBABILITIES,
    }
    check_refused(_native.C.feed_forward_backward, good, wrong)

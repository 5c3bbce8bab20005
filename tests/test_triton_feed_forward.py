"""The feed-forward network in Triton, against the eager definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import ACTIVATIONS, Values, check_exact, check_specials, leading, network
from norm_cases import with_specials
from triton_backend import DEVICE, DTYPES, OWN, WITH_ENGINE, check, chips, dtypes, kernels_of, needs_triton, on_device

import fastattn
from fastattn.backends.triton.chips import use_chip

pytestmark = needs_triton

ROWS = st.one_of(st.integers(9, 16), st.integers(17, 64), st.sampled_from((65, 130)))
# In 16 bits, rows of other than a multiple of 16 bytes have tiles of their own.
SIZES = st.one_of(st.integers(20, 70), st.sampled_from((130, 270)), st.sampled_from((24, 64, 136, 272)))
DEPTHS = st.one_of(st.integers(1, 70), st.sampled_from((8, 24, 64, 72)))


@settings(max_examples=16)
@given(data=st.data(), chip=chips)
def test_outputs_and_gradients_obey_the_numerics_rule(data: st.DataObject, chip: str) -> None:
    draw = data.draw
    values = Values(draw, dtypes=DTYPES)
    *arguments, w_gate = network(values, draw(leading(ROWS)), draw(DEPTHS), draw(SIZES), draw(SIZES))
    activation, dropout_p = draw(st.sampled_from(ACTIVATIONS)), draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    check(fastattn.feed_forward, chip, *arguments, activation, w_gate, dropout_p)


@settings(max_examples=12)
@given(data=st.data(), chip=chips)
def test_whole_numbers_are_exact(data: st.DataObject, chip: str) -> None:
    draw = data.draw
    small = st.integers(1, 70)
    values = Values(draw, whole=True, dtypes=(torch.float32,))
    arguments = network(values, draw(leading(small)), draw(small), draw(small), draw(small))
    *arguments, w_gate = on_device(arguments)
    # Half of the hidden values are dropped, and the others doubled: the same ones as eager drops, or the numbers differ.
    activation, dropout_p = draw(st.sampled_from((None, "relu"))), draw(st.sampled_from((0.0, 0.5)))
    inputs = (*arguments, activation, w_gate, dropout_p)
    with use_chip(chip):
        check_exact(fastattn.feed_forward, *inputs, generator=values.generator, backend="triton")


OWN_PRODUCTS = {"gated_matmul", "hidden_backward"}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("chip", "inner", "hidden"), [("sm_80", 70, 530), *((chip, 72, 528) for chip in OWN)])
def test_large_tiles(gated: bool, chip: str, inner: int, hidden: int) -> None:
    """Whole and partial tiles of the largest size, which are finished in halves; enough of them that they are taken.

    Rows of a multiple of 16 bytes come by the copy engine where the chip has one; others have smaller tiles.
    """
    torch.manual_seed(0)
    shapes = (260, inner), (hidden, inner), (hidden,), (304, hidden), (304,), (hidden, inner)
    x, w1, b1, w2, b2, w_gate = ((torch.randn(s) * s[-1] ** -0.5).half().requires_grad_() for s in shapes)
    arguments = (x, w1, b1, w2, b2, "gelu", w_gate if gated else None, 0.1)
    check(fastattn.feed_forward, chip, *arguments)

    with use_chip(chip):
        grad_out = on_device(torch.ones(260, 304).half())
        launched = kernels_of(lambda: fastattn.feed_forward(*on_device(arguments)).backward(grad_out))
    suffix = "_persistent" if chip in WITH_ENGINE else ""
    own = {name for name in launched if name.removesuffix("_persistent") in OWN_PRODUCTS}
    assert own == {f"{name}{suffix}" for name in OWN_PRODUCTS if gated or name != "gated_matmul"}


@settings(max_examples=12)
@given(
    dtype=dtypes, activation=st.sampled_from(ACTIVATIONS), seed=st.integers(0, 1000), gated=st.booleans(), chip=chips
)
def test_nan_and_infinity_stand_where_the_definition_has_them(
    dtype: torch.dtype, activation: str | None, seed: int, gated: bool, chip: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w1, w2, w_gate = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((20, 9), (33, 9), (18, 33), (33, 9))
    )
    x = with_specials(x.detach(), generator).requires_grad_()
    arguments = on_device((x, w1, None, w2, None, activation, w_gate if gated else None))
    with use_chip(chip):
        check_specials(fastattn.feed_forward, *arguments, backend="triton")


@pytest.mark.parametrize("wanted", [("w2",), ("b1",), ("x",), ("w_gate",), ("b2", "w2")])
@pytest.mark.parametrize("gated", [False, True])
def test_some_gradients_alone(wanted: tuple[str, ...], gated: bool) -> None:
    torch.manual_seed(0)
    shapes = {"x": (20, 30), "w1": (40, 30), "b1": (40,), "w2": (25, 40), "b2": (25,), "w_gate": (40, 30)}
    named = {name: torch.randn(shape).requires_grad_(name in wanted) for name, shape in shapes.items()}
    w_gate = named.pop("w_gate") if gated else None
    named.pop("w_gate", None)
    check(fastattn.feed_forward, "sm_90", *named.values(), "silu", w_gate)


@pytest.mark.parametrize("sizes", [(0, 3, 5, 4), (3, 0, 5, 4), (3, 5, 0, 4), (3, 5, 4, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty_sizes(sizes: tuple[int, ...], gated: bool, dropout_p: float) -> None:
    rows, inner, hidden, outer = sizes
    shapes = (rows, inner), (hidden, inner), (hidden,), (outer, hidden), (outer,), (hidden, inner)
    *arguments, w_gate = (torch.randn(shape, requires_grad=True) for shape in shapes)
    check(fastattn.feed_forward, "sm_90", *arguments, "gelu", w_gate if gated else None, dropout_p)


def test_gradients_have_the_layout_of_their_inputs() -> None:
    x = on_device(torch.randn(6, 3, 4)).permute(2, 1, 0).requires_grad_()
    w1, w2 = (on_device(torch.randn(shape)).t().requires_grad_() for shape in ((6, 5), (5, 7)))
    with fastattn.use_backend("triton"):
        grads = torch.autograd.grad(fastattn.feed_forward(x, w1, None, w2, None).sum(), (x, w1, w2))
    for grad, tensor in zip(grads, (x, w1, w2), strict=True):
        assert grad.stride() == torch.empty_like(tensor).stride()


def test_unsupported_says_why() -> None:
    from fastattn.backends.triton import feed_forward

    x, w1, w2 = (torch.empty(shape, dtype=torch.float64, device=DEVICE) for shape in ((2, 3), (4, 3), (5, 4)))
    assert "float64" in feed_forward.unsupported(x, w1, None, w2, None, None, None, "gelu", 0.0, False)

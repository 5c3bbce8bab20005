"""Additive attention on the CPU, forward and backward, against the eager definition."""

import pytest
import torch
from additive_cases import additive_calls, check_few, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import most_memory_of, needs_linux
from norm_cases import DTYPES, check_refused, strided, with_specials
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native, additive_attention
from fastattn.backends.eager import dropout as eager_dropout


@settings(max_examples=150)
@given(call=additive_calls())
def test_outputs_and_gradients_obey_the_numerics_rule(isa: str, call: tuple) -> None:
    tensors, options = call
    verify.check(fastattn.additive_attention, *tensors, backend="cpu", **options).raise_if_failed()


@settings(max_examples=150)
@given(call=additive_calls(few=True))
def test_few_of_everything(isa: str, call: tuple) -> None:
    """Down to nothing."""
    check_few(call, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 8.0])
def test_sums_of_every_size(isa: str, dtype: torch.dtype, scale: float) -> None:
    """A tanh is as exact where it is tiny as where it is 1."""
    tensors = drawn(2, 40, 150, 32, 48, scale=scale, dtype=dtype)
    verify.check(fastattn.additive_attention, *tensors, backend="cpu").raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "q", "k", "hidden"), [(2, 300, 400, 32), (1, 1, 3000, 64), (70, 3, 5, 20)])
def test_real_sizes(dtype: torch.dtype, batch: int, q: int, k: int, hidden: int) -> None:
    tensors = drawn(batch, q, k, 40, hidden, dtype=dtype)
    verify.check(fastattn.additive_attention, *tensors, backend="cpu").raise_if_failed()


@pytest.mark.any_lanes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_shape", [(150, 9000), (1, 9000), (150, 1)])
def test_queries_that_are_taken_in_turn(isa: str, dtype: torch.dtype, mask_shape: tuple[int, int]) -> None:
    """More scores than exist at a time, for one batch element."""
    tensors = drawn(1, 150, 9000, 8, 12, dtype=dtype)
    mask = torch.randn(mask_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    verify.check(fastattn.additive_attention, *tensors, mask, backend="cpu").raise_if_failed()


@pytest.mark.parametrize("which", range(5))
def test_a_few_rows_beyond_reach(isa: str, which: int) -> None:
    """Large elements in some rows: these take another path, beside rows that do not."""
    tensors = [x.detach() for x in drawn(2, 30, 150, 32, 48)]
    tensors[which][(1, 5) if which < 3 else 5] *= 30.0
    tensors = [x.requires_grad_() for x in tensors]
    verify.check(fastattn.additive_attention, *tensors, backend="cpu").raise_if_failed()


@pytest.mark.parametrize("size", [1.0, 15.0, 19.9, 20.1, 43.0, 50.0, 100.0])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_sums_that_cancel_or_saturate(isa: str, size: float, signs: tuple[int, int]) -> None:
    """a and b of one size: their sum is near zero, or tanh is 1."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((33, 24), (70, 24))
    query, key = (sign * size + torch.randn(1, *s, generator=generator) for sign, s in zip(signs, shapes, strict=True))
    weight = torch.eye(24)  # so that a and b are query and key
    leaves = [query, key, *(torch.randn(s, generator=generator) for s in ((1, 70, 8), (24,)))]
    query, key, value, v = (x.requires_grad_() for x in leaves)
    verify.check(fastattn.additive_attention, query, key, value, weight, weight, v, backend="cpu").raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "q", "k"), [(3, 70, 200), (1, 150, 9000), (5, 1, 300)])
@pytest.mark.parametrize("mask_shape", ["bqk", "1qk", "b1k", "11k"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_bits_do_not_depend_on_threads(
    isa, same_bits_at_any_thread_count, dtype, batch, q, k, mask_shape, dropout_p
) -> None:
    sizes = {"1": 1, "b": batch, "q": q, "k": k}
    hidden = 40 if k < 1000 else 5
    inputs = [*drawn(batch, q, k, 24, hidden, dtype=dtype), torch.randn([sizes[letter] for letter in mask_shape])]

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        leaves = [x.detach().requires_grad_() for x in inputs]
        with fastattn.use_backend("cpu"):
            out = fastattn.additive_attention(*leaves, dropout_p)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    same_bits_at_any_thread_count(run)


@needs_linux
def test_the_tensor_of_tanhs_is_never_formed() -> None:
    """Forward and backward over 4096 tokens: the (q, k, hidden) tensor would take 2 GiB, a matrix of scores 64 MiB."""
    tensors = drawn(1, 4096, 4096, 8, 32)
    with fastattn.use_backend("cpu"):
        assert most_memory_of(lambda: fastattn.additive_attention(*tensors).sum().backward()) < 40 << 20


@given(p=st.sampled_from((0.1, 0.5, 0.999, 1.0)), seed=st.integers(-(2**63), 2**63 - 1), q=st.integers(1, 40))
def test_dropout_drops_what_eager_drops(isa: str, p: float, seed: int, q: int) -> None:
    """With equal scores and the unit matrix for values, the output is the dropped weights themselves."""
    batch, k = 2, 130
    query, key, value = torch.zeros(batch, q, 8), torch.zeros(batch, k, 8), torch.eye(k).expand(batch, k, k)
    weight, seed_tensor = torch.ones(4, 8), torch.tensor([seed])
    out, *_ = additive_attention.forward(query, key, value, weight, weight, torch.ones(4), None, seed_tensor, p, False)
    keep = eager_dropout.keep_mask(seed_tensor, torch.arange(batch * q).reshape(batch, q), k, p)
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(out, keep / k / (1 - p) if p < 1 else torch.zeros_like(out))


@given(seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES), which=st.integers(0, 6), q=st.sampled_from((1, 3, 20)))
def test_nan_and_infinity_propagate_as_in_eager(isa: str, seed: int, dtype: torch.dtype, which: int, q: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [x.detach() for x in drawn(2, q, 70, 24, 20, dtype=dtype)]
    tensors.append(torch.randn(2, q, 70, generator=generator))
    tensors[which] = with_specials(tensors[which], generator)
    leaves = [x.requires_grad_() for x in tensors]
    verify.check(fastattn.additive_attention, *leaves, backend="cpu").raise_if_failed()


def test_a_query_without_keys_gets_zeros_in_both_directions(isa: str) -> None:
    tensors = drawn(2, 9, 70, 16, 12)
    mask = torch.ones(9, 70, dtype=torch.bool)
    mask[1] = False
    with fastattn.use_backend("cpu"):
        out = fastattn.additive_attention(*tensors, mask)
    assert not out[:, 1].any()
    grads = torch.autograd.grad(out.square().sum(), tensors)
    assert not grads[0][:, 1].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_a_key_that_nobody_sees_leaves_no_trace(isa: str) -> None:
    """Padding in whole blocks is not computed: what lies there may be NaN."""
    tensors = [x.detach() for x in drawn(2, 9, 200, 16, 12)]
    mask = torch.arange(200) < 64
    for x in tensors[1:2]:
        x[:, 64:] = torch.nan
    leaves = [x.requires_grad_() for x in tensors]
    with fastattn.use_backend("cpu"):
        out = fastattn.additive_attention(*leaves, mask)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert out.isfinite().all()
    assert not grads[2][:, 64:].any()
    assert all(grads[i].isfinite().all() for i in (0, 2, 3, 5))


def test_gradients_lie_in_memory_as_their_tensors_do() -> None:
    tensors = [strided(x.detach(), "transposed").requires_grad_() for x in drawn(2, 5, 7, 4, 6)]
    with fastattn.use_backend("cpu"):
        grads = torch.autograd.grad(fastattn.additive_attention(*tensors).sum(), tensors)
    for x, grad in zip(tensors, grads, strict=True):
        assert grad.stride() == x.stride()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"query": torch.randn(2, 3, 4).double()}, "float64"),
        ({"query": torch.empty(2, 3, 4, device="meta")}, "CPU"),
        ({"v": torch.randn(7).half()}, "share one dtype"),
    ],
)
def test_unsupported_says_why(change: dict, why: str) -> None:
    tensors = zip(("query", "key", "value", "w_query", "w_key", "v"), drawn(2, 3, 5, 4, 7), strict=True)
    arguments = {**dict(tensors), "attn_mask": None, "seed": None, "dropout_p": 0.0, "save": False, **change}
    assert why in additive_attention.unsupported(**arguments)


def test_no_argument_reaches_the_kernel_unchecked() -> None:
    names = ("query", "key", "value", "w_query", "w_key", "v")
    inputs = dict(zip(names, (x.detach() for x in drawn(2, 3, 5, 4, 7)), strict=True))
    inputs |= {"attn_mask": torch.zeros(2, 3, 5), "seed": torch.tensor([1]), "dropout_p": 0.5}
    kept = {"projected_query": torch.zeros(6, 7), "projected_key": torch.zeros(10, 7)}
    grads = {f"grad_{name}": torch.empty_like(inputs[name]) for name in names} | {"grad_mask": torch.empty(2, 3, 5)}
    unfit = (
        torch.tensor(1.0),
        torch.randn(3, 3),
        torch.randn(2, 4, 6),
        torch.randn(9, 3, 5),
        torch.randn(2, 3, 4, 5),
        torch.ones(2, 3, 4, dtype=torch.int64),
        torch.empty(2, 3, 4, device="meta"),
        "text",
        1.0,
    )

    def wrong(good: dict) -> dict[str, tuple]:
        found: dict[str, tuple] = {}
        for name, x in good.items():
            if isinstance(x, Tensor) and name != "seed":
                optional = name == "attn_mask" or (name.startswith("grad_") and name != "grad_out")
                found[name] = (*unfit, x.half() if name != "attn_mask" else x.double(), *(() if optional else (None,)))
        found["seed"] = (None, torch.tensor([1, 2]), torch.tensor([1.0]), 1)
        found["dropout_p"] = (None, "text", float("nan"), -0.1, 1.5)
        return found

    forward = {**inputs, "out": torch.empty(2, 3, 4), **kept}
    refused = wrong(forward)
    refused["out"] += (torch.empty(2, 4, 3).mT, torch.empty(1, 3, 4).expand(2, -1, -1))
    check_refused(_native.C.additive_attention_forward, forward, refused)

    backward = {"grad_out": torch.randn(2, 3, 4), **inputs, **kept, **grads}
    refused = wrong(backward)
    for name in ("grad_query", "grad_key", "grad_value"):
        refused[name] += (grads[name].mT.contiguous().mT, grads[name][:1].expand(2, -1, -1))
    refused["grad_v"] += (torch.empty(14)[::2],)
    refused["grad_mask"] += (torch.empty(1, 3, 5),)
    refused["attn_mask"] += (None, torch.ones(2, 3, 5, dtype=torch.bool))  # with its gradient
    check_refused(_native.C.additive_attention_backward, backward, refused)

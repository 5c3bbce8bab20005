"""The summary of attention's weights: the numerics rule, the formula written out, linear memory, nothing unchecked."""

import pytest
import torch
import weights_reference
from attention_cases import AttentionCase, attention_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import Allocations, most_memory_of, needs_linux
from norm_cases import DTYPES, check_refused, with_specials

import fastattn
from fastattn import verify
from fastattn.backends import BACKENDS
from fastattn.backends.cpu import _native, attention_summary

pytestmark = pytest.mark.kernel


def arguments(case: AttentionCase) -> tuple[tuple, dict]:
    """A case of attention without its values, dropout and lse."""
    options = {name: value for name, value in case.options.items() if name not in ("dropout_p", "return_lse")}
    return tuple(x.detach() for x in case.tensors[:2]), options


def turned(tensors: tuple, options: dict) -> tuple[tuple, dict]:
    """Six times the same problem in one batch, the features in other orders.

    An entropy near zero is as far off as the roundings of its scores by chance make it, in eager, too; over a few elements
    the largest error of one may be many times the other's. More of them say what an implementation's errors are.
    """
    turns = range(0, 6 * 5, 5)
    found = tuple(torch.cat([x.roll(turn, dims=-1) for turn in turns]) for x in tensors)
    options = dict(options)
    mask, slopes = options["attn_mask"], options.get("alibi_slopes")
    if mask is not None and mask.shape[0] != 1:
        options["attn_mask"] = mask.detach().repeat(len(turns), 1, 1, 1)
    if slopes is not None and slopes.ndim == 2:
        options["alibi_slopes"] = slopes.repeat(len(turns), 1)
    return found, options


@settings(max_examples=100)
@given(case=attention_cases(most_scores=20_000))
def test_outputs_obey_the_numerics_rule(isa: str, case: AttentionCase) -> None:
    tensors, options = turned(*arguments(case))
    report = verify.check(fastattn.attention_summary, *tensors, backend="cpu", **options)
    # Outputs are float32 whatever the inputs are; products of 16 bits are added up by other units, in their own order.
    slack = 1.0 if tensors[0].dtype == torch.float32 else 2.0
    assert all(found.error <= slack * found.allowed for found in report.comparisons), report
    with fastattn.use_backend("cpu"):
        found = fastattn.attention_summary(*tensors, **options)
    weight = weights_reference.weights(*tensors, **options)
    weights_reference.check_argmax(found.argmax, weight, tolerance=1e-3)


@settings(max_examples=100)
@given(case=attention_cases())
def test_the_definition_is_the_formula(case: AttentionCase) -> None:
    """In float64, where nothing but the formula can differ; in the drawn dtype the sums are float32's."""
    tensors, options = arguments(case)
    weight = weights_reference.weights(*tensors, **options)
    expected = weights_reference.summary(weight, options["is_causal"])
    for dtype, tolerance in ((torch.float64, 1e-9), (tensors[0].dtype, 1e-3)):
        mask = options["attn_mask"]
        if dtype == torch.float64 and mask is not None and mask.is_floating_point():
            mask = mask.detach().to(dtype)
        with fastattn.use_backend("eager"):
            found = fastattn.attention_summary(*(x.to(dtype) for x in tensors), **(options | {"attn_mask": mask}))
        for got, wanted in zip((found.entropy, found.max_weight, found.distance), expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
        weights_reference.check_argmax(found.argmax, weight, tolerance)


def test_eager_takes_the_queries_in_parts(monkeypatch) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 37, 8), torch.randn(2, 2, 29, 8)
    mask = torch.randn(2, 1, 37, 29)
    from fastattn.backends.eager import attention_summary as eager

    with fastattn.use_backend("eager"):
        whole = fastattn.attention_summary(query, key, mask, enable_gqa=True)
        monkeypatch.setattr(eager, "_MOST_SCORES", 5 * 2 * 4 * 29)
        parts = fastattn.attention_summary(query, key, mask, enable_gqa=True)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_numbers_mean(isa: str) -> None:
    """Equal scores: log n, 1 / n, the first key, the mean distance. One key far ahead: 0, 1, that key, its distance."""
    zeros = torch.zeros(1, 1, 5, 4)
    found = fastattn.attention_summary(zeros, zeros, is_causal=True)
    n = torch.arange(1, 6).float()
    torch.testing.assert_close(found.entropy[0, 0], n.log())
    torch.testing.assert_close(found.max_weight[0, 0], 1 / n)
    torch.testing.assert_close(found.distance[0, 0], (n - 1) / 2)
    assert not found.argmax.any()
    mask = torch.zeros(5, 5)
    mask[:, 3] = 1000.0
    found = fastattn.attention_summary(zeros, zeros, mask)
    assert (found.entropy == 0.0).all()
    assert (found.max_weight == 1.0).all()
    assert (found.argmax == 3).all()
    assert found.distance[0, 0].tolist() == [3.0, 2.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_shape", [None, (3, 1, 1, 500), (1, 4, 300, 500)])
def test_bits_do_not_depend_on_threads(isa, same_bits_at_any_thread_count, dtype, mask_shape) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(3, 4, 300, 40).to(dtype), torch.randn(3, 2, 500, 40).to(dtype)
    mask = None if mask_shape is None else torch.randn(mask_shape)
    with fastattn.use_backend("cpu"):
        same_bits_at_any_thread_count(
            lambda: list(fastattn.attention_summary(query, key, mask, enable_gqa=True, window=(400, 100)))
        )


@needs_linux
def test_memory_does_not_grow_with_the_matrix_of_weights() -> None:
    """8192 tokens, whose (seq, seq) matrix is 256 MiB."""
    query, key = torch.randn(1, 1, 8192, 8), torch.randn(1, 1, 8192, 8)
    with fastattn.use_backend("cpu"):
        fastattn.attention_summary(query[:, :, :64], key[:, :, :64])
        assert most_memory_of(lambda: fastattn.attention_summary(query, key)) < 8 << 20


def test_eager_has_a_part_of_the_matrix_at_a_time() -> None:
    """Counted, not measured: what the allocator gives back to the system, and when, is its own affair."""
    query, key = torch.randn(1, 1, 8192, 8), torch.randn(1, 1, 8192, 8)
    with Allocations() as made:
        BACKENDS["eager"]["attention_summary"].forward(query, key, None, None, 1.0, -1, -1, 0, 0.0)
    assert 0 < made.largest <= 4 << 20  # the places of half a million scores


@pytest.mark.parametrize("scale", [1e8, 1e20])
def test_huge_scores(isa: str, scale: float) -> None:
    """The greatest takes all weight, and nothing overflows on the way to it."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 300, 8)
    with fastattn.use_backend("cpu"):
        found = fastattn.attention_summary(query, key, scale=scale)
    place = (query.double() @ key.double().mT).argmax(dim=-1)
    assert torch.equal(found.argmax, place)
    torch.testing.assert_close(found.max_weight, torch.ones(1, 2, 9))
    torch.testing.assert_close(found.entropy, torch.zeros(1, 2, 9), rtol=0, atol=1e-6)
    position = torch.arange(9) + 300 - 9
    torch.testing.assert_close(found.distance, (position - place).abs().float())


def test_a_mask_of_the_lowest_float(isa: str) -> None:
    """Models mask with it as well as with -inf: a row that has nothing else spreads over all keys."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 300, 8)
    mask = torch.full((9, 300), torch.finfo(torch.float32).min)
    mask[1:, 7:] = 0.0
    verify.check(fastattn.attention_summary, query, key, mask, backend="cpu").raise_if_failed()


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    where=st.sampled_from(("query", "key", "attn_mask")),
)
def test_nan_and_infinity_propagate_as_in_eager(isa: str, seed: int, dtype: torch.dtype, where: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    given = {
        "query": torch.randn(1, 2, 20, 24, generator=generator).to(dtype),
        "key": torch.randn(1, 2, 140, 24, generator=generator).to(dtype),
        "attn_mask": torch.randn(2, 20, 140, generator=generator),
    }
    given[where] = with_specials(given[where], generator)
    verify.check(fastattn.attention_summary, *given.values(), backend="cpu").raise_if_failed()
    found = fastattn.attention_summary(*given.values())
    assert torch.equal(found.argmax == -1, found.max_weight.isnan() | (found.max_weight == 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("floating", [False, True])
def test_padding_is_never_read(isa: str, dtype: torch.dtype, floating: bool) -> None:
    """To the bit those of a batch with zeros there; and keys are counted with the padding before them."""
    torch.manual_seed(0)
    query, key = (torch.randn(3, 2, n, 40).to(dtype) for n in (200, 300))
    mask = torch.zeros(3, 1, 1, 300, dtype=torch.bool)
    mask[0, ..., :170], mask[1, ..., 37:] = True, True  # padded on the right, on the left, and nothing but padding
    given = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf) if floating else mask
    off = ~mask.transpose(-2, -1)
    with fastattn.use_backend("cpu"):
        found, expected = (
            fastattn.attention_summary(query, key.masked_fill(off, padding), given) for padding in (torch.nan, 0.0)
        )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert (found.argmax[1] >= 37).all()
    assert (found.argmax[2] == -1).all()
    assert not any(x[2].any() for x in (found.entropy, found.max_weight, found.distance))


def test_no_graph_is_recorded() -> None:
    query, key = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(2))
    mask = torch.randn(5, 5, requires_grad=True)
    for backend in ("cpu", "eager"):
        with fastattn.use_backend(backend):
            found = fastattn.attention_summary(query, key, mask)
        assert not any(x.requires_grad for x in found)


def test_no_argument_reaches_the_kernel_unchecked() -> None:
    outputs = {name: torch.empty(2, 4, 5) for name in ("entropy", "max_weight", "distance")}
    good = {"query": torch.randn(2, 4, 5, 6), "key": torch.randn(2, 2, 7, 6), "attn_mask": torch.zeros(2, 4, 5, 7)}
    good |= {"alibi_slopes": torch.ones(4), "scale": 1.0, "window_left": 3, "window_right": -1, "diagonal": 0}
    good |= {"softcap": 0.0, "argmax": torch.empty(2, 4, 5, dtype=torch.int64), **outputs}
    tensors = (torch.randn(2, 4), torch.randn(3, 3, 5, 6), torch.randn(2, 4, 5, 6).double(), "text", 3)
    tensors += (torch.ones(2, 4, 5, 6, dtype=torch.int64), torch.empty(2, 4, 5, 6, device="meta"))
    wrong = dict.fromkeys(("query", "key"), (None, *tensors))
    wrong |= dict.fromkeys(outputs, (None, *tensors, torch.empty(2, 4, 6), torch.empty(2, 4, 1).expand(2, 4, 5)))
    wrong["argmax"] = (None, *tensors, torch.empty(2, 4, 5), torch.empty(2, 4, 5, dtype=torch.int32))
    wrong |= {"attn_mask": tensors, "alibi_slopes": (*tensors[1:], torch.ones(3), torch.ones(4).half())}
    wrong |= dict.fromkeys(("scale", "window_left", "window_right", "diagonal", "softcap"), (None, "text"))
    check_refused(_native.C.attention_summary_forward, good, wrong)
    for far in (2**62, -(2**62)):
        _native.C.attention_summary_forward(**(good | {"window_left": far, "window_right": far, "diagonal": far}))


@pytest.mark.parametrize(
    ("query", "why"),
    [
        (torch.randn(1, 2, 3, 4, dtype=torch.float64), "float64"),
        (torch.empty(1, 2, 3, 4, device="meta"), "CPU"),
    ],
)
def test_unsupported_says_why(query: torch.Tensor, why: str) -> None:
    assert why in attention_summary.unsupported(query, query, None, None, 1.0, -1, -1, 0, 0.0)

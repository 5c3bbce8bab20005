"""Attention in Triton, forward and backward, against the eager definition."""

import itertools

import pytest
import torch
from attention_cases import AttentionCase, attention_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import with_specials
from triton_backend import DEVICE, DTYPES, OWN, check, chips, dtypes, needs_triton

import fastattn
from fastattn.backends.eager import dropout as eager_dropout
from fastattn.backends.triton.chips import CHIPS
from fastattn.backends.triton.configs import choose

pytestmark = needs_triton

KERNELS = ("attention_forward", "attention_backward_rows", "attention_backward_query", "attention_backward_key")

# Less than a tile, a tile's edges, and several tiles.
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from((0, 1, 2, 64, 65)))
HEAD_DIMS = st.one_of(st.integers(1, 40), st.sampled_from((64, 80)))
cases = attention_cases(DTYPES, LENGTHS, HEAD_DIMS, most_scores=3_000)


@settings(max_examples=16)
@given(case=cases, chip=chips)
def test_outputs_and_gradients_obey_the_numerics_rule(case: AttentionCase, chip: str) -> None:
    check(fastattn.attention, chip, *case.tensors, **case.options)


def rows_of_the_table() -> list[tuple[str, torch.dtype, int, bool]]:
    """A chip, dtype, head_dim, and whether more is in a score than a product, for each set of tiles that attention takes."""
    found: dict[tuple, tuple[str, torch.dtype, int, bool]] = {}
    for chip, dtype, head_dim, more in itertools.product(OWN, DTYPES, (64, 128, 256), (False, True)):
        rows = (choose(kernel, CHIPS[chip], dtype, 2 * head_dim if more else head_dim) for kernel in KERNELS)
        tiles = tuple(tuple(row.tiles.values()) for row in rows)
        found.setdefault((dtype, head_dim, more, tiles), (chip, dtype, head_dim, more))
    return list(found.values())


@pytest.mark.parametrize(("chip", "dtype", "head_dim", "more"), rows_of_the_table())
def test_every_row_of_the_table(chip: str, dtype: torch.dtype, head_dim: int, more: bool) -> None:
    """A block and a part of one along both sides, of the widest heads, too."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, head_dim).to(dtype).requires_grad_() for n in (20, 70, 70))
    mask = torch.randn(20, 70, requires_grad=True) if more else None
    check(fastattn.attention, chip, query, key, value, mask, dropout_p=0.2 if more else 0.0, return_lse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, (None, 0), (40, 30), (0, 0)])
def test_several_blocks_of_each_side_and_a_mask_with_a_gradient(dtype: torch.dtype, window) -> None:
    """Every loop of every kernel runs more than once, and the heads of a group add to the same keys."""
    torch.manual_seed(0)
    query = torch.randn(1, 2, 140, 24).to(dtype).requires_grad_()
    key, value = (torch.randn(1, 1, 200, 24).to(dtype).requires_grad_() for _ in range(2))
    mask = torch.randn(140, 200, requires_grad=True)
    options = {"enable_gqa": True, "window": window, "return_lse": True, "dropout_p": 0.2}
    check(fastattn.attention, "sm_90", query, key, value, mask, **options)


@given(
    shape=st.tuples(*(st.booleans() for _ in range(4))),
    q=st.sampled_from((5, 40)),
    k=st.sampled_from((1, 70)),
    dtype=dtypes,
    chip=chips,
    causal=st.booleans(),
)
@settings(max_examples=6)
def test_a_masks_gradient_is_summed_over_its_broadcast_dimensions(shape, q, k, dtype, chip, causal) -> None:
    generator = torch.Generator().manual_seed(q + k)
    query, key, value = (torch.randn(2, 2, n, 16, generator=generator).to(dtype) for n in (q, k, k))
    sizes = [n if full else 1 for n, full in zip((2, 2, q, k), shape, strict=True)]
    mask = torch.randn(sizes, generator=generator).to(dtype).requires_grad_()
    check(fastattn.attention, chip, query, key, value, mask, is_causal=causal, return_lse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [6.0, 100.0])
@pytest.mark.parametrize("k", [100, 160])
def test_large_scores_keep_their_gradients(dtype: torch.dtype, magnitude: float, k: int) -> None:
    """One key has almost all the weight: what is left of its gradient is below the roundings of lse and out."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 32) for n in (9, k, k))
    leaves = [x.to(dtype).requires_grad_() for x in (query * magnitude, key, value)]
    check(fastattn.attention, "sm_90", *leaves, scale=0.5, return_lse=True)


@pytest.mark.parametrize("scale", [1e8, 1e10, 1e20])
def test_huge_scores(scale: float) -> None:
    """Scores so large that their own roundings are more than an exponential's range: the greatest takes all weight."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, device=DEVICE) for n in (9, 300, 300))
    with fastattn.use_backend("triton"):
        out, lse = fastattn.attention(query, key, value, scale=scale, return_lse=True)
    score = query.double() @ key.double().mT * scale
    torch.testing.assert_close(lse.double(), score.logsumexp(-1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(out, (score.softmax(-1) @ value.double()).float())


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -(2.0**127)])
def test_a_mask_of_the_lowest_float(lowest: float) -> None:
    """Models mask with it as well as with -inf. A row that has nothing else gives the mean of the values, as in eager."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (9, 300, 300))
    mask = torch.full((9, 300), lowest)
    mask[1:, 7:] = 0.0
    mask[2, 7:] = torch.finfo(torch.float32).min  # lower still, or the same
    check(fastattn.attention, "sm_90", query, key, value, mask, return_lse=True)


@given(
    p=st.sampled_from((0.1, 0.5, 0.999, 1.0)), seed=st.integers(-(2**63), 2**63 - 1), q=st.integers(1, 120), chip=chips
)
@settings(max_examples=8)
def test_dropout_drops_what_eager_drops(p: float, seed: int, q: int, chip: str) -> None:
    """With equal scores and the unit matrix for values, the output is the dropped weights themselves."""
    from fastattn.backends.triton import attention
    from fastattn.backends.triton.chips import use_chip

    heads, k = 2, 130
    query, key = (torch.zeros(1, heads, n, 8, device=DEVICE) for n in (q, k))
    value = torch.eye(k, device=DEVICE).expand(1, heads, k, k)
    seed_tensor = torch.tensor([seed], device=DEVICE)
    with use_chip(chip):
        out, _ = attention.forward(query, key, value, None, None, seed_tensor, 1.0, -1, -1, 0, 0.0, p)
    rows = torch.arange(heads * q, device=DEVICE).reshape(1, heads, q)
    keep = eager_dropout.keep_mask(seed_tensor, rows, k, p)
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(out, keep / k / (1 - p) if p < 1 else torch.zeros_like(out))


@given(
    seed=st.integers(0, 1000),
    dtype=dtypes,
    where=st.sampled_from(("query", "key", "value", "attn_mask")),
    q=st.sampled_from((1, 3, 20)),
    chip=chips,
)
@settings(max_examples=8)
def test_nan_and_infinity_propagate_as_in_eager(seed: int, dtype: torch.dtype, where: str, q: int, chip: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    given = {
        "query": torch.randn(1, 2, q, 24, generator=generator).to(dtype),
        "key": torch.randn(1, 2, 40, 24, generator=generator).to(dtype),
        "value": torch.randn(1, 2, 40, 24, generator=generator).to(dtype),
        "attn_mask": torch.randn(2, q, 40, generator=generator),
    }
    given[where] = with_specials(given[where], generator)
    check(fastattn.attention, chip, *(x.requires_grad_() for x in given.values()))


@pytest.mark.parametrize("k", [60, 300])
def test_a_query_without_keys_gets_zeros_in_both_directions(k: int) -> None:
    query, key, value = (torch.randn(1, 2, n, 16, device=DEVICE, requires_grad=True) for n in (50, k, k))
    mask = torch.ones(50, k, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    with fastattn.use_backend("triton"):
        out, lse = fastattn.attention(query, key, value, mask, return_lse=True)
    assert not out[0, :, 1].any()
    assert (lse[0, :, 1] == -torch.inf).all()
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert not grads[0][0, :, 1].any()
    assert all(g.isfinite().all() for g in grads)


def test_blocks_outside_the_band_are_not_visited() -> None:
    """What stands there, NaN even, leaves no trace."""
    query, key, value = (torch.randn(1, 1, 300, 16, device=DEVICE) for _ in range(3))
    key[:, :, 128:], value[:, :, 128:] = torch.nan, torch.nan
    with fastattn.use_backend("triton"):
        out = fastattn.attention(query, key, value, is_causal=True)
    assert out[:, :, :128].isfinite().all()
    assert out[:, :, 128:].isnan().all()


def test_the_output_is_stored_with_its_heads_together() -> None:
    query, key, value = (torch.randn(2, 3, 5, 8, device=DEVICE) for _ in range(3))
    with fastattn.use_backend("triton"):
        out = fastattn.attention(query, key, value)
    assert out.transpose(1, 2).is_contiguous()


def test_unsupported_says_why() -> None:
    wide = torch.empty(1, 1, 2, 264, device=DEVICE)
    assert "at most 256 features" in fastattn.explain("attention", wide, wide, wide).reasons["triton"]
    double = wide.double()
    assert "not in float64" in fastattn.explain("attention", double, double, double).reasons["triton"]

"""Attention on the CPU, dense, forward and backward, against the eager definition."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import AttentionCase, attention_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import most_memory_of, needs_linux
from norm_cases import DTYPES, check_refused, with_specials

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native, attention
from fastattn.backends.eager import dropout as eager_dropout


@settings(max_examples=150)
@given(case=attention_cases())
def test_outputs_and_gradients_obey_the_numerics_rule(isa: str, case: AttentionCase) -> None:
    verify.check(fastattn.attention, *case.tensors, backend="cpu", **case.options).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_real_sizes_against_torchs_own(dtype: torch.dtype, causal: bool, head_dim: int) -> None:
    """More blocks of queries and keys than the drawn cases have, judged by torch's function instead of ours."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 700, 3, head_dim).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))

    def torchs(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    def ours(query, key, value):
        return fastattn.attention(query, key, value, is_causal=causal)

    verify.check(ours, query, key, value, backend="cpu", eager=torchs).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "q", "k"), [(2, 4, 2, 300, 500), (1, 4, 1, 800, 300), (1, 8, 1, 1, 900)]
)
@pytest.mark.parametrize("mask_shape", ["1hqk", "11qk", "bh1k"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_bits_do_not_depend_on_threads(
    isa, same_bits_at_any_thread_count, dtype, batch, heads, kv_heads, q, k, mask_shape, dropout_p
) -> None:
    torch.manual_seed(0)
    query = torch.randn(batch, heads, q, 40).to(dtype)
    key, value = (torch.randn(batch, kv_heads, k, 40).to(dtype) for _ in range(2))
    sizes = {"1": 1, "b": batch, "h": heads, "q": q, "k": k}
    inputs = [query, key, value, torch.randn([sizes[letter] for letter in mask_shape])]

    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        leaves = [x.detach().requires_grad_() for x in inputs]
        with fastattn.use_backend("cpu"):
            out, lse = fastattn.attention(*leaves, dropout_p, enable_gqa=True, window=(600, 100), return_lse=True)
        finite = lse[lse.isfinite()]
        return [out, lse, *torch.autograd.grad(out.float().square().sum() + finite.sum(), leaves)]

    same_bits_at_any_thread_count(run)


@needs_linux
def test_the_matrix_of_scores_is_never_formed() -> None:
    """Forward and backward over 8192 tokens: the (seq, seq) matrix alone would be 256 MiB."""
    query, key, value = (torch.randn(1, 1, 8192, 8, requires_grad=True) for _ in range(3))
    with fastattn.use_backend("cpu"):
        assert most_memory_of(lambda: fastattn.attention(query, key, value).sum().backward()) < 64 << 20


@pytest.mark.parametrize("scale", [1e8, 1e10, 1e20])
@pytest.mark.parametrize("q", [3, 9])
def test_huge_scores(isa: str, scale: float, q: int) -> None:
    """Scores so large that their own roundings are more than an exponential's range: the greatest takes all weight."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8) for n in (q, 300, 300))
    with fastattn.use_backend("cpu"):
        out, lse = fastattn.attention(query, key, value, scale=scale, return_lse=True)
    score = query.double() @ key.double().mT * scale
    torch.testing.assert_close(lse.double(), score.logsumexp(-1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(out, (score.softmax(-1) @ value.double()).float())


@pytest.mark.parametrize("q", [3, 9])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -(2.0**127)])
def test_a_mask_of_the_lowest_float(isa: str, q: int, lowest: float) -> None:
    """Models mask with it as well as with -inf. A row that has nothing else gives the mean of the values, as in eager."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (q, 300, 300))
    mask = torch.full((q, 300), lowest)
    mask[1:, 7:] = 0.0
    mask[2, 7:] = torch.finfo(torch.float32).min  # lower still, or the same
    verify.check(fastattn.attention, query, key, value, mask, return_lse=True, backend="cpu").raise_if_failed()


@given(p=st.sampled_from((0.1, 0.5, 0.999, 1.0)), seed=st.integers(-(2**63), 2**63 - 1), q=st.integers(1, 120))
def test_dropout_drops_what_eager_drops(isa: str, p: float, seed: int, q: int) -> None:
    """With equal scores and the unit matrix for values, the output is the dropped weights themselves."""
    heads, k = 2, 130
    query, key, value = torch.zeros(1, heads, q, 8), torch.zeros(1, heads, k, 8), torch.eye(k).expand(1, heads, k, k)
    seed_tensor = torch.tensor([seed])
    out, _ = attention.forward(query, key, value, None, None, seed_tensor, 1.0, -1, -1, 0, 0.0, p)
    keep = eager_dropout.keep_mask(seed_tensor, torch.arange(heads * q).reshape(1, heads, q), k, p)
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(out, keep / k / (1 - p) if p < 1 else torch.zeros_like(out))


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    where=st.sampled_from(("query", "key", "value", "attn_mask")),
    q=st.sampled_from((1, 3, 20)),
)
def test_nan_and_infinity_propagate_as_in_eager(isa: str, seed: int, dtype: torch.dtype, where: str, q: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    given = {
        "query": torch.randn(1, 2, q, 24, generator=generator).to(dtype),
        "key": torch.randn(1, 2, 40, 24, generator=generator).to(dtype),
        "value": torch.randn(1, 2, 40, 24, generator=generator).to(dtype),
        "attn_mask": torch.randn(2, q, 40, generator=generator),
    }
    given[where] = with_specials(given[where], generator)
    leaves = [x.requires_grad_() for x in given.values()]
    verify.check(fastattn.attention, *leaves, backend="cpu").raise_if_failed()


def test_a_query_without_keys_gets_zeros_in_both_directions(isa: str) -> None:
    for q in (3, 50):
        query, key, value = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (q, 60, 60))
        mask = torch.ones(q, 60, dtype=torch.bool)
        mask[1] = False
        with fastattn.use_backend("cpu"):
            out, lse = fastattn.attention(query, key, value, mask, return_lse=True)
        assert not out[0, :, 1].any()
        assert (lse[0, :, 1] == -torch.inf).all()
        grads = torch.autograd.grad(out.square().sum(), (query, key, value))
        assert not grads[0][0, :, 1].any()
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [3, 200])
@pytest.mark.parametrize("floating", [False, True])
def test_padding_is_never_read(isa: str, dtype: torch.dtype, q: int, floating: bool) -> None:
    """Whatever stands in padded keys and values: outputs and gradients are to the bit those of a batch with zeros there."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 40).to(dtype) for n in (q, 300, 300))
    mask = torch.zeros(3, 1, 1, 300, dtype=torch.bool)
    mask[0, ..., :170], mask[1, ..., 37:] = True, True  # padded on the right, on the left, and nothing but padding
    off = ~mask.transpose(-2, -1)
    given = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf) if floating else mask

    def run(padding: float) -> list[torch.Tensor]:
        padded = (x.masked_fill(off, padding) for x in (key, value))
        leaves = [x.clone().requires_grad_() for x in (query, *padded)]
        with fastattn.use_backend("cpu"):
            out = fastattn.attention(*leaves, given)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    for found, expected in zip(run(torch.nan), run(0.0), strict=True):
        assert torch.equal(found, expected)


def test_the_output_is_stored_with_its_heads_together(isa: str) -> None:
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    out = fastattn.attention(query, key, value)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("query", "why"),
    [
        (torch.randn(1, 2, 3, 4, dtype=torch.float64), "float64"),
        (torch.empty(1, 2, 3, 4, device="meta"), "CPU"),
    ],
)
def test_unsupported_says_why(query: torch.Tensor, why: str) -> None:
    assert why in attention.unsupported(query, query, query, None, None, None, 1.0, -1, -1, 0, 0.0, 0.0)


def forward_arguments() -> dict:
    tensors = {name: torch.randn(2, 4, 5, 6) for name in ("query", "key", "value", "out")}
    return {
        **tensors,
        "attn_mask": torch.zeros(2, 4, 5, 5),
        "alibi_slopes": torch.ones(4),
        "seed": torch.tensor([1]),
        "lse": torch.empty(2, 4, 5),
        "scale": 1.0,
        "window_left": 3,
        "window_right": -1,
        "diagonal": 0,
        "softcap": 0.0,
        "dropout_p": 0.5,
    }


WRONG_TENSORS = (
    torch.randn(2, 4),
    torch.randn(2, 4, 7, 7),
    torch.randn(3, 3, 5, 6),
    torch.randn(2, 4, 5, 6).double(),
    torch.ones(2, 4, 5, 6, dtype=torch.int64),
    torch.empty(2, 4, 5, 6, device="meta"),
    "text",
    3,
)


def test_no_argument_reaches_the_kernel_unchecked() -> None:
    good = forward_arguments()
    wrong = dict.fromkeys(("query", "key", "value", "out", "lse"), (None, *WRONG_TENSORS))
    wrong["attn_mask"] = WRONG_TENSORS
    wrong["alibi_slopes"] = (*WRONG_TENSORS[1:], torch.ones(3), torch.ones(4).half())
    wrong["seed"] = (None, torch.tensor([1, 2]), torch.tensor([1.0]), 1)
    wrong["dropout_p"] = (None, "text", float("nan"), -0.1, 1.5)
    wrong |= dict.fromkeys(("scale", "window_left", "window_right", "diagonal", "softcap"), (None, "text"))
    wrong["out"] += (torch.randn(2, 4, 1, 6).expand(2, 4, 5, 6),)
    check_refused(_native.C.attention_forward, good, wrong)


@pytest.mark.parametrize("far", [2**62, -(2**62)])
def test_far_windows_and_diagonals_do_not_overflow(far: int) -> None:
    arguments = forward_arguments() | {"window_left": far, "window_right": far, "diagonal": far}
    _native.C.attention_forward(**arguments)

"""The eager backend is the definition, so it is held to independent ones: torch's own functions, and other formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn.backends.eager import dropout


@pytest.fixture(autouse=True)
def eager():
    torch.manual_seed(0)
    with fastattn.use_backend("eager"):
        yield


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_torchs(is_causal: bool, mask: str, kv_heads: int) -> None:
    query, key, value = draw(2, 4, 5, 8), draw(2, kv_heads, 7, 8), draw(2, kv_heads, 7, 3)
    attn_mask = {"none": None, "bool": torch.rand(2, 1, 5, 7) > 0.4, "float": draw(4, 5, 7)}[mask]
    if attn_mask is not None and is_causal:
        lower = torch.ones(5, 7, dtype=torch.bool).tril()
        both = attn_mask & lower if mask == "bool" else attn_mask.masked_fill(~lower, -math.inf)
        expected = F.scaled_dot_product_attention(query, key, value, both, enable_gqa=True)
    else:
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, enable_gqa=True)
    actual = fastattn.attention(query, key, value, attn_mask, 0.0, is_causal, enable_gqa=True)
    close(actual, torch.nan_to_num(expected))


def test_a_query_without_keys_gets_zeros_in_both_directions() -> None:
    query, key, value = (draw(1, 1, 3, 4).requires_grad_() for _ in range(3))
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    for form in (mask, torch.zeros(3, 3, dtype=torch.float64).masked_fill(~mask, -math.inf).requires_grad_()):
        out, lse = fastattn.attention(query, key, value, form, return_lse=True)
        assert torch.equal(out[0, 0, 1], torch.zeros(4, dtype=torch.float64))
        assert lse[0, 0, 1] == -math.inf
        grads = torch.autograd.grad(out.sum() + lse[0, 0, ::2].sum(), [query, key, value])
        assert all(torch.isfinite(g).all() for g in grads)
        assert torch.equal(grads[0][0, 0, 1], torch.zeros(4, dtype=torch.float64))


def test_window_softcap_and_alibi_follow_their_formulas() -> None:
    query, key, value = draw(1, 2, 4, 8), draw(1, 2, 6, 8), draw(1, 2, 6, 8)
    slopes = torch.tensor([0.5, 0.25])
    score = query @ key.mT / math.sqrt(8)
    score = 3.0 * torch.tanh(score / 3.0)
    for h in range(2):
        for i in range(4):
            for j in range(6):
                distance = i + 2 - j
                score[0, h, i, j] -= slopes[h].double() * abs(distance)
                if distance > 2 or distance < -1:
                    score[0, h, i, j] = -math.inf
    out, lse = fastattn.attention(query, key, value, window=(2, 1), softcap=3.0, alibi_slopes=slopes, return_lse=True)
    close(out, score.softmax(-1) @ value)
    close(lse, score.logsumexp(-1))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=4), st.booleans())
def test_varlen_is_attention_sequence_by_sequence(lengths: list[tuple[int, int]], is_causal: bool) -> None:
    cu_q, cu_k = (torch.tensor([0, *sizes]).cumsum(0).to(torch.int32) for sizes in zip(*lengths, strict=True))
    query, key, value = draw(int(cu_q[-1]), 4, 8), draw(int(cu_k[-1]), 2, 8), draw(int(cu_k[-1]), 2, 3)
    slopes = torch.rand(4)
    out, lse = fastattn.attention_varlen(
        query, key, value, cu_q, cu_k, 5, 6, is_causal=is_causal, alibi_slopes=slopes, return_lse=True
    )
    for b in range(len(lengths)):
        q = slice(int(cu_q[b]), int(cu_q[b + 1]))
        k = slice(int(cu_k[b]), int(cu_k[b + 1]))
        one = [x.transpose(0, 1)[None] for x in (query[q], key[k], value[k])]
        window = (None, 0) if is_causal else None
        expected, expected_lse = fastattn.attention(
            *one, enable_gqa=True, window=window, alibi_slopes=slopes, return_lse=True
        )
        close(out[q], expected[0].transpose(0, 1))
        close(lse[:, q], expected_lse[0])


@pytest.mark.parametrize("paged", [False, True])
def test_kvcache_is_attention_to_what_was_appended(paged: bool) -> None:
    lengths, new, capacity, block = torch.tensor([3, 0], dtype=torch.int32), 2, 8, 4
    keys, values = draw(2, 2, capacity, 8), draw(2, 2, capacity, 3)
    k, v, query = draw(2, 2, new, 8), draw(2, 2, new, 3), draw(2, 4, new, 8)
    if paged:
        table = torch.tensor([[3, 0], [2, 1]], dtype=torch.int32)
        k_cache, v_cache = draw(4, 2, block, 8), draw(4, 2, block, 3)
        for cache, full in ((k_cache, keys), (v_cache, values)):
            for b in range(2):
                for page in range(2):
                    cache[table[b, page]] = full[b, :, page * block : (page + 1) * block]
    else:
        table, k_cache, v_cache = None, keys.clone(), values.clone()
        k_cache[1, :, 5:] = math.nan
        v_cache[1, :, 5:] = math.nan
    out = fastattn.attention_with_kvcache(query, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table)
    for b, length in enumerate(lengths.tolist()):
        key = torch.cat((keys[b, :, :length], k[b]), 1)[None]
        value = torch.cat((values[b, :, :length], v[b]), 1)[None]
        expected = fastattn.attention(query[b : b + 1], key, value, enable_gqa=True, window=(None, 0))
        close(out[b : b + 1], expected)
    if not paged:
        close(k_cache[0, :, 3:5], k[0])
        close(v_cache[1, :, :2], v[1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_kvcache_turns_new_tokens_as_rotary_embedding_does(interleaved: bool) -> None:
    lengths, query = torch.tensor([3, 0], dtype=torch.int32), draw(2, 4, 2, 8)
    k, v, cos, sin = draw(2, 2, 2, 8), draw(2, 2, 2, 3), draw(2, 2, 6), draw(2, 2, 6)
    cache = (draw(2, 2, 6, 8), draw(2, 2, 6, 3))
    fused, apart = ([x.clone() for x in cache] for _ in range(2))
    out = fastattn.attention_with_kvcache(
        query, *fused, k, v, cache_seqlens=lengths, cos=cos, sin=sin, interleaved=interleaved
    )
    turned_query, turned_k = fastattn.rotary_embedding(query, k, cos, sin, interleaved)
    expected = fastattn.attention_with_kvcache(turned_query, *apart, turned_k, v, cache_seqlens=lengths)
    for got, wanted in zip((out, *fused), (expected, *apart), strict=True):
        close(got, wanted)


def test_norms_are_torchs() -> None:
    x, residual, weight, bias = draw(3, 4, 6), draw(3, 4, 6), draw(6), draw(6)
    close(fastattn.layer_norm(x, weight, bias, 1e-3), F.layer_norm(x, (6,), weight, bias, 1e-3))
    close(fastattn.rms_norm(x, weight, 1e-3), F.rms_norm(x, (6,), weight, 1e-3))
    close(fastattn.rms_norm(x), F.rms_norm(x, (6,)))
    normed, total = fastattn.layer_norm(x, weight, bias, residual=residual)
    close(total, x + residual)
    close(normed, F.layer_norm(x + residual, (6,), weight, bias))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("relu", F.relu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("silu", F.silu),
        (None, lambda x: x),
    ],
)
def test_linear_and_feed_forward_are_torchs(name: str | None, reference) -> None:
    x, w1, b1, w2, b2, gate, residual = draw(3, 4), draw(5, 4), draw(5), draw(4, 5), draw(4), draw(5, 4), draw(3, 5)
    close(fastattn.linear(x, w1, b1, name, residual), reference(F.linear(x, w1, b1)) + residual)
    hidden = reference(F.linear(x, w1, b1))
    close(fastattn.feed_forward(x, w1, b1, w2, b2, name), F.linear(hidden, w2, b2))
    gated = reference(F.linear(x, gate)) * F.linear(x, w1, b1)
    close(fastattn.feed_forward(x, w1, b1, w2, b2, name, gate), F.linear(gated, w2, b2))


def test_additive_attention_is_the_sum_over_pairs() -> None:
    query, key, value, w_query, w_key, v = draw(2, 3, 4), draw(2, 5, 6), draw(2, 5, 2), draw(7, 4), draw(7, 6), draw(7)
    mask = torch.rand(2, 3, 5) > 0.4
    mask[1, 2] = False
    score = torch.empty(2, 3, 5, dtype=torch.float64)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                score[b, i, j] = v @ torch.tanh(w_query @ query[b, i] + w_key @ key[b, j])
    expected = torch.nan_to_num(score.masked_fill(~mask, -math.inf).softmax(-1)) @ value
    close(fastattn.additive_attention(query, key, value, w_query, w_key, v, mask), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 6])
def test_rotary_embedding_is_a_complex_product(interleaved: bool, rotary_dim: int) -> None:
    q, k = draw(2, 4, 5, 8), draw(2, 2, 5, 8)
    angle = draw(5, rotary_dim // 2)
    doubled = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    for x, actual in zip(
        (q, k), fastattn.rotary_embedding(q, k, doubled.cos(), doubled.sin(), interleaved), strict=True
    ):
        turned = x[..., :rotary_dim]
        pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).mT
        product = torch.view_as_real(
            torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)
        )
        flat = product.flatten(-2) if interleaved else product.mT.flatten(-2)
        close(actual, torch.cat((flat, x[..., rotary_dim:]), -1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_is_torchs(reduction: str) -> None:
    x, weight, bias, class_weight = draw(2, 3, 4), draw(6, 4), draw(6), torch.rand(6, dtype=torch.float64)
    target = torch.tensor([[0, 5, -1], [2, 2, 4]])
    logits = 2.0 * torch.tanh(F.linear(x, weight, bias) / 2.0)
    expected = F.cross_entropy(
        logits.flatten(0, 1), target.flatten(), class_weight, ignore_index=-1, label_smoothing=0.1, reduction=reduction
    )
    penalty = 0.1 * torch.where(target == -1, 0.0, logits.logsumexp(-1).square()).flatten()
    expected = expected + {"mean": penalty.sum() / 5, "sum": penalty.sum(), "none": penalty}[reduction]
    actual = fastattn.linear_cross_entropy(x, weight, target, bias, -1, 0.1, 0.1, 2.0, class_weight, reduction)
    close(actual, expected.reshape(target.shape) if reduction == "none" else expected)


def test_info_nce_is_the_mean_log_share_of_the_positive() -> None:
    query, positive, negatives = draw(4, 6), draw(4, 6), draw(3, 6)
    share = torch.exp(query @ torch.cat((positive, negatives)).T / 0.5)
    forward = -torch.log(share.diagonal() / share.sum(1)).mean()
    close(fastattn.info_nce(query, positive, negatives, 0.5), forward)
    square = torch.exp(query @ positive.T / 0.5)
    backward = -torch.log(square.diagonal() / square.sum(0)).mean()
    close(fastattn.info_nce(query, positive, negatives, 0.5, symmetric=True), (forward + backward) / 2)


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0.1, 0.5, 0.9]))
def test_dropout_keeps_the_right_share_independently(seed: int, p: float) -> None:
    """Over all, over each row and column, and between neighbours.

    Within seven standard errors, because these are thousands of small samples of a skewed distribution.
    """
    rows, columns = 200, 211
    keep = dropout.keep_mask(torch.tensor([seed]), torch.arange(rows), columns, p).double()
    error = math.sqrt(p * (1 - p))
    assert abs(keep.mean() - (1 - p)) < 7 * error / math.sqrt(keep.numel())
    assert ((keep.mean(0) - (1 - p)).abs() < 7 * error / math.sqrt(rows)).all()
    assert ((keep.mean(1) - (1 - p)).abs() < 7 * error / math.sqrt(columns)).all()
    centred = (keep - (1 - p)) / error
    other = dropout.keep_mask(torch.tensor([seed]) + 1, torch.arange(rows), columns, p).double()
    for a, b in (
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred, (other - (1 - p)) / error),
    ):
        assert abs((a * b).mean()) < 7 / math.sqrt(a.numel())


def test_dropout_scales_what_it_keeps() -> None:
    x = torch.ones(4, 100)
    seed = torch.tensor([7])
    dropped = dropout.dropout(x, seed, 0.25)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(dropout.dropout(x, seed, 1.0), torch.zeros_like(x))
    assert torch.equal(dropout.dropout(x, seed, 0.25), dropped)


def test_the_dropout_hash_is_pinned() -> None:
    """The numbers of the definition in plain Python integers: other backends, and saved seeds, rely on them."""

    def splitmix64(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
        return z ^ z >> 31

    def mix32(x: int) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        return x ^ x >> 16

    seed, p = -1234567890123, 0.3
    expected = torch.empty(5, 9, dtype=torch.bool)
    for row in range(5):
        key = splitmix64((seed + row * 0x9E3779B97F4A7C15) % 2**64)
        for column in range(9):
            u = mix32(column ^ key % 2**32) ^ key >> 32
            expected[row, column] = mix32(u) >= int(p * 2**32)
    assert torch.equal(dropout.keep_mask(torch.tensor([seed]), torch.arange(5), 9, p), expected)

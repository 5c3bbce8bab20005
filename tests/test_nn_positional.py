"""Positional encodings against their formulas, and against Hugging Face's where they have one."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

import fastattn.nn as fnn
from fastattn import ops


@pytest.mark.parametrize("d_model", [1, 2, 7, 16])
def test_sinusoidal_is_its_formula(d_model):
    encoding = fnn.SinusoidalPositionalEncoding(d_model, max_len=50, dtype=torch.float64)
    out = encoding(torch.zeros(50, d_model, dtype=torch.float64))
    for position in (0, 1, 13, 49):
        for i in range(d_model):
            angle = position / 10000 ** (2 * (i // 2) / d_model)
            assert math.isclose(out[position, i], math.cos(angle) if i % 2 else math.sin(angle), abs_tol=1e-12)
    assert not encoding.state_dict()


@pytest.mark.parametrize("make", [fnn.SinusoidalPositionalEncoding, fnn.LearnedPositionalEncoding])
@pytest.mark.parametrize("batch_first", [False, True])
def test_added_encodings_put_each_position_where_it_belongs(make, batch_first):
    torch.manual_seed(0)
    encoding = make(6, max_len=20, batch_first=batch_first)
    n, length = 3, 5
    x = torch.randn((n, length, 6) if batch_first else (length, n, 6))

    def by_batch(y):
        return y if batch_first else y.transpose(0, 1)

    table = encoding.weight
    torch.testing.assert_close(by_batch(encoding(x)), by_batch(x) + table[:length])
    torch.testing.assert_close(by_batch(encoding(x, offset=15)), by_batch(x) + table[15:])
    positions = torch.randint(0, 20, (length,))
    torch.testing.assert_close(by_batch(encoding(x, positions=positions)), by_batch(x) + table[positions])
    each = torch.randint(0, 20, (n, length))
    given_each = each if batch_first else each.T
    torch.testing.assert_close(by_batch(encoding(x, positions=given_each)), by_batch(x) + table[each])
    torch.testing.assert_close(encoding(x[0]), x[0] + table[: len(x[0])])
    assert encoding(x.bfloat16()).dtype == torch.bfloat16

    with pytest.raises(ValueError, match="max_len"):
        encoding(x, offset=16)
    with pytest.raises(ValueError, match="positions"):
        encoding(x, offset=-1)
    with pytest.raises(ValueError, match="d_model"):
        encoding(torch.randn(2, 5))
    with pytest.raises(ValueError, match="positions has shape"):
        encoding(x, positions=torch.zeros(length + 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="integers"):
        encoding(x, positions=torch.zeros(length))
    with pytest.raises(ValueError, match="greater than 0"):
        make(0)


def test_learned_encoding_trains_and_shares_embeddings_state():
    encoding = fnn.LearnedPositionalEncoding(4, max_len=6)
    encoding.load_state_dict(torch.nn.Embedding(6, 4).state_dict())
    encoding(torch.randn(3, 2, 4)).sum().backward()
    torch.testing.assert_close(encoding.weight.grad, torch.tensor([2.0] * 3 + [0.0] * 3)[:, None].expand(6, 4))


def test_added_encodings_drop_out_in_training_alone():
    encoding = fnn.SinusoidalPositionalEncoding(100, dropout=0.4)
    x = torch.ones(50, 8, 100) * 3
    out = encoding(x)
    kept = out != 0
    torch.testing.assert_close(out, torch.where(kept, encoding.eval()(x) / 0.6, 0.0))
    assert abs(float(kept.double().mean()) - 0.6) < 5 * math.sqrt(0.24 / kept.numel())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rotary=st.sampled_from([2, 4, 8]),
    interleaved=st.booleans(),
    offset=st.integers(0, 300),
    length=st.integers(0, 9),
    by_positions=st.booleans(),
)
def test_rotary_turns_each_pair_as_a_complex_number(rotary, interleaved, offset, length, by_positions):
    torch.manual_seed(0)
    module = fnn.RotaryEmbedding(8, rotary, interleaved=interleaved)
    query, key = torch.randn(2, 4, length, 8, dtype=torch.float64), torch.randn(2, 2, length, 8, dtype=torch.float64)
    positions = torch.arange(offset, offset + length)
    given_positions = {"positions": positions.expand(2, -1)} if by_positions else {"offset": offset}
    turned = module(query, key, **given_positions)
    i = torch.arange(rotary // 2)
    angle = positions[:, None] * 10000.0 ** (-2.0 * i.double() / rotary)
    turn = torch.polar(torch.ones_like(angle), angle)
    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary // 2)
    for x, y in zip((query, key), turned, strict=True):
        expected = x.clone()
        product = torch.complex(x[..., first], x[..., second]) * turn
        expected[..., first], expected[..., second] = product.real, product.imag
        # cos and sin are float32.
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)


def test_rotary_is_llamas():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=128)
    query, key = torch.randn(2, 4, 100, 16), torch.randn(2, 4, 100, 16)
    cos, sin = LlamaRotaryEmbedding(config)(query, torch.arange(100)[None])
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    torch.testing.assert_close(fnn.RotaryEmbedding(16)(query, key), expected, rtol=1e-4, atol=1e-4)


def test_rotary_scores_depend_on_distance_alone_also_far_out_in_bfloat16_modules():
    module = fnn.RotaryEmbedding(16).to(torch.bfloat16)
    q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16)
    near, far = (module(q, k, offset=offset) for offset in (0, 30000))
    torch.testing.assert_close(near[0] @ near[1].mT, far[0] @ far[1].mT, rtol=1e-4, atol=1e-4)
    copy.deepcopy(module)


def test_rotary_errors():
    for args in [(8, 3), (8, 10), (8, 0), (7,)]:
        with pytest.raises(ValueError, match="rotary_dim"):
            fnn.RotaryEmbedding(*args)
    module = fnn.RotaryEmbedding(8)
    q = torch.randn(2, 1, 4, 8)
    with pytest.raises(ValueError, match="head_dim"):
        module(torch.randn(2, 1, 4, 6), q)
    with pytest.raises(ValueError, match="offset"):
        module(q, q, offset=-1)
    with pytest.raises(ValueError, match="positions"):
        module(q, q, positions=torch.arange(5))


def reference_slopes(n):
    """get_slopes of the authors' implementation, restated."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    closest = 2 ** math.floor(math.log2(n))
    return reference_slopes(closest) + reference_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 31])
def test_alibi_slopes_are_the_papers(heads):
    torch.testing.assert_close(fnn.ALiBi(heads).slopes, torch.tensor(reference_slopes(heads)))


@pytest.mark.parametrize(("q_len", "k_len"), [(4, 4), (3, 7), (7, 3)])
def test_alibi_bias_is_what_attention_does_with_the_slopes(q_len, k_len):
    torch.manual_seed(0)
    alibi = fnn.ALiBi(3)
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (q_len, k_len, k_len))
    by_slopes = ops.attention(q, k, v, alibi_slopes=alibi.slopes)
    torch.testing.assert_close(ops.attention(q, k, v, attn_mask=alibi(q_len, k_len)), by_slopes)
    with pytest.raises(ValueError, match="num_heads"):
        fnn.ALiBi(0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 20), (8, 10), (64, 1000), (10, 9)])
def test_relative_buckets_are_t5s(bidirectional, buckets, distance):
    module = fnn.RelativePositionBias(2, buckets, distance, bidirectional)
    positions = torch.arange(-2000, 2001)
    expected = T5Attention._relative_position_bucket(positions, bidirectional, buckets, distance)
    assert torch.equal(module.bucket(positions), expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(q_len=st.integers(0, 12), k_len=st.integers(0, 12), offset=st.integers(0, 9), bidirectional=st.booleans())
def test_relative_bias_holds_each_pairs_bucket_and_trains(q_len, k_len, offset, bidirectional):
    torch.manual_seed(0)
    module = fnn.RelativePositionBias(3, 8, 10, bidirectional, dtype=torch.float64)
    weight = module.state_dict(keep_vars=True)["relative_attention_bias.weight"]
    bias = module(q_len, k_len, offset)
    assert bias.shape == (1, 3, q_len, k_len)
    relative = torch.arange(k_len) - torch.arange(offset, offset + q_len)[:, None]
    expected = weight[module.bucket(relative)].permute(2, 0, 1)[None]
    assert torch.equal(bias, expected)
    direction = torch.randn_like(expected)
    a, b = (torch.autograd.grad(x, weight, direction)[0] for x in (bias, expected))
    torch.testing.assert_close(a, b)


def test_relative_bias_trains_through_attention_and_refuses_bad_sizes():
    module = fnn.RelativePositionBias(2)
    q = torch.randn(1, 2, 6, 4)
    ops.attention(q, q, q, attn_mask=module(6)).square().sum().backward()
    assert float(module.relative_attention_bias.weight.grad.abs().sum()) > 0
    for args in [(2, 2), (2, 32, 8), (2, 1, 8, False)]:
        with pytest.raises(ValueError, match="num_buckets"):
            fnn.RelativePositionBias(*args)


def test_rotary_table_of_inference_serves_training():
    """The table outlives the call that made it: it is neither inference mode's nor a fake tensor."""
    rotary, plain = fnn.RotaryEmbedding(8), fnn.RotaryEmbedding(8)
    query, key = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 2, 3, 8)
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(query), mode.from_tensor(key)
        assert [x.shape for x in rotary(*fakes)] == [query.shape, key.shape]
    with torch.inference_mode():
        rotary(query, key)
    found, expected = rotary(query, key)[0], plain(query, key)[0]
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(x.sum(), query)[0] for x in (found, expected)))
    with FakeTensorMode() as mode:
        rotary(mode.from_tensor(query), mode.from_tensor(key))

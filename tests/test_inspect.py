"""Looking inside: weights against the softmax written out, recordings against torch's and Hugging Face's own weights."""

import copy

import pytest
import torch
import transformers
import weights_reference
from attention_cases import AttentionCase, attention_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import Allocations
from model_cases import decoder, encoder, padded
from torch import nn
from transformers_cases import BERT, DISTILBERT, GPT2, LLAMA, T5

import fastattn
from fastattn import _watch
from fastattn.inspect import attention_weights, record
from fastattn.models import EncoderDecoder, EncoderDecoderConfig

# ---- Weights ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(case=attention_cases(), data=st.data())
def test_weights_are_the_softmax_written_out(case: AttentionCase, data: st.DataObject) -> None:
    options = {name: value for name, value in case.options.items() if name not in ("dropout_p", "return_lse")}
    query, key = case.tensors[:2]
    expected = weights_reference.weights(query, key, **options)
    picks = [
        data.draw(st.none() | st.lists(st.integers(-count, count - 1), max_size=4) if count else st.just([]))
        for count in (query.shape[1], query.shape[2])
    ]
    for dim, pick in enumerate(picks):
        if pick is not None:
            index = torch.tensor([i % expected.shape[dim + 1] for i in pick], dtype=torch.int64)
            expected = expected.index_select(dim + 1, index)
    found = attention_weights(query, key, **options, heads=picks[0], rows=picks[1])
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_what_is_not_chosen_is_not_computed() -> None:
    """Two rows of 4096: no tensor has a (seq, seq) matrix's size, nor a tenth of it."""
    query = key = torch.randn(1, 2, 4096, 8)
    mask = torch.zeros(1, 1, 4096, 4096)
    with Allocations() as made:
        attention_weights(query, key, mask, rows=[5, -1])
    assert made.largest <= 2 * 2 * 4096 * 8


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rows": [3]}, ValueError, "rows has 3, but there are 3; expected -3 to 2"),
        ({"heads": [-5]}, ValueError, "heads has -5, but there are 4"),
        ({"rows": 1}, TypeError, "rows is a int; expected a list of ints"),
        ({"heads": ["a"]}, TypeError, "an element of heads is a str"),
        ({"enable_gqa": False}, ValueError, "pass enable_gqa=True"),
        ({"key": torch.randn(2, 2, 5, 7)}, ValueError, "key has head_dim 7"),
        ({"query": "text"}, TypeError, "query is a str"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(changed, error, message) -> None:
    good = {"query": torch.randn(2, 4, 3, 8), "key": torch.randn(2, 2, 5, 8), "enable_gqa": True}
    with pytest.raises(error, match=message):
        attention_weights(**(good | changed))


# ---- Recording -------------------------------------------------------------------------------------------------------


def stack(seen: list[fastattn.inspect.Seen]) -> torch.Tensor:
    """The weights of sequences of one length, (batch, heads, rows, k)."""
    return torch.stack([one.weights for one in seen])


def check_summaries(seen: list[fastattn.inspect.Seen]) -> None:
    """That they are those of the weights."""
    for one in seen:
        assert one.summary is not None
        expected = weights_reference.summary(one.weights.double())
        found = (one.summary.entropy, one.summary.max_weight, one.summary.distance)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
        weights_reference.check_argmax(one.summary.argmax, one.weights)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [None, "padding", "causal"])
def test_multihead_attention_as_torchs(batch_first: bool, need_weights: bool, masked: str | None) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 4, batch_first=batch_first)
    ours = fastattn.nn.MultiheadAttention(24, 4, batch_first=batch_first)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 7, 24) if batch_first else torch.randn(7, 3, 24)
    masks = {
        None: {},
        "padding": {"key_padding_mask": torch.arange(7) >= torch.tensor([[7], [3], [5]])},
        "causal": {"attn_mask": torch.ones(7, 7, dtype=torch.bool).triu(1), "is_causal": True},
    }[masked]
    with record(ours) as seen:
        out, _ = ours(x, x, x, need_weights=need_weights, **masks)
    expected, weights = theirs(x, x, x, average_attn_weights=False, **masks)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(stack(seen[0]), weights)
    check_summaries(seen[0])
    plain, _ = ours(x, x, x, need_weights=need_weights, **masks)
    assert torch.equal(out, plain)


def hugging_face(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, config, arguments = {
        "bert": (transformers.BertModel, transformers.BertConfig, BERT),
        "distilbert": (transformers.DistilBertModel, transformers.DistilBertConfig, DISTILBERT),
        "gpt2": (transformers.GPT2Model, transformers.GPT2Config, GPT2),
        "llama": (transformers.LlamaModel, transformers.LlamaConfig, LLAMA),
        "mistral": (transformers.MistralModel, transformers.MistralConfig, LLAMA | {"sliding_window": 4}),
        "t5": (transformers.T5EncoderModel, transformers.T5Config, T5),
    }[name]
    return kind(config(**arguments)).eval()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "mistral", "t5"])
def test_hugging_faces_models_as_their_output_attentions(name: str, packed: bool) -> None:
    """Chosen layers, heads and rows; with padding, which encoders of BERT's kind leave out."""
    model = hugging_face(name)
    ids, mask, sequences = padded("right")
    given = {"input_ids": ids, "attention_mask": mask} if packed else {"input_ids": ids}
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(**given, output_attentions=True).attentions
    fastattn.accelerate(model)
    with torch.no_grad():
        plain = model(**given).last_hidden_state
        with record(model, layers=[-1], heads=[2, 0], rows=[-1, 0]) as seen:
            out = model(**given).last_hidden_state
    assert len(seen) == 1
    assert not _watch._active
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    assert len(seen[-1]) == len(ids)
    for one, weights, sequence in zip(seen[-1], expected[-1], sequences, strict=True):
        length = one.weights.shape[-1]
        assert length in (ids.shape[1], len(sequence))
        assert one.heads == (2, 0)
        assert one.rows == (length - 1, 0)
        wanted = weights[[2, 0]][:, list(one.rows)]
        if packed and length == ids.shape[1] and length > len(sequence):  # the last row is of padding
            wanted, one = wanted[:, 1:], fastattn.inspect.Seen(one.weights[:, 1:], one.summary, one.heads, one.rows)
        torch.testing.assert_close(one.weights, wanted[..., :length], rtol=1e-4, atol=1e-5)
        assert not wanted[..., length:].any()
        assert one.summary.entropy.shape == (2, length)


def test_only_chosen_layers_leave_the_fast_path(monkeypatch) -> None:
    """Of BERT's layers, which run as one op each, the chosen one runs its parts; and the rest of it is packed as ever."""
    calls = []
    fused = fastattn.ops.encoder_layer
    monkeypatch.setattr(fastattn.ops, "encoder_layer", lambda *a, **k: (calls.append(k), fused(*a, **k))[1])
    model = hugging_face("bert")
    fastattn.accelerate(model)
    ids, mask, sequences = padded("right")
    with torch.no_grad():
        with record(model, ["encoder.layer.1.attention.self"], weights=False) as seen:
            model(ids, mask)
        recorded = len(calls)
        model(ids, mask)
    assert (recorded, len(calls)) == (1, 3)
    assert all(call["cu_seqlens"] is not None for call in calls)
    assert [one.summary.entropy.shape[-1] for one in seen[1]] == list(map(len, sequences))
    assert all(one.weights is None and one.rows == () for one in seen[1])


@pytest.mark.parametrize("training", [False, True])
def test_torchs_transformer_accelerated(training: bool) -> None:
    """With padding: packed at inference, computed in training."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    reference = copy.deepcopy(model).train()
    model.train(training)
    fastattn.accelerate(model)
    x, lengths = torch.randn(3, 6, 32), [6, 2, 4]
    padding = torch.arange(6) >= torch.tensor(lengths)[:, None]
    with torch.set_grad_enabled(training):
        plain = model(x, src_key_padding_mask=padding)
        with record(model, [1]) as seen:
            out = model(x, src_key_padding_mask=padding)
        hidden = reference.layers[0](x, src_key_padding_mask=padding)
        _, expected = reference.layers[1].self_attn(
            hidden, hidden, hidden, key_padding_mask=padding, average_attn_weights=False
        )
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    for one, weights, length in zip(seen[1], expected, lengths, strict=True):
        assert one.weights.shape[-1] == (6 if training else length)
        torch.testing.assert_close(one.weights[:, :length, :length], weights[:, :length, :length])
    check_summaries(seen[1])


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_decoder_with_its_cache_sees_what_it_sees_without(name: str) -> None:
    """Packed prompts, then tokens behind a cache: row for row what one pass over the whole sequence has."""
    model = decoder(name)
    _, _, sequences = padded("right", (5, 9))
    with torch.no_grad(), record(model) as whole:
        for sequence in sequences:
            model(sequence[None])
    prompts = [sequence[:-2] for sequence in sequences]
    ends = torch.tensor([0, 3, 10], dtype=torch.int32)
    with torch.no_grad(), record(model) as parts:
        cache = model.new_cache(2, 8, 8)
        model.prefill(torch.cat(prompts), ends, 7, cache)
        for place in (-2, -1):
            model.decode(torch.stack([sequence[place] for sequence in sequences]).unsqueeze(1), cache)
    for layer in range(2):
        assert len(parts[layer]) == 6  # two sequences, three calls
        for b, expected in enumerate(whole[layer]):
            calls = parts[layer][b::2]
            check_summaries(calls)
            for call in calls:
                rows, keys = call.weights.shape[1:]
                wanted = expected.weights[:, keys - rows : keys, :keys]
                torch.testing.assert_close(call.weights, wanted, rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_shows_its_cross_attention() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder(EncoderDecoderConfig(vocab_size=61, d_model=32, layers=2, heads=4)).eval()
    ids, mask, sequences = padded("right", (7, 4))
    with torch.no_grad(), record(model) as seen:
        model(ids, mask, torch.randint(1, 61, (2, 3)))
    assert len(seen) == 6
    crosses = [name for name in seen if name.endswith("cross")]
    assert len(crosses) == 2
    for name in crosses:
        for one, sequence in zip(seen[name], sequences, strict=True):
            assert one.weights.shape == (4, 3, len(sequence))
            torch.testing.assert_close(one.weights.sum(-1), torch.ones(4, 3))


def test_a_padded_batch_as_its_sequences_alone() -> None:
    model = encoder()
    ids, mask, sequences = padded("right")
    with torch.no_grad(), record(model) as seen:
        model(ids, mask)
    with torch.no_grad(), record(model) as alone:
        for sequence in sequences:
            model(sequence[None])
    for layer in range(2):
        check_summaries(seen[layer])
        for one, expected in zip(seen[layer], alone[layer], strict=True):
            torch.testing.assert_close(one.weights, expected.weights, rtol=1e-4, atol=1e-5)


def test_checkpointed_layers_are_seen_once_and_gradients_stay() -> None:
    model = encoder().train()
    ids = torch.randint(1, 61, (2, 6))

    def run() -> tuple[torch.Tensor, ...]:
        out = torch.utils.checkpoint.checkpoint(lambda: model(ids), use_reentrant=False)
        return torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)

    plain = run()
    with record(model, [0]) as seen:
        found = run()
    assert len(seen[0]) == 2
    assert not seen[0][0].weights.requires_grad
    for a, b in zip(plain, found, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_a_compiled_model_is_seen() -> None:
    model = encoder()
    compiled = torch.compile(model, backend="eager")
    ids = torch.randint(1, 61, (2, 6))
    with torch.no_grad():
        plain = compiled(ids)
        with record(compiled, [1]) as seen:
            compiled(ids)
        with record(model, [1]) as expected:
            model(ids)
        torch.testing.assert_close(compiled(ids), plain)
    assert len(seen[1]) == 2
    torch.testing.assert_close(stack(seen[1]), stack(expected[1]))


def test_errors_say_what_to_do() -> None:
    model = hugging_face("bert")
    with pytest.raises(TypeError, match="model is a str"), record("bert"):
        pass
    with pytest.raises(ValueError, match=r"give it to fastattn\.accelerate first"), record(model):
        pass
    fastattn.accelerate(model)
    missing = r"there is no attention module 'layer\.0'; the model has 'encoder\.layer\.0"
    with pytest.raises(ValueError, match=missing), record(model, ["layer.0"]):
        pass
    with pytest.raises(ValueError, match="layers has 2, but there are 2"), record(model, [2]):
        pass
    ids = torch.ones(1, 4, dtype=torch.int64)
    with record(model, [0], rows=[4]) as seen:
        with pytest.raises(RuntimeError, match="is being recorded already"), record(model):
            pass
        with pytest.raises(KeyError, match="has not attended to anything"):
            seen[0]
        with pytest.raises(KeyError, match="is not recorded"):
            seen[1]
        with pytest.raises(ValueError, match="rows has 4, but there are 4"):
            model(ids)
        with pytest.raises(RuntimeError, match=r"output_attentions=True and fastattn\.inspect\.record"):
            model(ids, output_attentions=True)
    assert not _watch._active
    model(ids)

"""EncoderDecoder: Hugging Face's T5, padded batches as their sequences, gradients, and that it learns."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers_cases
from model_cases import SIZES, VOCAB, assert_close, assert_same, gradients, padded, shake

import fastattn
from fastattn.models import EncoderDecoder, EncoderDecoderConfig

GATED = {"activation": "gelu_tanh", "gated": True, "tied_head": False, "scaled_head": False}
KINDS = pytest.mark.parametrize("fields", [{}, GATED], ids=["t5", "gated"])


def made(fields) -> EncoderDecoder:
    torch.manual_seed(4)
    return shake(EncoderDecoder(EncoderDecoderConfig(**SIZES, decoder_layers=1, head_dim=12, **fields))).eval()


@pytest.mark.parametrize("name", transformers_cases.SEQ2SEQ)
def test_hugging_faces_t5_gives_the_same(name, tmp_path):
    reference = transformers_cases.make(name)
    reference.save_pretrained(tmp_path)
    model = EncoderDecoder.from_pretrained(tmp_path)
    inputs = transformers_cases.batch("right")
    labels = torch.arange(1, 22).reshape(3, 7).index_fill(1, torch.tensor([6]), -100)
    expected = reference(**inputs, labels=labels)
    output = model(**inputs, labels=labels)
    transformers_cases.assert_near(model.logits(output.hidden), expected.logits, "logits")
    transformers_cases.assert_near(output.loss, expected.loss, "loss")
    encoder = reference.encoder.block[0].layer[0].SelfAttention
    decoder = reference.decoder.block[1].layer[1].EncDecAttention
    for ours, theirs in (
        (model.embedding.weight, reference.shared.weight),
        (model.decoder.layers[1].cross.query.weight, decoder.q.weight),
        (model.encoder.bias.relative_attention_bias.weight, encoder.relative_attention_bias.weight),
    ):
        (grad,) = torch.autograd.grad(output.loss, ours, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected.loss, theirs, retain_graph=True)
        transformers_cases.assert_near(grad, expected_grad, "gradient", 5e-5)


@KINDS
def test_a_padded_batch_is_its_sequences_one_by_one(fields):
    model = made(fields)
    ids, mask, sequences = padded("left")
    written, written_mask, written_sequences = padded("right", (3, 6, 2, 5))
    hidden = model(ids, mask, written, written_mask).hidden
    alone = [
        model(a[None], decoder_input_ids=b[None]).hidden[0] for a, b in zip(sequences, written_sequences, strict=True)
    ]
    assert_close(hidden[written_mask.bool()], torch.cat(alone))
    assert not hidden[~written_mask.bool()].any()


@KINDS
def test_gradients_are_those_of_plain_torch_in_float64(fields):
    model = made(fields).train()
    exact = copy.deepcopy(model).double()
    ids, mask, _ = padded("right")
    loss = model(ids, mask, labels=ids[:, :5]).loss
    with fastattn.use_backend("eager"):
        expected = exact(ids, mask, labels=ids[:, :5]).loss
        expected_gradients = gradients(exact, expected)
    assert_close(loss.double(), expected)
    assert_same(gradients(model, loss), expected_gradients, 1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_accumulated_over_parts_are_those_of_the_whole_batch(masked):
    model = made({}).train()
    ids, mask, _ = padded("right")
    mask = mask if masked else torch.ones_like(mask)
    labels = ids[:, :5].clone()
    labels[0, 1:] = -100
    whole = gradients(model, model(ids, mask, labels=labels).loss)
    count = int((labels != -100).sum())
    parts = [slice(0, 1), slice(1, 4)]
    losses = [model(ids[part], mask[part], labels=labels[part], num_items_in_batch=count).loss for part in parts]
    assert_same(gradients(model, sum(losses)), whole, 1e-4)


def test_checkpointing_changes_no_gradient_even_with_dropout():
    model = made({"dropout": 0.2}).train()
    ids, mask, _ = padded("right")
    found = []
    for model.config.checkpoint in (False, True):
        torch.manual_seed(5)
        found.append(gradients(model, model(ids, mask, labels=ids).loss))
    assert_same(found[1], found[0], 1e-6)


@KINDS
def test_it_learns_a_batch_by_heart_and_comes_back(fields, tmp_path):
    torch.manual_seed(0)
    model = EncoderDecoder(EncoderDecoderConfig(**SIZES, **fields))
    ids, mask, _ = padded("right")
    labels = ids.flip(0).masked_fill(~mask.flip(0).bool(), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = model(ids, mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], (losses[0], losses[-1])
    model.save_pretrained(tmp_path)
    found = EncoderDecoder.from_pretrained(tmp_path)
    assert torch.equal(found(ids, mask, labels=labels).loss, model.eval()(ids, mask, labels=labels).loss)


@KINDS
def test_writing_token_by_token_behind_a_cache_is_writing_all_at_once(fields):
    """Also where places come to continue other texts: of the same source, as beams do, and of another one."""
    model = made(fields)
    _, _, sequences = padded("right")
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    cache = model.new_cache(len(sequences), int(lengths.max()), 5)
    found = [model.prefill(torch.cat(sequences), starts, int(lengths.max()), cache)]
    sources, written = list(range(4)), torch.zeros(4, 1, dtype=torch.int64)
    for rows in ([0, 1, 2, 3], [2, 0, 0, 3, 3, 3], [0, 2, 1, 4, 5, 3], [1, 5]):
        cache.reorder(torch.tensor(rows))
        more = torch.randint(VOCAB, (len(rows), 1), generator=torch.Generator().manual_seed(len(rows)))
        sources, written = [sources[row] for row in rows], torch.cat([written[rows], more], dim=1)
        found = [step[rows] for step in found] + [model.decode(more, cache).squeeze(1)]
    whole = [model(sequences[i][None], decoder_input_ids=text[None]).hidden[0] for i, text in zip(sources, written)]
    assert_close(torch.stack(found, dim=1), torch.stack(whole))
    with pytest.raises(ValueError, match="capacity 5"):
        model.decode(more, cache)
    cache = model.new_cache(1, 9, 2)
    with pytest.raises(ValueError, match="call prefill first"):
        model.decode(more[:1], cache)
    with pytest.raises(ValueError, match="2 tokens a sequence"):
        model.decode(more.reshape(1, 2), cache)
    with pytest.raises(ValueError, match="a prompt is empty"):
        model.prefill(sequences[0][:0], torch.tensor([0, 0], dtype=torch.int32), 9, cache)


def test_wrong_input_is_named():
    model = made({})
    ids = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="both None"):
        model(ids)
    with pytest.raises(ValueError, match="decoder_input_ids has batch 1"):
        model(ids, decoder_input_ids=ids[:1])
    with pytest.raises(ValueError, match="decoder_attention_mask has shape"):
        model(ids, decoder_input_ids=ids, decoder_attention_mask=ids[:, 1:])

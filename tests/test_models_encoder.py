"""Encoder and its heads: padded batches as their sequences, Hugging Face's BERT, losses, and that they learn."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
import transformers_cases
from model_cases import HEADS, SIZES, VOCAB, assert_close, assert_same, encoder, gradients, headed, padded, shake

import fastattn
from fastattn.models import Embedder, Encoder, EncoderConfig, SequenceClassifier, SpanAnswerer, TokenTagger
from fastattn.models.heads import POOLINGS, pool

KINDS = pytest.mark.parametrize("kind", HEADS)


@pytest.mark.parametrize("side", ["right", "left", "scattered"])
def test_a_padded_batch_is_its_sequences_one_by_one(side):
    model = encoder()
    ids, mask, sequences = padded(side)
    kinds = ids % 2 * mask
    hidden = model(ids, mask, kinds)
    alone = torch.cat([model(sequence[None], token_type_ids=sequence[None] % 2)[0] for sequence in sequences])
    assert_close(hidden[mask.bool()], alone)
    assert not hidden[~mask.bool()].any()
    assert not torch.allclose(model(ids, mask), hidden)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu_new", "type_vocab_size": 3}])
@pytest.mark.parametrize("model_class", ["BertModel", "BertForMaskedLM"])
def test_hugging_faces_bert_gives_the_same(model_class, changes, tmp_path):
    torch.manual_seed(1)
    config = transformers.BertConfig(**(transformers_cases.BERT | changes))
    reference = shake(getattr(transformers, model_class)(config)).eval()
    reference.save_pretrained(tmp_path)
    model = Encoder.from_pretrained(tmp_path)
    inputs = transformers_cases.batch("right")
    inputs["token_type_ids"] = inputs["input_ids"] % config.type_vocab_size
    kept = inputs["attention_mask"].bool()
    expected = reference.base_model(**inputs).last_hidden_state[kept]
    given = model(**inputs)[kept]
    transformers_cases.assert_near(given, expected)
    upstream = torch.randn_like(given)
    for ours, theirs in (
        (model.embedding, reference.base_model.embeddings.word_embeddings),
        (model.layers[0].feed_forward.linear2, reference.base_model.encoder.layer[0].output.dense),
    ):
        (grad,) = torch.autograd.grad(given, ours.weight, upstream, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected, theirs.weight, upstream, retain_graph=True)
        transformers_cases.assert_near(grad, expected_grad, "gradient", 5e-5)


HUGGING_FACE_HEADS = {
    "BertForSequenceClassification": (SequenceClassifier, 5),
    "BertForTokenClassification": (TokenTagger, 4),
    "BertForQuestionAnswering": (SpanAnswerer, 2),
}
BERT_HEADS = pytest.mark.parametrize("theirs", HUGGING_FACE_HEADS)


def saved_head(theirs, folder, **changes):
    torch.manual_seed(1)
    config = transformers_cases.BERT | {"num_labels": HUGGING_FACE_HEADS[theirs][1], "classifier_dropout": 0.3}
    reference = shake(getattr(transformers, theirs)(transformers.BertConfig(**(config | changes)))).eval()
    reference.save_pretrained(folder)
    return reference


@BERT_HEADS
def test_hugging_faces_heads_give_the_same_scores_and_loss(theirs, tmp_path):
    reference = saved_head(theirs, tmp_path)
    model = HUGGING_FACE_HEADS[theirs][0].from_pretrained(tmp_path)
    inputs = transformers_cases.batch("right")
    kept = inputs["attention_mask"].bool()
    if theirs == "BertForQuestionAnswering":
        labels = torch.tensor([[1, 4], [0, 5], [3, 3]])
        expected = reference(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1])
        given = model(**inputs, labels=labels)
        transformers_cases.assert_near(given.start_logits[kept], expected.start_logits[kept])
        transformers_cases.assert_near(given.end_logits[kept], expected.end_logits[kept])
        expected = reference(**inputs_of_one(inputs), start_positions=labels[:1, 0], end_positions=labels[:1, 1])
        given = model(**inputs_of_one(inputs), labels=labels[:1])  # theirs lets the answer begin in the padding
        head, expected_head = model.head, reference.qa_outputs
    else:
        labels = torch.tensor([4, 0, 2]) if theirs == "BertForSequenceClassification" else inputs["input_ids"] % 4
        if labels.ndim == 2:
            labels = labels.masked_fill(~kept, -100)
        expected, given = reference(**inputs, labels=labels), model(**inputs, labels=labels)
        rows = kept if labels.ndim == 2 else slice(None)
        transformers_cases.assert_near(given.logits[rows], expected.logits[rows])
        assert model.dropout.p == reference.dropout.p == 0.3
        head, expected_head = model.head, reference.classifier
    transformers_cases.assert_near(given.loss, expected.loss)
    for ours, others in (
        (head.weight, expected_head.weight),
        (model.encoder.embedding.weight, reference.bert.embeddings.word_embeddings.weight),
    ):
        (grad,) = torch.autograd.grad(given.loss, ours, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected.loss, others, retain_graph=True)
        transformers_cases.assert_near(grad, expected_grad, "gradient", 5e-5)
    model.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def inputs_of_one(inputs):
    return {"input_ids": inputs["input_ids"][:1]}


@BERT_HEADS
def test_an_encoder_is_read_from_under_a_head_where_that_is_named(theirs, tmp_path):
    reference = saved_head(theirs, tmp_path)
    head = "qa_outputs" if theirs == "BertForQuestionAnswering" else "classifier"
    with pytest.raises(ValueError, match=rf"left over \['{head}.bias', '{head}.weight'\]; leave_out can name"):
        Encoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'lm_head', with which no name"):
        Encoder.from_pretrained(tmp_path, leave_out=[head, "lm_head"])
    with pytest.raises(TypeError, match="expected a list"):
        Encoder.from_pretrained(tmp_path, leave_out=head)
    model = Encoder.from_pretrained(tmp_path, leave_out=[f"{head}."])
    inputs = transformers_cases.batch("right")
    kept = inputs["attention_mask"].bool()
    transformers_cases.assert_near(model(**inputs)[kept], reference.bert(**inputs).last_hidden_state[kept])


@BERT_HEADS
def test_a_head_reads_no_other_head(theirs, tmp_path):
    """A tagger's weights have the names and shapes of a classifier's."""
    saved_head(theirs, tmp_path)
    own = HUGGING_FACE_HEADS[theirs][0]
    for head, _ in HUGGING_FACE_HEADS.values():
        if head is not own:
            with pytest.raises(ValueError, match=f"holds a {theirs}: call {own.__name__}.from_pretrained"):
                head.from_pretrained(tmp_path)
    transformers_cases.make("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a BertModel: call Encoder.from_pretrained"):
        own.from_pretrained(tmp_path)


def test_options_of_heads_that_are_not_supported_are_named(tmp_path):
    saved_head("BertForSequenceClassification", tmp_path, problem_type="regression")
    with pytest.raises(ValueError, match="problem_type='regression'"):
        SequenceClassifier.from_pretrained(tmp_path)
    saved_head("BertForQuestionAnswering", tmp_path, num_labels=3)
    with pytest.raises(ValueError, match="3 scores a token"):
        SpanAnswerer.from_pretrained(tmp_path)


def test_options_of_bert_that_are_not_supported_are_named(tmp_path):
    transformers_cases.make("bert").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"position_embedding_type": "relative_key"}))
    with pytest.raises(ValueError, match="position_embedding_type='relative_key'"):
        Encoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a BertModel: call Encoder"):
        fastattn.models.DecoderLM.from_pretrained(tmp_path)


@KINDS
def test_losses_and_gradients_are_those_of_plain_torch_in_float64(kind):
    model, labels = headed(kind)
    model.train()
    exact = copy.deepcopy(model).double()
    ids, mask, _ = padded("right")
    loss = model(ids, mask, labels=labels).loss
    with fastattn.use_backend("eager"):
        expected = exact(ids, mask, labels=labels).loss
        expected_gradients = gradients(exact, expected)
    assert_close(loss.double(), expected)
    assert_same(gradients(model, loss), expected_gradients, 1e-4)


@KINDS
def test_gradients_accumulated_over_parts_are_those_of_the_whole_batch(kind):
    """Of parts with different numbers of labels."""
    model, labels = headed(kind)
    ids, mask, _ = padded("right")
    labels = labels.masked_fill(~mask.bool(), -100) if kind == "tags" else labels
    count = labels.ne(-100).sum()

    def loss(part: slice) -> torch.Tensor:
        return model(ids[part], mask[part], labels=labels[part], num_items_in_batch=count).loss

    whole = loss(slice(None))
    if kind != "spans":  # which has more first tokens than last ones
        assert_close(whole, model(ids, mask, labels=labels).loss)
    parts = loss(slice(0, 1)) + loss(slice(1, 4))
    assert_same(gradients(model, parts), gradients(model, whole), 1e-4)


def test_losses_are_those_of_the_scores():
    ids, mask, _ = padded("right")
    kept = mask.bool()
    model, labels = headed("tags")
    labels = labels.masked_fill(ids % 5 == 1, -100)
    output = model(ids, mask, labels=labels)
    assert_close(output.loss, F.cross_entropy(output.logits[kept], labels[kept]))
    assert_close(model(ids, labels=labels).loss, F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()))
    model, labels = headed("spans")
    output = model(ids, mask, labels=labels)
    each = []
    for scores, places in ((output.start_logits, labels[:, 0]), (output.end_logits, labels[:, 1])):
        rows = zip(scores, mask.sum(1).tolist(), places.tolist(), strict=True)
        chosen = [row[:length].log_softmax(0)[place] for row, length, place in rows if place >= 0]
        each.append(-torch.stack(chosen).mean())
    assert_close(output.loss, sum(each) / 2)


def test_the_best_span_is_the_best_of_all_that_are_short_enough():
    model, _ = headed("spans")
    ids, mask, sequences = padded("right")
    output = model(ids, mask)
    for longest in (1, 3, 9):
        for row, sequence in enumerate(sequences):
            spans = [(i, j) for i in range(len(sequence)) for j in range(i, min(i + longest, len(sequence)))]
            best = max(spans, key=lambda span: output.start_logits[row, span[0]] + output.end_logits[row, span[1]])
            assert tuple(output.best_spans(longest)[row].tolist()) == best


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_sees_the_tokens_and_no_padding(pooling, side):
    ids, mask, sequences = padded(side)
    model = Embedder.from_encoder(encoder(), pooling=pooling)
    given = model(ids, mask)
    assert_close(given, torch.cat([model(sequence[None]) for sequence in sequences]))
    assert_close(given.norm(dim=1), torch.ones(len(ids)))
    model.config.normalise = False
    rows = [model.encoder(sequence[None])[0] for sequence in sequences]
    take = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[pooling]
    assert_close(model(ids, mask), torch.stack([take(row) for row in rows]))
    assert not pool(torch.zeros(1, 3, 4), torch.zeros(1, 3), pooling).any()


def test_an_embedders_loss_is_that_of_its_pairs():
    model = Embedder.from_encoder(encoder(), pooling="mean")
    ids, mask, _ = padded("right")
    query, positive = {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids.flip(1)}
    scores = model(**query) @ model(**positive).T / 0.1
    expected = (F.cross_entropy(scores, torch.arange(4)) + F.cross_entropy(scores.T, torch.arange(4))) / 2
    assert_close(model.contrastive_loss(query, positive, 0.1, symmetric=True), expected)


@KINDS
def test_a_head_learns_a_batch_by_heart_and_comes_back(kind, tmp_path):
    head, fields, labels = HEADS[kind]
    torch.manual_seed(2)
    model = head.from_encoder(Encoder(EncoderConfig(**SIZES)), dropout=0.05, **fields)
    ids, mask, _ = padded("right")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = model(ids, mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], (losses[0], losses[-1])
    model.save_pretrained(tmp_path)
    found = head.from_pretrained(tmp_path)
    assert found.config == model.config
    assert torch.equal(found(ids, mask, labels=labels).loss, model.eval()(ids, mask, labels=labels).loss)


def test_checkpointing_changes_no_gradient_even_with_dropout():
    model = encoder(dropout=0.2, attention_dropout=0.1).train()
    ids, mask, _ = padded("right")
    found = []
    for model.config.checkpoint in (False, True):
        torch.manual_seed(5)
        found.append(gradients(model, model(ids, mask).square().mean()))
    assert_same(found[1], found[0], 1e-6)


def test_wrong_input_is_named():
    model, _ = headed("spans")
    ids = torch.ones(2, 4, dtype=torch.int64)
    for expected, message, call in (
        (TypeError, "input_ids has dtype", lambda: model(ids.double())),
        (ValueError, "token_type_ids has shape", lambda: model(ids, token_type_ids=ids[:1])),
        (ValueError, "25 tokens but max_positions is 24", lambda: model(ids.new_ones(1, 25))),
        (ValueError, r"labels has shape \(2,\); expected \(batch, 2\)", lambda: model(ids, labels=ids[:, 0])),
        (ValueError, "pooling is 'sum'", lambda: Embedder.from_encoder(model.encoder, pooling="sum")),
        (ValueError, "heads to divide d_model", lambda: EncoderConfig(VOCAB, 30, 1, 4)),
    ):
        with pytest.raises(expected, match=message):
            call()

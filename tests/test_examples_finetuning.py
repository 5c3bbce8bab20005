"""The examples that fine-tune MiniLM: their data, their baselines, and each of them run small."""

import math
import random
import string
from collections import Counter

import answer_questions
import classify_topics
import minilm
import pytest
import stdlib_text
import tag_tokens
import torch
from answer_questions import PIECES, Docstring
from hypothesis import given, settings
from hypothesis import strategies as st
from learning import BACKENDS

from fastattn.models import SpanOutput

ITEMS = st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers()), max_size=40)
SENTENCES = st.lists(
    st.lists(st.text(string.ascii_letters, min_size=1, max_size=6), min_size=1, max_size=6).map(" ".join),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def tokenizer():
    return minilm.load_tokenizer()


@given(ITEMS, st.floats(0, 1), st.randoms())
def test_no_module_is_on_both_sides_of_the_split(items, share, generator):
    train, held_out = minilm.split_by_module(items, lambda item: item[0], share)
    assert Counter(train + held_out) == Counter(items)
    assert not {name for name, _ in train} & {name for name, _ in held_out}
    assert len(held_out) <= share * len(items)
    shuffled = generator.sample(items, len(items))
    assert [Counter(part) for part in minilm.split_by_module(shuffled, lambda item: item[0], share)] == [
        Counter(train),
        Counter(held_out),
    ]


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 8), st.integers(0, 3))
def test_every_item_comes_before_any_comes_again(count, batch_size, steps, seed):
    batches = minilm.shuffled_batches(range(count), batch_size, steps, seed)
    assert [len(batch) for batch in batches] == [batch_size] * steps
    order = [item for batch in batches for item in batch]
    for first in range(0, len(order), count):
        assert len(set(order[first : first + count])) == len(order[first : first + count])
    assert batches == minilm.shuffled_batches(range(count), batch_size, steps, seed)


def test_naive_bayes_is_the_formula(tokenizer, monkeypatch):
    monkeypatch.setattr(classify_topics, "AREAS", {"x": "", "y": "", "z": ""})
    generator, vocabulary = random.Random(0), ("file", "socket", "mail", "thread", "number", "zip", "parse")

    def draw(count: int) -> list[classify_topics.Paragraph]:
        texts = [" ".join(generator.choices(vocabulary, k=generator.randint(1, 6))) for _ in range(count)]
        return [classify_topics.Paragraph("m", text, generator.randrange(3)) for text in texts]

    def likeliest(text: str) -> int:
        scores = []
        for area in range(3):
            own = [p.text for p in train if p.area == area]
            # each text begins and ends with a token of the tokenizer's own
            counts = Counter(word for t in own for word in ["[CLS]", *t.split(), "[SEP]"])
            total = counts.total() + len(tokenizer)
            words = sum(math.log((counts[word] + 1) / total) for word in ["[CLS]", *text.split(), "[SEP]"])
            scores.append(words + math.log(len(own) / len(train)))
        return max(range(3), key=scores.__getitem__)

    train, test = draw(30), draw(40)
    right = sum(likeliest(p.text) == p.area for p in test) / len(test)
    assert classify_topics.naive_bayes(train, test, tokenizer) == pytest.approx(right)
    most = Counter(p.area for p in train).most_common(1)[0][0]
    assert classify_topics.majority(train, test) == sum(p.area == most for p in test) / len(test)


SOURCE = '''
import json as j

class Reader:
    def read(self, path, *, limit=10):
        """Not seen."""
        total = 0  # of the lines
        for line in open(path, "r b"):
            total += helper(line.strip(), limit=limit)
        return j.loads(self.state.decode(line), cls=Decoder) if total else None
'''


def test_classes_of_a_function(monkeypatch):
    (function,) = tag_tokens.functions("m", SOURCE)
    found = [
        (word, tag_tokens.CLASSES[kind])
        for word, kind in zip(function.words, function.classes, strict=True)
        if tag_tokens.CLASSES[kind] != "operator"
    ]
    assert found == [
        *[("def", "keyword"), ("read", "function"), ("self", "parameter"), ("path", "parameter")],
        *[("limit", "parameter"), ("10", "number"), ("total", "variable"), ("0", "number")],
        *[
            ("of the lines", "comment"),
            ("for", "keyword"),
            ("line", "variable"),
            ("in", "keyword"),
            ("open", "builtin"),
        ],
        *[("path", "parameter"), ("r b", "string"), ("total", "variable"), ("helper", "global"), ("line", "variable")],
        *[("strip", "method"), ("limit", "argument"), ("limit", "parameter"), ("return", "keyword"), ("j", "module")],
        *[("loads", "method"), ("self", "parameter"), ("state", "attribute"), ("decode", "method")],
        *[("line", "variable"), ("cls", "argument"), ("Decoder", "global"), ("if", "keyword")],
        *[("total", "variable"), ("else", "keyword"), ("None", "keyword")],
    ]


def test_a_subword_has_the_class_of_its_word(tokenizer):
    (function,) = tag_tokens.functions("m", SOURCE)
    batch = tag_tokens.encode([function, function._replace(words=["x_y"], classes=[3])], tokenizer)
    for row, classes in enumerate([function.classes, [3]]):
        for word, label in zip(batch.word_ids(row), batch["labels"][row].tolist(), strict=True):
            assert label == (tag_tokens.IGNORED if word is None else classes[word])
    assert batch["labels"][1].tolist().count(3) == 3  # x, _, y


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=8), min_size=1, max_size=4)
)
def test_the_most_frequent_class_by_itself(rows):
    """What it gets right where it was counted is what the most frequent classes make up."""
    batches = [
        {"input_ids": torch.tensor([[i for i, _ in row]]), "labels": torch.tensor([[k for _, k in row]])}
        for row in rows
    ]
    counts = Counter(pair for row in rows for pair in row)
    best = sum(max(counts[i, k] for k in range(3)) for i in range(4))
    assert tag_tokens.most_frequent(batches, batches, before=0) == pytest.approx(best / counts.total())


DOCSTRINGS = st.lists(
    st.builds(Docstring, st.sampled_from("ab"), st.sampled_from(["m.f", "m.C", "m.C.f"]), SENTENCES.map(tuple)),
    max_size=25,
)


@given(DOCSTRINGS, st.integers(0, 3))
def test_passages_hold_the_answers(docs, seed):
    found = list(answer_questions.passages(docs, seed))
    assert len(found) == sum(sum(doc.module == name for doc in docs) // PIECES for name in "ab")
    for passage in found:
        assert len(passage.questions) == PIECES
        for question in passage.questions:
            assert passage.text[question.start :].startswith(question.answer)
    assert Counter(q.answer for p in found for q in p.questions) <= Counter(doc.sentences[0] for doc in docs)


@settings(max_examples=20)
@given(st.lists(SENTENCES, min_size=PIECES, max_size=PIECES))
def test_places_are_those_of_the_answers(tokenizer, docs):
    (passage,) = answer_questions.passages([Docstring("m", "m.f", tuple(sentences)) for sentences in docs], 0)
    batch = answer_questions.encode([passage, passage], tokenizer)
    asked = [question for row in (passage, passage) for question in row.questions]
    assert batch["passage_of"].tolist() == [0] * PIECES + [1] * PIECES
    for question, row, (first, last) in zip(asked, batch["passage_of"].tolist(), batch["places"].tolist(), strict=True):
        if answer_questions.NO_PLACE not in (first, last):
            start, end = (
                batch["passages"].token_to_chars(row, first).start,
                batch["passages"].token_to_chars(row, last).end,
            )
            assert (start, passage.text[start:end]) == (question.start, question.answer)
        else:
            assert batch["passages"].char_to_token(row, question.start + len(question.answer) - 1) is None

    class Knowing(torch.nn.Module):
        """A model whose scores are the right places."""

        def forward(self, questions, passages, passage_of, places):
            shape = len(passage_of), passages["input_ids"].shape[1]
            start, end = torch.zeros(2, *shape).scatter_(2, places.T.clamp(min=0)[:, :, None], 1.0)
            return SpanOutput(start, end)

    known = [place != answer_questions.NO_PLACE for place in batch["places"][:, 0].tolist()]
    found = answer_questions.answers(Knowing(), [passage, passage], batch)
    assert all(text == question.answer for text, question, sure in zip(found, asked, known, strict=True) if sure)


def test_an_answer_that_was_cut_off_has_no_place(tokenizer):
    docs = [Docstring("m", "m.f", ("many " * 300,))] * PIECES
    batch = answer_questions.encode(list(answer_questions.passages(docs, 0)), tokenizer)
    assert set(batch["places"].flatten().tolist()) == {answer_questions.NO_PLACE}


TEXTS = SENTENCES.map(" ".join)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_scores_of_answers(pairs):
    found, right = zip(*pairs, strict=True)
    f1, exact = answer_questions.word_f1(found, right), answer_questions.exact_match(found, right)
    assert 0 <= exact <= 1
    assert 0 <= f1 <= 1
    assert f1 == pytest.approx(answer_questions.word_f1(right, found))
    assert answer_questions.exact_match(right, right) == 1
    full = sum(bool(answer_questions.words(text)) for text in right) / len(right)
    assert answer_questions.word_f1(right, right) == pytest.approx(full)
    swapped = [
        " ".join(reversed(f"The {text}, a!".split())).upper() for text in right
    ]  # order, capitals, articles: nothing
    assert answer_questions.word_f1(swapped, right) == pytest.approx(full)


EXAMPLES = {  # each example on a few modules, which are quick to read, and short texts
    "classify_topics": (
        classify_topics,
        {"AREAS": {"mail": "smtplib imaplib poplib", "numbers": "fractions statistics random"}, "MAX_TOKENS": 32},
    ),
    "tag_tokens": (
        tag_tokens,
        {"stdlib_sources": lambda: stdlib_text.stdlib_sources(("json", "logging", "wsgiref")), "MAX_TOKENS": 32},
    ),
    "answer_questions": (
        answer_questions,
        {"stdlib_docstrings": lambda: stdlib_text.stdlib_docstrings(("asyncio",)), "MAX_TOKENS": 48, "PIECES": 2},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path, capsys, monkeypatch):
    example, smaller = EXAMPLES[name]
    for attribute, value in smaller.items():
        monkeypatch.setattr(example, attribute, value)
    comparison = example.main(steps=8, batch_size=4, held_out=8, out=tmp_path)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "times as fast" in printed
    assert "modules accelerated" in printed
    assert (
        comparison.largest_difference() < 1e-3
    )  # one seed and one arithmetic: rounding alone, which training amplifies
    for backend in BACKENDS:
        training = comparison[backend]
        assert sum(training.losses[-3:]) < sum(training.losses[:3])
        assert all(0 <= value <= 1 for value in training.metric.values())
        assert training.seconds_per_step > 0

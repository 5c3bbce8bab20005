"""What the tests of denoising share: a vocabulary, a collator of each kind, batches of tokenised text."""

import random

import hypothesis.strategies as st
import pytest
import torch

from fastattn.denoising import CorruptSpans, InfillText, MaskTokens

PAD, BOS, EOS, MASK = range(4)
TEXT = range(4, 150)
SENTINELS = tuple(range(199, 149, -1))
VOCAB = 200
COMMON = {"vocab_size": VOCAB, "pad_id": PAD, "special_ids": (BOS, EOS)}


def make(kind: str, **settings):
    if kind == "spans":
        return CorruptSpans(**({"sentinel_ids": SENTINELS, "eos_id": EOS} | COMMON | settings))
    return {"mask": MaskTokens, "infill": InfillText}[kind](**({"mask_id": MASK} | COMMON | settings))


KINDS = ("mask", "infill", "spans")
LONG = [[BOS, *range(4, 130), EOS], [BOS, *range(30, 100), EOS]]
every_kind = pytest.mark.parametrize("kind", KINDS)
seeds = st.integers(0, 2**32 - 1)
RATIOS = [0.01, 0.15, 0.3, 0.5, 0.9, 1.0]
ratios = st.sampled_from(RATIOS)
# Neighbours of one token alone; special tokens at every edge; long texts.
EDGES = [
    [5],
    [6],
    [],
    [7, 8],
    [BOS, *range(30, 50), EOS, *range(50, 60), EOS, BOS],
    [*range(9, 64)],
    [EOS],
    [9],
    [70, BOS, 71],
]


@st.composite
def texts(draw) -> list[int]:
    """Runs of text between special tokens, or none of either; no token of the text twice, so that each names its place."""
    size = draw(st.one_of(st.integers(0, 4), st.integers(0, 60)))
    numbers = random.Random(draw(seeds)).sample(TEXT, size)
    for place in sorted(draw(st.lists(st.integers(0, size), max_size=3)), reverse=True):
        numbers.insert(place, draw(st.sampled_from([BOS, EOS])))
    return numbers


batches = st.lists(texts(), min_size=1, max_size=5)


def is_text(token: int) -> bool:
    return token in TEXT


def rows(result: dict[str, torch.Tensor], padding: int = 0) -> list[tuple[list[int], list[int]]]:
    """Input and labels of each sequence, without padding, which must be all on the right, and no wider than it must be."""
    assert all(x.dtype == torch.int64 for x in result.values())
    ids, mask, labels = (result[name].tolist() for name in ("input_ids", "attention_mask", "labels"))
    lengths = [sum(row) for row in mask]
    assert all(row == [1] * n + [0] * (len(row) - n) for row, n in zip(mask, lengths))
    assert all(set(row[n:]) <= {PAD} for row, n in zip(ids, lengths))
    assert result["input_ids"].shape[1] == max(lengths, default=0)
    return [(row[:n], label) for row, label, n in zip(ids, labels, lengths)]


def spoken(labels: list[int]) -> list[int]:
    """Labels without the padding, which must be on the right."""
    kept = [token for token in labels if token != -100]
    assert labels == kept + [-100] * (len(labels) - len(kept))
    return kept


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

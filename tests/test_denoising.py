"""Denoising: what was corrupted can be told back exactly, only text is, and as often as the distributions say."""

import copy
import itertools
import math
import pickle
import struct
from multiprocessing.reduction import ForkingPickler

import hypothesis.strategies as st
import pytest
import torch
from denoising_cases import (
    BOS,
    EDGES,
    EOS,
    LONG,
    MASK,
    PAD,
    RATIOS,
    SENTINELS,
    TEXT,
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
from hypothesis import example, given
from torch.utils.data import DataLoader


@given(batches, ratios, seeds)
@example(EDGES, 0.01, 1)
@example(EDGES, 0.5, 1)
@example(EDGES, 1.0, 1)
def test_masked_text_can_be_restored_and_the_number_masked_is_exact(batch, ratio, seed):
    for original, (ids, labels) in zip(batch, rows(make("mask", mask_ratio=ratio, seed=seed)(batch))):
        chosen = [place for place, label in enumerate(labels) if label != -100]
        assert [labels[i] if i in chosen else ids[i] for i in range(len(ids))] == original
        assert all(is_text(original[i]) and (ids[i] == MASK or is_text(ids[i]) or ids[i] in SENTINELS) for i in chosen)
        size = sum(map(is_text, original))
        assert len(chosen) == min(size, max(1, round(size * ratio)))


def parts(tokens: list[int]) -> tuple[list[int], list[list[int]]]:
    """Special tokens, and what stands before, between and behind them."""
    special, between = [], [[]]
    for token in tokens:
        if token in (BOS, EOS):
            special.append(token)
            between.append([])
        else:
            between[-1].append(token)
    return special, between


def gaps(part: list[int], original: list[int]) -> list[tuple[int, int]]:
    """(masks, tokens they stand for) in each place where there are masks. Raises where the rest is not the original's."""
    found, masks, place = [], 0, 0
    for token in [*part, None]:
        if token == MASK:
            masks += 1
            continue
        end = len(original) if token is None else original.index(token, place)
        assert masks > 0 or end == place
        if masks:
            found.append((masks, end - place))
        masks, place = 0, end + 1
    return found


SPANS = [1.0, 2.5, 3.0, 20.0]
every_ratio_and_span = pytest.mark.parametrize(("ratio", "mean_span"), list(itertools.product(RATIOS, [0.3, *SPANS])))


@given(batches, ratios, st.sampled_from([0.3, *SPANS]), seeds)
def test_infilled_text_is_the_original_but_for_masks_that_stand_for_spans(batch, ratio, mean_span, seed):
    check_infilled(batch, ratio, mean_span, seed)


@every_ratio_and_span
def test_texts_at_the_edge_are_infilled(ratio, mean_span):
    check_infilled(EDGES, ratio, mean_span, seed=1)


def check_infilled(batch, ratio, mean_span, seed):
    collate = make("infill", mask_ratio=ratio, mean_span=mean_span, seed=seed)
    for original, (ids, labels) in zip(batch, rows(collate(batch))):
        assert spoken(labels) == original
        (special, kept), (given_special, given) = parts(ids), parts(original)
        assert special == given_special
        found = [gap for part, whole in zip(kept, given, strict=True) for gap in gaps(part, whole)]
        size = sum(map(is_text, original))
        assert sum(tokens for _, tokens in found) == math.ceil(round(size * ratio, 6))


def float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def noise_and_spans(size: int, density: float, mean_span: float) -> tuple[int, int]:
    """As random_spans_noise_mask counts, in float32; and what we add for one token and for little text."""
    noise = max(1, min(max(round(float32(float32(density) * size)), 1), size - 1))
    return noise, min(max(round(float32(noise / float32(mean_span))), 1), max(size - noise, 1))


@given(batches, ratios, st.sampled_from(SPANS), seeds, st.sampled_from([None, EOS]))
def test_sentinels_stand_for_what_the_labels_say(batch, density, mean_span, seed, eos):
    check_spans(batch, density, mean_span, seed, eos)


@every_ratio_and_span
def test_spans_of_texts_at_the_edge_are_corrupted(ratio, mean_span):
    check_spans(EDGES, ratio, max(mean_span, 1.0), seed=1, eos=EOS)


def check_spans(batch, density, mean_span, seed, eos):
    more = {"sentinel_ids": tuple(range(199, 150, -1)), "eos_id": eos}
    collate = make("spans", noise_density=density, mean_span=mean_span, seed=seed, **more)
    for original, (ids, labels) in zip(batch, rows(collate(batch))):
        said = spoken(labels)
        size = sum(map(is_text, original))
        if size and eos is not None:
            assert said.pop() == eos
        spans: dict[int, list[int]] = {}
        for token in said:
            if token in SENTINELS:
                spans[token] = span = []
            else:
                span.append(token)
        used = [token for token in ids if token in SENTINELS]
        assert used == list(spans) == list(SENTINELS[: len(used)])
        assert [part for token in ids for part in spans.get(token, [token])] == original
        if not size:
            assert not said
            continue
        noise, count = noise_and_spans(size, density, mean_span)
        assert all(len(span) and all(map(is_text, span)) for span in spans.values())
        assert sum(map(len, spans.values())) == noise
        inner = len([part for part in parts(original)[1] if part])
        assert count <= len(spans) <= count + inner - 1  # each special token inside may cut one
        if inner == 1:
            text = [token for token in ids if token not in (BOS, EOS)]
            assert text[-1] in SENTINELS
            assert size == 1 or is_text(text[0])
            assert all(a in TEXT or b in TEXT for a, b in itertools.pairwise(text))


def test_noise_is_counted_as_random_spans_noise_mask_counts():
    sizes = list(range(1, 700))
    collate = make("spans", vocab_size=1000, sentinel_ids=range(999, 600, -1))
    result = collate([[7] * size for size in sizes])
    for size, (ids, _) in zip(sizes, rows(result)):
        noise, spans = noise_and_spans(size, 0.15, 3.0)
        assert (ids.count(7), len(ids)) == (size - noise, size - noise + spans)
    assert noise_and_spans(190, 0.15, 3.0)[0] == 29  # in float64 it would be 28


# Frequencies. A bound of five standard deviations is passed by chance once in two million tests; the seeds are fixed besides.
FAR = 5.0


def assert_binomial(observed: int, trials: int, p: float) -> None:
    assert abs(observed - trials * p) <= FAR * math.sqrt(trials * p * (1 - p)), (observed, trials, p)


def assert_multinomial(observed: list[int], probabilities: list[float]) -> None:
    """Pearson's chi-square below its quantile at FAR standard deviations (Wilson and Hilferty 1931)."""
    total, freedom = sum(observed), len(observed) - 1
    expected = [total * p for p in probabilities]
    assert min(expected) >= 5
    assert math.isclose(sum(probabilities), 1.0)
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected))
    assert chi_square <= freedom * (1 - 2 / (9 * freedom) + FAR * math.sqrt(2 / (9 * freedom))) ** 3, observed


def uniform(n: int) -> list[float]:
    return [1 / n] * n


def test_of_the_chosen_80_10_10_become_masks_random_tokens_and_themselves():
    batch = torch.full((300, 200), 7)
    result = make("mask", seed=3)(batch)
    ids = result["input_ids"][result["labels"] != -100]
    ordinary = VOCAB - 4
    assert len(ids) == 300 * 30
    masks, same = int((ids == MASK).sum()), int((ids == 7).sum())
    by_chance = 0.1 / ordinary  # random, and the original
    assert_multinomial([masks, same, len(ids) - masks - same], [0.8, 0.1 + by_chance, 0.1 - by_chance])
    drawn = make("mask", seed=3, mask_replace_prob=0.0, random_replace_prob=1.0)(batch)
    counts = drawn["input_ids"][drawn["labels"] != -100].bincount(minlength=VOCAB)
    assert counts[[PAD, BOS, EOS, MASK]].tolist() == [0] * 4
    assert_multinomial(counts[4:].tolist(), uniform(ordinary))


def test_all_places_and_pairs_of_places_are_masked_as_often():
    chosen = make("mask", mask_ratio=1 / 3, seed=4)(torch.full((9000, 6), 7))["labels"] == 7
    patterns = (chosen.long() * 2 ** torch.arange(6)).sum(1).unique(return_counts=True)[1]
    assert_multinomial(patterns.tolist(), uniform(math.comb(6, 2)))


def test_all_segmentations_into_spans_are_as_frequent():
    collate = make(
        "spans", noise_density=0.4, seed=5
    )  # of 12 tokens 5 noise, in 2 spans: 4 ways to cut it, 6 for the text
    ids = collate(torch.arange(10, 22).expand(9000, 12))["input_ids"]
    patterns = ids.unique(dim=0, return_counts=True)[1]
    assert_multinomial(patterns.tolist(), uniform(4 * 6))


def test_lengths_of_infilled_spans_are_poisson_distributed():
    # Masks with a neighbour on either side, that is, nearly all: what they stand for is known, and no matter of the layout.
    collate = make("infill", vocab_size=40_000, mask_ratio=0.1, seed=6)
    counts = [0] * 9
    masks = 0
    for _ in range(3):
        original = list(range(4, 40_000))
        ((ids, _),) = rows(collate([original]))
        masks += ids.count(MASK)
        for together, tokens in gaps(ids, original):
            if together == 1:
                counts[min(tokens, 8)] += 1
    poisson = [math.exp(-3) * 3**k / math.factorial(k) for k in range(8)]
    assert_multinomial(counts, [*poisson, 1 - sum(poisson)])
    # The number of spans until they cover so many tokens: renewals, whose variance is tokens · variance / mean³.
    covered = 3 * math.ceil(39_996 * 0.1)
    assert abs(masks - covered / 3) <= FAR * math.sqrt(covered * 3 / 27) + 3


def test_the_share_to_infill_is_not_rounded_up_for_its_last_bit():
    assert 0.07 * 100 > 7
    ((ids, _),) = rows(make("infill", mask_ratio=0.07)([[*range(4, 104)]]))
    assert sum(token in TEXT for token in ids) == 93


def test_empty_spans_lie_between_any_two_tokens_and_at_the_ends():
    # Of 3 tokens 1 goes. Where the first span is empty and the second is not, 4 slots hold 2 tokens and 2 masks, and where
    # the masks do not touch, either can be the empty one's.
    ids = make("infill", mask_ratio=0.3, mean_span=1.0, seed=8)(torch.tensor([[5, 6, 7]]).expand(9000, 3))["input_ids"]
    ids = ids[(ids == MASK).sum(1) == 2][:, :4]
    outcomes, counts = ids.unique(dim=0, return_counts=True)
    touching = (outcomes[:, 1:] == MASK) & (outcomes[:, :-1] == MASK)
    assert_multinomial(counts.tolist(), [1 / 6 if any(pair) else 1 / 12 for pair in touching.tolist()])


def test_infilled_spans_lie_anywhere_alike():
    collate = make("infill", mask_ratio=0.4, mean_span=1000.0, seed=7)  # a single span of 4 of 10 tokens
    ids = collate(torch.arange(10, 20).expand(4000, 10))["input_ids"]
    assert ids.shape == (4000, 7)
    assert_multinomial((ids == MASK).sum(0).tolist(), uniform(7))


# Seeds


@every_kind
def test_a_seed_says_it_all_and_torchs_generator_nothing(kind):
    before = torch.get_rng_state()
    first = [make(kind, seed=1)(LONG), make(kind, seed=2)(LONG)]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1234)
    collate = make(kind, seed=1)
    assert same(collate(LONG), first[0])
    assert not same(collate(LONG), first[0])  # drawn anew
    assert not same(first[1], first[0])


@every_kind
def test_a_state_goes_on_where_it_was_saved(kind):
    collate = make(kind, seed=1)
    collate(LONG)
    state, twins = (
        collate.state_dict(),
        [copy.deepcopy(collate), copy.copy(collate), pickle.loads(pickle.dumps(collate))],
    )
    twins.append(pickle.loads(ForkingPickler.dumps(collate)))  # as it goes to a spawned worker, and no memory is shared
    assert not any(x.is_shared() for x in vars(collate).values() if isinstance(x, torch.Tensor))
    expected = [collate(LONG) for _ in range(2)]
    other = make(kind, seed=99)
    other.load_state_dict(state)
    for twin in [*twins, other]:
        assert all(same(twin(LONG), result) for result in expected)
    with pytest.raises(ValueError, match="expected generator alone"):
        other.load_state_dict({"seed": 3})


def epochs(collate, workers: int, seed: int = 5, persistent: bool = False) -> list[dict[str, torch.Tensor]]:
    """Two epochs of four batches of the same text; batches come from the workers in turn."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        [LONG[0]] * 8, 2, collate_fn=collate, num_workers=workers, generator=generator, persistent_workers=persistent
    )
    return [batch for _ in range(2) for batch in loader]


@every_kind
def test_workers_draw_differently_and_reproducibly(kind):
    collate = make(kind, seed=1)
    state = collate.state_dict()["generator"]
    batches = epochs(collate, workers=2)
    assert torch.equal(state, collate.state_dict()["generator"])
    assert not any(same(a, b) for i, a in enumerate(batches) for b in batches[:i])
    torch.rand(3)  # torch's generator has no part in it
    assert all(map(same, batches, epochs(make(kind, seed=1), workers=2)))
    if kind == "mask":
        assert not any(map(same, batches, epochs(make(kind, seed=2), workers=2)))
        assert not any(map(same, batches, epochs(make(kind, seed=1), workers=2, seed=6)))
        lasting = epochs(make(kind, seed=1), workers=2, persistent=True)
        assert all(map(same, batches[:4], lasting[:4]))
        assert not any(map(same, lasting[:4], lasting[4:]))
        alone = make(kind, seed=1)
        assert all(map(same, epochs(make(kind, seed=1), workers=0), [alone([LONG[0]] * 2) for _ in range(8)]))

"""BART's text infilling."""

from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from fastattn.ops import _checks

from .collator import IGNORED, at_least
from .units import UnitCollator, Units, choose

SHORTEST = 0.1  # of mean spans: below, nearly all spans would be empty, and the text be lost among masks


class InfillText(UnitCollator):
    """Replaces spans of each text by one mask token each, and a decoder is to write the whole text: Lewis et al. 2020,
    section 2.2, "Text Infilling".

    Lengths of spans are drawn from the Poisson distribution of mean 3 until ceil(mask_ratio · n) of a text's n tokens are
    covered, at least 1; the last span is cut so that it is that many. An empty span puts a mask token between two others.
    So far as in the authors' code (fairseq's denoising task, which counts words: whole_words=True). There, spans may run into
    each other, so that fewer tokens go; here they do not overlap, all ways to lay them out are equally likely, and the share
    is exact. They may touch. A span that meets a special token is cut by it in two, with a mask on either side.

    The input is shorter than the text, mostly; where empty spans outweigh the others it can be longer by a few tokens.

    Called with a batch (see `Collator`) it returns int64 tensors:
        input_ids: (batch, seq), the corrupted text. Padding of the batch is gone; there is padding anew.
        attention_mask: (batch, seq), 0 at the padding.
        labels: (batch, target), the original with its special tokens, padded with -100.

    Args:
        mask_id: the mask token.
        vocab_size, pad_id, special_ids, pad_to_multiple_of, seed: see `Collator`; mask_id is special without being named.
        mask_ratio: share of the text that spans cover.
        mean_span: of the Poisson distribution, in tokens (or words).
        whole_words, continuation_ids: whether spans are of words, and how they are told; see `UnitCollator`.

    Raises:
        TypeError: arguments, or a batch, of the wrong kind.
        ValueError: a ratio outside 0 to 1, a mean_span below 0.1; tokens outside the vocabulary.
    """

    def __init__(
        self,
        *,
        mask_id: int,
        vocab_size: int,
        pad_id: int,
        special_ids: Iterable[int] = (),
        mask_ratio: float = 0.3,
        mean_span: float = 3.0,
        whole_words: bool = False,
        continuation_ids: Iterable[int] | None = None,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            whole_words=whole_words,
            continuation_ids=continuation_ids,
            vocab_size=vocab_size,
            pad_id=pad_id,
            special_ids=special_ids,
            pad_to_multiple_of=pad_to_multiple_of,
            seed=seed,
        )
        self.mask_id = self._mask_token(mask_id)
        self._special[self.mask_id] = True
        _checks.probability("mask_ratio", mask_ratio)
        self.mask_ratio, self.mean_span = float(mask_ratio), at_least(SHORTEST, "mean_span", mean_span)

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        given = self._read_units(batch).without_padding()
        text = self._text(given)
        before, gone, after = self._spans(self._units(given, text), text)
        parts = before + (~gone).long() + after  # what each token becomes: masks, itself unless it is gone, masks
        source = torch.repeat_interleave(torch.arange(len(parts)), parts)
        place = torch.arange(len(source)) - (parts.cumsum(0) - parts)[source]
        itself = (place == before[source]) & ~gone[source]
        ids = given.ids[source].where(itself, self.mask_id)
        lengths = given.count(parts)
        return {
            "input_ids": self._padded(ids, lengths, self.pad_id),
            "attention_mask": self._padded(torch.ones_like(ids), lengths, 0),
            "labels": self._padded(given.ids, given.lengths, IGNORED),
        }

    def _spans(self, units: Units, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each token how many masks come before it, whether it is gone, and how many masks come after it."""
        # A corrupted text is a row of slots: a unit that stays, or a mask for a span of some length.
        budget = (units.counts.double() * self.mask_ratio - 1e-9).ceil().long()  # 0.07 · 100 is above 7
        span_lengths, spans = self._span_lengths(budget)
        slots = units.counts - budget + spans
        places, used = choose(spans, slots, self._draws())
        width = torch.arange(int(slots.max()) if len(slots) else 0)
        holds = (width < slots.unsqueeze(1)).long()  # units in each slot
        is_mask = torch.zeros_like(holds, dtype=torch.bool)
        rows = used.nonzero(as_tuple=True)[0]
        holds[rows, places[used]] = span_lengths[used]
        is_mask[rows, places[used]] = True

        gone_units = torch.repeat_interleave(is_mask.flatten(), holds.flatten())
        begins = (holds.flatten().cumsum(0) - holds.flatten()).view_as(holds)  # the unit that follows what came before
        at_end = begins == units.counts.cumsum(0).unsqueeze(1)
        before, after = (torch.zeros(len(text), dtype=torch.int64) for _ in range(2))
        one = torch.ones((), dtype=torch.int64)
        first_tokens = units.tokens[units.first]
        before.index_put_((first_tokens[begins[is_mask & ~at_end]],), one, accumulate=True)
        last_tokens = units.tokens[units.first + units.sizes - 1]
        after.index_put_((last_tokens[begins[is_mask & at_end] - 1],), one, accumulate=True)

        gone = torch.zeros_like(text)
        gone[units.tokens] = gone_units[units.of]
        resumed = gone & (before == 0)  # inside a span: where a special token stands before, the span was cut
        resumed[1:] &= ~text[:-1]
        return before + resumed.long(), gone, after

    def _span_lengths(self, budget: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, most) lengths, int64, that come to the budget, and (batch,), how many of them count."""
        most = int(budget.max()) if len(budget) else 0
        expected = most / self.mean_span
        step = int(expected + 4 * sqrt(expected)) + 4 if most else 0  # enough for nearly all rows
        rates = torch.full((len(budget), step), self.mean_span)
        lengths = torch.poisson(rates, generator=self._draws()).long()
        while bool((lengths.sum(1) < budget).any()):
            lengths = torch.cat([lengths, torch.poisson(rates, generator=self._draws()).long()], dim=1)
        before = lengths.cumsum(1) - lengths
        left = (budget.unsqueeze(1) - before).clamp(min=0)
        spans = (left > 0).sum(1)
        return lengths.minimum(left)[:, : int(spans.max()) if len(spans) else 0], spans

"""BERT's masked language modelling."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastattn.ops import _checks

from .collator import IGNORED
from .sequences import Sequences
from .units import UnitCollator, choose, within_budget


class MaskTokens(UnitCollator):
    """Chooses 15 % of each text, and an encoder is to say what stood there: Devlin et al. 2019, section 3.1.

    Of the chosen tokens 80 % become the mask token, 10 % a random token and 10 % stay; `labels` has the original of all of
    them. As in the authors' create_pretraining_data.py the number chosen is no matter of chance: round(mask_ratio · n) of a
    text of n tokens (half to even), and at least 1; which they are, and what becomes of each, is. Unlike there, n does not
    count [CLS] and [SEP], and random tokens are never special ones. A random token may be the original, as any other.

    Whole words, too, are chosen as there: in random order, each if it fits into what is left of that number; what becomes of
    each of its tokens is drawn by itself. (Where no word is short enough, the first in that order is chosen all the same.)

    Called with a batch (see `Collator`) it returns, each (batch, seq), int64:
        input_ids: the corrupted tokens, each in its place.
        attention_mask: 0 at the padding.
        labels: the original token at chosen places, -100 elsewhere.
        token_type_ids: if the batch has them.

    Args:
        mask_id: the mask token.
        vocab_size, pad_id, special_ids, pad_to_multiple_of, seed: see `Collator`; mask_id is special without being named.
        mask_ratio: share of the text that is chosen.
        mask_replace_prob, random_replace_prob: of a chosen token to become the mask token, or a random one; else it stays.
        whole_words, continuation_ids: whether words are chosen, and how they are told; see `UnitCollator`.

    Raises:
        TypeError: arguments, or a batch, of the wrong kind.
        ValueError: probabilities outside 0 to 1, or above 1 together; tokens outside the vocabulary.
    """

    def __init__(
        self,
        *,
        mask_id: int,
        vocab_size: int,
        pad_id: int,
        special_ids: Iterable[int] = (),
        mask_ratio: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
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
        for name, p in {
            "mask_ratio": mask_ratio,
            "mask_replace_prob": mask_replace_prob,
            "random_replace_prob": random_replace_prob,
        }.items():
            _checks.probability(name, p)
        if mask_replace_prob + random_replace_prob > 1 + 1e-9:
            raise ValueError(
                f"mask_replace_prob and random_replace_prob are {mask_replace_prob} and {random_replace_prob}, "
                f"{mask_replace_prob + random_replace_prob} together; expected at most 1"
            )
        self.mask_ratio, self.mask_replace_prob = float(mask_ratio), float(mask_replace_prob)
        self.random_replace_prob = float(random_replace_prob)
        self._ordinary = (~self._special).nonzero().squeeze(1)
        if random_replace_prob and not len(self._ordinary):
            raise ValueError(
                "all tokens of the vocabulary are special; expected some to draw random_replace_prob's from"
            )

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        given = self._read_units(batch)
        text = self._text(given)
        chosen = self._chosen(given, text)
        originals = given.ids[chosen]
        ids = given.ids.clone()
        ids[chosen] = self._replaced(originals)
        labels = torch.full_like(ids, IGNORED)
        labels[chosen] = originals
        padded = {
            "input_ids": self._padded(ids, given.lengths, self.pad_id),
            "attention_mask": self._padded(given.kept.long(), given.lengths, 0),
            "labels": self._padded(labels, given.lengths, IGNORED),
        }
        if given.types is not None:
            padded["token_type_ids"] = self._padded(given.types, given.lengths, 0)
        return padded

    def _chosen(self, given: Sequences, text: Tensor) -> Tensor:
        """(chosen,): places of all tokens chosen, ascending."""
        units, tokens = self._units(given, text), given.count(text)
        budget = (tokens.double() * self.mask_ratio).round().long()
        if self.mask_ratio > 0:
            budget = budget.clamp(min=1).minimum(tokens)
        # Words may be passed over, so all of them are put in order; of single tokens as many as are wanted.
        places, there = choose(units.counts if self.whole_words else budget, units.counts, self._draws())
        numbers = places + (units.counts.cumsum(0) - units.counts).unsqueeze(1)
        if self.whole_words:
            sizes = units.sizes[numbers.where(there, 0)]
            taken = within_budget(sizes, there, budget)
            if self.mask_ratio > 0:
                taken[:, :1] |= there[:, :1] & ~taken.any(1, keepdim=True)
        else:
            taken = there
        marked = torch.zeros(len(units.first), dtype=torch.bool)
        marked[numbers[taken]] = True
        return units.tokens[marked[units.of]]

    def _replaced(self, originals: Tensor) -> Tensor:
        fate = torch.rand(len(originals), generator=self._draws())
        replaced = originals.masked_fill(fate < self.mask_replace_prob, self.mask_id)
        if self.random_replace_prob == 0:
            return replaced
        drawn = self._ordinary[torch.randint(len(self._ordinary), originals.shape, generator=self._draws())]
        random = (fate >= self.mask_replace_prob) & (fate < self.mask_replace_prob + self.random_replace_prob)
        return torch.where(random, drawn, replaced)

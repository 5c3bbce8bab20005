"""What is corrupted as one: a token, or a whole word. And the choice of some of them at random."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import tokenizers
from .collator import Collator
from .sequences import WITHOUT_WORD, Sequences

C = TypeVar("C", bound="UnitCollator")


@dataclass(frozen=True)
class Units:
    """The units of all sequences, in order.

    Attributes:
        tokens: (text tokens,): the place of each token of a text, of all tokens there are.
        first: (units,): which of these tokens begins each unit.
        of: (text tokens,): each token's unit.
        counts: (batch,): units in each sequence.
    """

    tokens: Tensor
    first: Tensor
    of: Tensor
    counts: Tensor

    @property
    def sizes(self) -> Tensor:
        """(units,): tokens of each."""
        return self.first.diff(append=torch.tensor([len(self.tokens)]))


class UnitCollator(Collator):
    """A collator that corrupts single tokens or whole words.

    Args:
        whole_words: whether all tokens of a word are corrupted together. What a word is, the sequences' word_ids say (the
            tokenizer's: between spaces and punctuation, mostly), or else
        continuation_ids: the tokens that go on with the word of the token before them; a word also ends at a special token.
        settings: `Collator`'s.
    """

    def __init__(
        self, *, whole_words: bool = False, continuation_ids: Iterable[int] | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.whole_words = bool(whole_words)
        if continuation_ids is not None and not whole_words:
            raise ValueError("continuation_ids is for whole words alone; pass whole_words=True, too, or leave it out")
        self._continues = None
        if continuation_ids is not None:
            self._continues = self._table(self._token("continuation_ids", token) for token in continuation_ids)

    @classmethod
    def from_tokenizer(cls: type[C], tokenizer: Any, *, word_marker: str | None = None, **settings: Any) -> C:
        """As `Collator.from_tokenizer`, with the mask token.

        Args:
            tokenizer: slow or fast.
            word_marker: corrupt whole words and tell them by how the tokenizer writes its pieces: "##" before those that
                continue a word, "Ġ" or "▁" before those that begin one. None: `whole_words=True` goes by word ids.
            settings: the constructor's keyword arguments; those given go before the tokenizer's.
        """
        found: dict[str, Any] = {}
        if "mask_id" not in settings:
            found["mask_id"] = tokenizers.mask_id(tokenizer)
        if word_marker is not None:
            found["whole_words"] = True
            found["continuation_ids"] = tokenizers.continuation_ids(tokenizer, word_marker)
        return super().from_tokenizer(tokenizer, **(found | settings))

    def _read_units(self, batch: Any) -> Sequences:
        return self._read(batch, with_words=self.whole_words and self._continues is None)

    def _units(self, given: Sequences, text: Tensor) -> Units:
        tokens = text.nonzero().squeeze(1)
        if not self.whole_words:
            each = torch.arange(len(tokens))
            return Units(tokens, each, each, given.count(text))
        begins = self._word_begins(given, text)
        of_text = begins[tokens]
        return Units(tokens, of_text.nonzero().squeeze(1), of_text.cumsum(0) - 1, given.count(begins))

    def _word_begins(self, given: Sequences, text: Tensor) -> Tensor:
        """(tokens,), bool: where a word begins."""
        begins = text.clone()
        if self._continues is not None:
            begins[1:] &= ~(text[:-1] & self._continues[given.ids[1:]])
        elif given.words is not None:
            same = (given.words[1:] == given.words[:-1]) & (given.words[1:] != WITHOUT_WORD)
            begins[1:] &= ~(text[:-1] & same)
        starts = (given.lengths.cumsum(0) - given.lengths)[given.lengths > 0]
        begins[starts] = text[starts]
        return begins


def choose(counts: Tensor, sizes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """In each row some of its places, all subsets and orders equally likely.

    Args:
        counts: (batch,): how many, at most sizes.
        sizes: (batch,): of how many.

    Returns:
        places: (batch, largest count), in random order.
        used: (batch, largest count), bool: the first counts of each row. The other places mean nothing.
    """
    width, most = (int(x.max()) if len(x) else 0 for x in (sizes, counts))
    real = torch.arange(width) < sizes.unsqueeze(1)
    keys = torch.full(real.shape, 2.0).masked_scatter_(real, torch.rand(int(sizes.sum()), generator=generator))
    places = keys.topk(most, dim=1, largest=False).indices
    return places, torch.arange(most) < counts.unsqueeze(1)


def within_budget(sizes: Tensor, open: Tensor, budget: Tensor) -> Tensor:
    """Goes through each row and takes what still fits: (batch, n), bool. Where the first is too large already and nothing else
    fits, the first.

    Args:
        sizes: (batch, n), int64, at least 1.
        open: (batch, n), bool: what there is to take.
        budget: (batch,): the largest sum of what is taken.
    """
    taken = torch.zeros_like(open)
    left = budget.unsqueeze(1)
    while bool((open := open & (sizes <= left)).any()):
        # What comes before the first that does not fit; that one and all as large are out, in the next round, for good.
        fits = open & (torch.where(open, sizes, 0).cumsum(1) <= left)
        taken |= fits
        open = open & ~fits
        left = left - (sizes * fits).sum(1, keepdim=True)
    return taken

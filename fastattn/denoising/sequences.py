"""A batch as it was given, read into flat tensors: the tokens of all sequences, one sequence behind the other."""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.ops import _checks

FIELDS = ("attention_mask", "special_tokens_mask", "token_type_ids")
WITHOUT_WORD = -1


@dataclass(frozen=True)
class Sequences:
    """Flat tensors of one element a token.

    Attributes:
        ids: (tokens,), int64.
        lengths: (batch,), int64.
        kept: (tokens,), bool: what is no padding.
        special: (tokens,), bool, where the tokenizer said which tokens are special.
        types: (tokens,), int64: token_type_ids, where given.
        words: (tokens,), int64: numbers of the words, WITHOUT_WORD for none; where asked for.
    """

    ids: Tensor
    lengths: Tensor
    kept: Tensor
    special: Tensor | None
    types: Tensor | None
    words: Tensor | None

    def count(self, numbers: Tensor) -> Tensor:
        """(batch,): the sum, in each sequence, of (tokens,) numbers or flags."""
        return segment_sums(numbers, self.lengths)

    def without_padding(self) -> "Sequences":
        if bool(self.kept.all()):
            return self

        def keep(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[self.kept]

        return replace(
            self,
            ids=self.ids[self.kept],
            lengths=self.count(self.kept),
            kept=self.kept[self.kept],
            special=keep(self.special),
            types=keep(self.types),
            words=keep(self.words),
        )


def segment_sums(numbers: Tensor, lengths: Tensor) -> Tensor:
    """(segments,): sums of consecutive stretches of numbers, an int64 or bool tensor."""
    sums = torch.cat([numbers.new_zeros(1, dtype=torch.int64), numbers.cumsum(0)])
    ends = lengths.cumsum(0)
    return sums[ends] - sums[ends - lengths]


def read(batch: Any, pad_id: int, vocab_size: int, with_words: bool) -> Sequences:
    """Checks a batch and lays it flat. See `Collator` for what it may be."""
    rows = _rows(batch, with_words)
    fields: dict[str, list[Tensor]] = {}
    for index, row in enumerate(rows):
        for name, values in _row(index, row, with_words).items():
            fields.setdefault(name, []).append(values)
    for name, found in fields.items():
        if len(found) != len(rows):
            raise ValueError(
                f"{len(found)} of {len(rows)} sequences of the batch have {name}; expected all or none to have it"
            )

    def flat(name: str) -> Tensor | None:
        return torch.cat(fields[name]) if name in fields else None

    ids = torch.cat(fields["input_ids"]) if rows else torch.empty(0, dtype=torch.int64)
    lengths = torch.tensor([len(x) for x in fields.get("input_ids", ())], dtype=torch.int64)
    _within_vocabulary(ids, lengths, vocab_size)
    attention, special = (_flags(name, flat(name), lengths) for name in ("attention_mask", "special_tokens_mask"))
    kept = ids != pad_id if attention is None else attention
    return Sequences(ids, lengths, kept, special, flat("token_type_ids"), flat("word_ids"))


def _rows(batch: Any, with_words: bool) -> list[Any]:
    """The batch as a list of sequences, each a mapping, a list or a tensor."""
    if isinstance(batch, Tensor):
        _checks.rank("the batch", batch, "(batch, seq)", 2)
        return list(batch)
    if isinstance(batch, Mapping):
        return _unzipped(batch, with_words)
    if isinstance(batch, (str, bytes)) or not isinstance(batch, Iterable):
        raise TypeError(f"the batch is a {type(batch).__name__}; expected a list of tokenised texts")
    return list(batch)


def _unzipped(batch: Mapping[str, Any], with_words: bool) -> list[Any]:
    """What a tokenizer gives for several texts, as one mapping for each text."""
    ids = _required(batch, "the batch")
    if len(ids) and (ids.ndim == 1 if isinstance(ids, Tensor) else isinstance(ids[0], int)):
        raise TypeError("the batch is a single tokenised text; expected several: put it in a list")
    names = ["input_ids", *FIELDS, *(["word_ids"] if with_words else [])]
    rows = [{name: batch[name][index] for name in names if name in batch} for index in range(len(ids))]
    if with_words and "word_ids" not in batch and (own := _fast(batch)) is not None:
        for index, row in enumerate(rows):
            row["word_ids"] = own(index)
    return rows


def _row(index: int, row: Any, with_words: bool) -> dict[str, Tensor]:
    """Name → (seq,) int64 of one sequence."""
    where = f"sequence {index} of the batch"
    if not isinstance(row, Mapping):
        given = {"input_ids": row}
    else:
        given = {"input_ids": _required(row, where)} | {name: row[name] for name in FIELDS if name in row}
    found = {name: _integers(f"{name} of {where}", values) for name, values in given.items()}
    if with_words:
        found["word_ids"] = _integers(f"word_ids of {where}", _word_ids(row, where))
    for name, values in found.items():
        if len(values) != len(found["input_ids"]):
            raise ValueError(
                f"{name} of {where} has {len(values)} elements but its input_ids {len(found['input_ids'])}; "
                "they must be as many"
            )
    return found


def _required(row: Mapping[str, Any], where: str) -> Any:
    if "input_ids" not in row:
        raise ValueError(f"{where} has the keys {sorted(map(str, row))}; expected input_ids among them")
    return row["input_ids"]


def _fast(row: Any) -> Callable[..., Sequence[int | None]] | None:
    """A fast tokenizer's own `word_ids`, where it comes with its output."""
    return row.word_ids if getattr(row, "is_fast", False) else None


def _word_ids(row: Any, where: str) -> Any:
    words = None
    if isinstance(row, Mapping):
        words = row.get("word_ids")
        if words is None and (own := _fast(row)) is not None:
            words = own()
    if words is None:
        raise ValueError(
            f"{where} has no word_ids, which whole_words=True asks for: pass a fast tokenizer's output as it is, or its "
            '`encoding.word_ids()` under "word_ids"; or tell words by a marker, with from_tokenizer(word_marker=...)'
        )
    return words if isinstance(words, Tensor) else [WITHOUT_WORD if word is None else word for word in words]


def _integers(name: str, values: Any) -> Tensor:
    """(n,), int64, on the CPU."""
    if isinstance(values, Tensor):
        _checks.tensor(name, values)
        _checks.rank(name, values, "(seq,)", 1)
        if len(values) and (values.is_floating_point() or values.is_complex()):  # torch.tensor([]) is floating
            raise TypeError(f"{name} has dtype {values.dtype}; expected integers")
        if values.device.type != "cpu":
            raise ValueError(
                f"{name} is on {values.device}; expected the CPU, where collators run: move it with .cpu()"
            )
        return values.long()  # may be the caller's own; what is laid flat is a copy
    try:
        if isinstance(values, (str, bytes, bytearray, memoryview)):
            raise TypeError(f"it is a {type(values).__name__}")
        numbers = array("q", values)
    except (TypeError, OverflowError) as error:
        raise TypeError(f"{name} is not a list or a tensor of integers: {error}") from None
    return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)


def _flags(name: str, values: Tensor | None, lengths: Tensor) -> Tensor | None:
    if values is None or not len(values):
        return None if values is None else values.bool()
    low, high = values.aminmax()
    if low < 0 or high > 1:
        index, place = _find((values < 0) | (values > 1), lengths)
        raise ValueError(f"{name} of sequence {index} of the batch is neither 0 nor 1 at place {place}")
    return values.bool()


def _within_vocabulary(ids: Tensor, lengths: Tensor, vocab_size: int) -> None:
    if not len(ids):
        return
    low, high = ids.aminmax()
    if low < 0 or high >= vocab_size:
        wrong = (ids < 0) | (ids >= vocab_size)
        index, place = _find(wrong, lengths)
        raise ValueError(
            f"sequence {index} of the batch has token {int(ids[wrong][0])} at place {place}; expected 0 to {vocab_size - 1}, "
            f"since vocab_size is {vocab_size}: is it from another tokenizer?"
        )


def _find(flags: Tensor, lengths: Tensor) -> tuple[int, int]:
    """Sequence and place of the first that is set."""
    first = flags.nonzero()[0]
    ends = lengths.cumsum(0)
    index = int(torch.searchsorted(ends, first, right=True))
    return index, int(first - (ends - lengths)[index])

"""T5's span corruption."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastattn.ops import _checks

from . import tokenizers
from .collator import IGNORED, Collator, at_least
from .sequences import Sequences
from .units import choose

C = TypeVar("C", bound="CorruptSpans")


class CorruptSpans(Collator):
    """Replaces spans of each text by sentinels, and a decoder is to write what stood there: Raffel et al. 2020, section 3.1.4.

        text        Thank you for inviting me to your party last week </s>
        input_ids   Thank you <X> me to your party <Y> week </s>
        labels      <X> for inviting <Y> last </s>

    Spans are those of the authors' random_spans_noise_mask. Of a text's n tokens round(noise_density · n), at least 1 and at
    most n - 1, are noise, in round(noise / mean_span) spans, at least 1. Spans of noise and of text take turns, text first
    and noise last, none empty; of all ways to cut the noise and the text into so many, each is equally likely. Two things are
    added: a text of a single token is noise (there, it stays), and there are no more spans than tokens of text to part them.
    A span that meets a special token inside the sequence is cut by it in two, each with a sentinel.

    Called with a batch (see `Collator`) it returns int64 tensors:
        input_ids: (batch, seq), where each span is one sentinel. Padding of the batch is gone; there is padding anew.
        attention_mask: (batch, seq), 0 at the padding.
        labels: (batch, target): of each span the sentinel and the tokens; then eos_id; padded with -100. All -100 where the
            sequence has no text.

    Args:
        sentinel_ids: the sentinels, in the order in which they are used. None may be in a text.
        vocab_size, pad_id, special_ids, pad_to_multiple_of, seed: see `Collator`.
        eos_id: the token that ends labels; None for no end.
        noise_density: share of the text that is noise.
        mean_span: mean length of the spans of noise, at least 1.

    Raises:
        TypeError: arguments, or a batch, of the wrong kind.
        ValueError: a density outside 0 to 1, a mean_span below 1, no sentinels or two that are equal; tokens outside the
            vocabulary; a text with more spans than there are sentinels, or with a sentinel in it.
    """

    def __init__(
        self,
        *,
        sentinel_ids: Sequence[int],
        vocab_size: int,
        pad_id: int,
        special_ids: Iterable[int] = (),
        eos_id: int | None = None,
        noise_density: float = 0.15,
        mean_span: float = 3.0,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            pad_id=pad_id,
            special_ids=special_ids,
            pad_to_multiple_of=pad_to_multiple_of,
            seed=seed,
        )
        self.sentinel_ids = tuple(self._token("sentinel_ids", token) for token in sentinel_ids)
        self.eos_id = None if eos_id is None else self._token("eos_id", eos_id)
        if not self.sentinel_ids or len({*self.sentinel_ids, self.pad_id, self.eos_id}) < len(self.sentinel_ids) + 2:
            raise ValueError(
                f"sentinel_ids are {self.sentinel_ids}, pad_id is {pad_id} and eos_id {eos_id}; expected at least one sentinel, "
                "and all of them to differ"
            )
        _checks.probability("noise_density", noise_density)
        self.noise_density, self.mean_span = float(noise_density), at_least(1.0, "mean_span", mean_span)
        self._sentinels = torch.tensor(self.sentinel_ids)
        self._is_sentinel = self._table(self.sentinel_ids)

    @classmethod
    def from_tokenizer(cls: type[C], tokenizer: Any, **settings: Any) -> C:
        """As `Collator.from_tokenizer`, with the sentinels, <extra_id_0> first, and the token for the end."""
        found: dict[str, Any] = {"eos_id": getattr(tokenizer, "eos_token_id", None)}
        if "sentinel_ids" not in settings:
            found["sentinel_ids"] = tokenizers.sentinel_ids(tokenizer)
        return super().from_tokenizer(tokenizer, **(found | settings))

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        given = self._read(batch).without_padding()
        self._check_no_sentinel(given)
        text = self._text(given)
        noise = torch.zeros_like(text)
        noise[text] = self._noise(given.count(text))
        begins = noise.clone()
        begins[1:] &= ~noise[:-1]
        starts = given.lengths.cumsum(0) - given.lengths
        inside = starts[given.lengths > 0]
        begins[inside] = noise[inside]  # even where the sequence before ended in noise
        spans = given.count(begins)
        self._check_enough(spans)

        number = begins.cumsum(0) - torch.repeat_interleave(spans.cumsum(0) - spans, given.lengths) - 1
        sentinels = self._sentinels[number.clamp(min=0)]
        stays = ~noise | begins
        lengths = given.count(stays)
        input_ids = torch.where(begins, sentinels, given.ids)[stays]
        labels, target_lengths = self._labels(given, noise, begins, sentinels)
        return {
            "input_ids": self._padded(input_ids, lengths, self.pad_id),
            "attention_mask": self._padded(torch.ones_like(input_ids), lengths, 0),
            "labels": self._padded(labels, target_lengths, IGNORED),
        }

    def _noise(self, tokens: Tensor) -> Tensor:
        """(text tokens,), bool: whether each is noise, of all texts, which have (batch,) tokens."""
        # In float32, as the authors count: 0.15 · 190 is 29 tokens there, and 28 in float64.
        noise = (tokens.float() * self.noise_density).round().long()
        noise = noise.clamp(min=1).minimum((tokens - 1).clamp(min=1)).minimum(tokens)
        if self.noise_density == 0:
            noise = torch.zeros_like(noise)
        rest = tokens - noise
        spans = (noise.float() / self.mean_span).round().long().minimum(rest).clamp(min=1)
        lengths = torch.stack(
            [self._segments(rest, spans), self._segments(noise, spans)], dim=2
        )  # text, noise, text, …
        kinds = torch.tensor([False, True]).expand(lengths.shape)
        return torch.repeat_interleave(kinds.flatten(), lengths.flatten())

    def _segments(self, items: Tensor, segments: Tensor) -> Tensor:
        """(batch, most segments): in each row the lengths of so many segments of so many items, then zeros.

        None is empty but where there are no items, which are one segment.
        """
        places, used = choose(segments - 1, (items - 1).clamp(min=0), self._draws())
        ends = torch.where(used, places + 1, items.unsqueeze(1)).sort(dim=1).values
        ends = torch.cat([ends, items.unsqueeze(1)], dim=1)
        return ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))

    def _labels(self, given: Sequences, noise: Tensor, begins: Tensor, sentinels: Tensor) -> tuple[Tensor, Tensor]:
        """The labels of all sequences, flat, and the number of each one's."""
        # What each token becomes: its sentinel where it begins a span, itself where it is noise, and eos_id behind the last.
        ends = torch.zeros_like(noise)
        if self.eos_id is not None:
            so_far = noise.cumsum(0)
            last = so_far == torch.repeat_interleave(given.count(noise).cumsum(0), given.lengths)
            ends = noise & last
        parts = noise.long() + begins.long() + ends.long()
        source = torch.repeat_interleave(torch.arange(len(parts)), parts)
        place = torch.arange(len(source)) - (parts.cumsum(0) - parts)[source]
        token = begins[source].long()  # where the token itself stands: behind its sentinel
        labels = torch.where(place < token, sentinels[source], given.ids[source])
        if self.eos_id is not None:
            labels = labels.masked_fill(place > token, self.eos_id)
        return labels, given.count(parts)

    def _check_no_sentinel(self, given: Sequences) -> None:
        found = self._is_sentinel[given.ids]
        if bool(found.any()):
            index = int(given.count(found).nonzero()[0])
            raise ValueError(
                f"sequence {index} of the batch holds token {int(given.ids[found][0])}, a sentinel, so that what is replaced "
                "could not be told from it: was it corrupted before? Take it out of the text"
            )

    def _check_enough(self, spans: Tensor) -> None:
        most = int(spans.max()) if len(spans) else 0
        if most > len(self.sentinel_ids):
            raise ValueError(
                f"sequence {int(spans.argmax())} of the batch needs {most} sentinels but there are {len(self.sentinel_ids)}: cut "
                "texts shorter, lower noise_density, raise mean_span, or add sentinels to the tokenizer and the model"
            )

"""What all denoising collators share: settings, reading and padding of batches, and a random generator of their own."""

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from io import BytesIO
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from fastattn.ops import _checks

from . import sequences, tokenizers
from .sequences import Sequences

C = TypeVar("C", bound="Collator")
IGNORED = -100  # a label that asks for nothing: what cross entropies skip, ours, torch's and Hugging Face's


class Collator:
    """A function from a batch of tokenised texts to tensors, that draws what to corrupt. The base of this package's three.

    **A batch** is a list of sequences, and a sequence a list or a 1-D tensor of token numbers, or a mapping with `input_ids`
    and, if there, `attention_mask` (0 at the padding), `special_tokens_mask` (1 at tokens never to be corrupted) and `word_ids`
    (for whole words: the number of each token's word, None or -1 where there is none). A tokenizer's output for one text is such
    a mapping (a fast tokenizer's knows its word ids). The batch may also be a (batch, seq) tensor, or a tokenizer's output for
    several texts. Other keys are left out. Nothing passed in is changed.

    **The text** of a sequence is what may be corrupted: all tokens but padding (`attention_mask` 0 or, without an
    attention_mask, `pad_id`), those in `special_ids`, and those that a special_tokens_mask names. In a sequence without text
    nothing is corrupted; in a sequence with text at least one token is, unless the ratio is 0. A batch of no sequences gives
    tensors of shape (0, 0).

    **The result** maps names to int64 tensors, padded on the right to the longest of them.

    **Random numbers** come from a generator of the collator's own: the same seed and the same batches in the same order give the
    same corruption, torch's default generator is neither used nor moved, and padding of the input makes no difference. Every
    batch gets new draws, so that a text is corrupted differently each time it comes (dynamic masking). In the processes of a
    distributed run, give each rank another seed.

    **A DataLoader's workers** each have a copy of the collator. At its first batch a copy starts a new stream of draws, from
    the state of the collator when the worker was started and from the worker's own seed, `get_worker_info().seed`. That seed
    is another for every worker and, since the loader draws it whenever workers start, for every epoch. The loader draws it
    from its `generator` or, without one, from torch's: pass `DataLoader(..., generator=torch.Generator().manual_seed(n))` for
    a run that can be repeated, whatever else draws. With `persistent_workers=True` a worker goes on with its stream in the next
    epoch. The collator in the main process does not move while workers draw.

    `state_dict` and `load_state_dict` save and set the generator. Collators can be pickled and copied; a copy draws what the
    original would have.

    Args:
        vocab_size: number of tokens; what a batch holds must be below.
        pad_id: the token for padding.
        special_ids: tokens that are never corrupted and never drawn as a replacement; pad_id is one without being named.
        pad_to_multiple_of: pad lengths further, to a multiple of this, for kernels that like round sizes.
        seed: of the generator, 0 to 2³² - 1.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        pad_id: int,
        special_ids: Iterable[int] = (),
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
    ) -> None:
        self.vocab_size = positive("vocab_size", vocab_size)
        self.pad_id = self._token("pad_id", pad_id)
        self.special_ids = tuple(sorted({self._token("special_ids", x) for x in special_ids} | {self.pad_id}))
        self.pad_to_multiple_of = (
            1 if pad_to_multiple_of is None else positive("pad_to_multiple_of", pad_to_multiple_of)
        )
        self.seed = _checks.integer("seed", seed)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {seed}; expected 0 to 2**32 - 1, as many as torch's generator tells apart")
        self._special = self._table(self.special_ids)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._worker_seed: int | None = None  # of the worker that the generator was seeded for

    @classmethod
    def from_tokenizer(cls: type[C], tokenizer: Any, **settings: Any) -> C:
        """A collator for a Hugging Face tokenizer, from which it takes numbers of tokens and the size of the vocabulary.

        Special tokens are the tokenizer's, but for the one that stands for unknown text, which is text.

        Args:
            tokenizer: slow or fast.
            settings: the constructor's keyword arguments; those given go before the tokenizer's.

        Raises:
            TypeError: no such tokenizer.
            ValueError: it lacks a token that is needed; the message says how to add it.
        """
        return cls(**(tokenizers.common(tokenizer, settings.get("pad_id")) | settings))

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} does not say how to corrupt; define __call__")

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the generator in this process."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        if set(state) != {"generator"}:
            raise ValueError(
                f"the state has the keys {sorted(state)}; expected generator alone, as state_dict gives it"
            )
        _checks.tensor("the state's generator", state["generator"])
        self._generator.set_state(state["generator"])
        worker = get_worker_info()
        self._worker_seed = None if worker is None else worker.seed

    def __getstate__(self) -> dict[str, Any]:
        # Tensors go as bytes. As they are, torch would hand them to a spawned worker in shared memory, of which there may be
        # none, or little; and a generator is not pickled by every torch.
        state = vars(self) | {"_generator": self._generator.get_state()}
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        buffer = BytesIO()
        torch.save(tensors, buffer)
        return {name: value for name, value in state.items() if name not in tensors} | {"_tensors": buffer.getvalue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = torch.load(BytesIO(state["_tensors"]), weights_only=True)
        vars(self).update({name: value for name, value in state.items() if name != "_tensors"} | tensors)
        self._generator = torch.Generator()
        self._generator.set_state(tensors["_generator"])

    def _token(self, name: str, token: int | None) -> int:
        if token is None:
            raise ValueError(f"{name} is None; expected the number of a token: does the tokenizer have that token?")
        number = _checks.integer(name, token)
        if not 0 <= number < self.vocab_size:
            raise ValueError(f"{name}: {number} is no token of the vocabulary; expected 0 to {self.vocab_size - 1}")
        return int(number)

    def _mask_token(self, token: int | None) -> int:
        number = self._token("mask_id", token)
        if number == self.pad_id:
            raise ValueError(
                f"mask_id and pad_id are both {number}; a mask must not look like padding: add a token for it"
            )
        return number

    def _table(self, tokens: Iterable[int]) -> Tensor:
        """(vocab_size,), bool: whether a token is one of these."""
        table = torch.zeros(self.vocab_size, dtype=torch.bool)
        table[torch.tensor(list(tokens), dtype=torch.int64)] = True
        return table

    def _read(self, batch: Any, with_words: bool = False) -> Sequences:
        return sequences.read(batch, self.pad_id, self.vocab_size, with_words)

    def _text(self, given: Sequences) -> Tensor:
        """(tokens,), bool: what may be corrupted."""
        text = given.kept & ~self._special[given.ids]
        return text if given.special is None else text & ~given.special

    def _draws(self) -> torch.Generator:
        """The generator, in a worker its own."""
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            here = int(torch.randint(2**62, (), generator=self._generator))
            digest = blake2b(f"{here} {worker.seed}".encode(), digest_size=4).digest()
            self._generator.manual_seed(int.from_bytes(digest, "little"))
            self._worker_seed = worker.seed
        return self._generator

    def _padded(self, flat: Tensor, lengths: Tensor, value: int) -> Tensor:
        """(tokens,) as (batch, longest), int64."""
        longest = int(lengths.max()) if len(lengths) else 0
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        out = torch.full((len(lengths), width), value)
        return out.masked_scatter_(torch.arange(width) < lengths.unsqueeze(1), flat)


def positive(name: str, x: object) -> int:
    value = _checks.length(name, x)
    if value == 0:
        raise ValueError(f"{name} is 0; expected at least 1")
    return value


def at_least(least: float, name: str, x: float) -> float:
    value = _checks.number(name, x)
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}")
    return value

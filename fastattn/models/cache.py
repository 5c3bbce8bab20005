"""Keys and values of the tokens that a decoder has seen, its own and those of an encoder."""

from typing import Any

import torch
from torch import Tensor

from fastattn.nn.packed_sequences import PackedSequences
from fastattn.ops import _checks

from . import _checks as _model_checks


class KeyValueCache:
    """Room for the keys and values of `capacity` tokens a sequence, for each layer. For inference.

    Args:
        layers, batch, kv_heads, capacity, head_dim: sizes.
        dtype, device: of keys and values.

    Attributes:
        keys, values: a list with a (batch, kv_heads, capacity, head_dim) for each layer.
        lengths: (batch,), int32, how many tokens of each sequence are in it.
        longest: an int that no length exceeds, known without reading a device.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        shape = (
            _checks.length("batch", batch),
            _checks.length("kv_heads", kv_heads),
            _checks.length("capacity", capacity),
            _checks.length("head_dim", head_dim),
        )
        # Zeros and not uninitialised memory: a NaN in it would reach no result, but would alarm whoever looks.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.capacity = capacity
        self.longest = 0

    @property
    def batch(self) -> int:
        """How many sequences it holds."""
        return self.lengths.shape[0]

    def check_room(self, new: int) -> None:
        """Raises a ValueError where the longest sequence has no room for `new` more tokens."""
        if self.longest + new > self.capacity:
            raise ValueError(
                f"{new} tokens are added to up to {self.longest} in a cache of capacity {self.capacity}; make it longer"
            )

    def places(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> PackedSequences:
        """Where prompts go that are laid end to end: `indices` are places in the flattened (batch · capacity).

        Args:
            input_ids: (tokens,), the prompts one after the other.
            cu_seqlens: (batch + 1,), int32, where each begins, ending at tokens; no prompt is empty.
            max_seqlen: the longest prompt.

        Raises:
            TypeError, ValueError: dtypes or shapes that do not fit, an empty prompt, a cache that is not empty or too short.
        """
        _model_checks.prompts(input_ids, cu_seqlens, max_seqlen, self.batch)
        if self.longest:
            raise ValueError(
                f"the cache holds up to {self.longest} tokens a sequence; prefill wants an empty one: call cache.reset()"
            )
        self.check_room(max_seqlen)
        tokens, device = input_ids.shape[0], input_ids.device
        rows = torch.arange(self.batch, device=device)
        rows = rows.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
        indices = torch.arange(tokens, device=device) - cu_seqlens[rows] + rows * self.capacity
        return PackedSequences(indices, cu_seqlens, max_seqlen)

    def write_packed(self, layer: int, key: Tensor, value: Tensor, sequences: PackedSequences) -> None:
        """Puts the keys and values (1, kv_heads, tokens, head_dim) of whole sequences at the start of theirs.

        `sequences` are of `places`; lengths are not changed.
        """
        row, position = sequences.indices // self.capacity, sequences.indices % self.capacity
        for cache, new in ((self.keys[layer], key), (self.values[layer], value)):
            cache[row, :, position] = new[0].transpose(0, 1).to(cache.dtype)

    def advance(self, by: Tensor | int, most: int) -> None:
        """Counts tokens that every layer has: `by` is int32 (batch,) or one number; `most` is the largest of it."""
        self.lengths = self.lengths + by
        self.longest += most

    def reorder(self, rows: Tensor) -> None:
        """Makes sequence i what sequence rows[i] was, as beam search needs. The number of sequences may change.

        Tensors that were taken from keys and values before hold anything afterwards: their memory is used again.

        Args:
            rows: (new batch,), integers from 0 to batch - 1.

        Raises:
            ValueError: rows is not a vector of integers.
        """
        _checks.tensor("rows", rows)
        if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"rows has dtype {rows.dtype} and shape {tuple(rows.shape)}; expected int64 (new batch,), the sequence to "
                f"continue in each place"
            )
        reordered = self._reordered([*self.keys, *self.values], rows)
        self.keys, self.values = reordered[: len(self.keys)], reordered[len(self.keys) :]
        self.lengths = self.lengths.index_select(0, rows)

    def _reordered(self, caches: list[Tensor], rows: Tensor) -> list[Tensor]:
        """The rows of each. Where the tensor before it has been copied and has room for as many, only what is filled is copied,
        to there, so that a single tensor is new."""
        reordered: list[Tensor] = []
        room: Tensor | None = None
        for cache in caches:
            if room is None:
                room = cache.index_select(0, rows)
            else:
                torch.index_select(cache[:, :, : self.longest], 0, rows, out=room[:, :, : self.longest])
            reordered.append(room)
            # What was made in inference mode cannot be written to outside of it.
            writable = torch.is_inference_mode_enabled() or not cache.is_inference()
            room = cache if cache.shape == room.shape and writable else None
        return reordered

    def reset(self) -> None:
        """Forgets all tokens; the memory stays."""
        self.lengths = torch.zeros_like(self.lengths)
        self.longest = 0


class EncoderDecoderCache:
    """What an encoder and decoder remembers while it writes. For inference.

    Args:
        read: keys and values of what the encoder read, for the decoder's cross-attention.
        written: those of what the decoder has written; its sequences are all of one length.

    Attributes:
        bias: (1, heads, 1, capacity of written), the position bias of the last place there is to all before it, of which
            that of an earlier place is the end.
    """

    def __init__(self, read: KeyValueCache, written: KeyValueCache) -> None:
        self.read, self.written = read, written
        self.bias: Tensor | None = None
        self._sources = torch.arange(read.batch, device=read.lengths.device)

    @property
    def batch(self) -> int:
        """How many sequences it holds."""
        return self.written.batch

    def reorder(self, rows: Tensor) -> None:
        """As `KeyValueCache.reorder`. What was read is copied only where a place comes to continue another source: the beams
        of a prompt have the same."""
        self.written.reorder(rows)
        sources = self._sources.index_select(0, rows)
        if not torch.equal(sources, self._sources):
            self.read.reorder(rows)
        self._sources = sources

    def reset(self) -> None:
        """Forgets all tokens; the memory stays."""
        self.read.reset()
        self.written.reset()
        self._sources = torch.arange(self.read.batch, device=self._sources.device)

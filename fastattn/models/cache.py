"""Keys and values of the tokens that a decoder has seen."""

from typing import Any

import torch
from torch import Tensor

from fastattn.nn.packed_sequences import PackedSequences
from fastattn.ops import _checks


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

    def write_packed(self, layer: int, key: Tensor, value: Tensor, sequences: PackedSequences) -> None:
        """Puts the keys and values (tokens, kv_heads, head_dim) of whole sequences at the start of theirs.

        `indices` of sequences are places in the flattened (batch · capacity); lengths are not changed.
        """
        for cache, new in ((self.keys[layer], key), (self.values[layer], value)):
            row, position = sequences.indices // self.capacity, sequences.indices % self.capacity
            cache[row, :, position] = new.to(cache.dtype)

    def advance(self, by: Tensor | int, most: int) -> None:
        """Counts tokens that every layer has: `by` is int32 (batch,) or one number; `most` is the largest of it."""
        self.lengths = self.lengths + by
        self.longest += most

    def reorder(self, rows: Tensor) -> None:
        """Makes sequence i what sequence rows[i] was, as beam search needs. The number of sequences may change.

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
        self.keys = [key.index_select(0, rows) for key in self.keys]
        self.values = [value.index_select(0, rows) for value in self.values]
        self.lengths = self.lengths.index_select(0, rows)

    def reset(self) -> None:
        """Forgets all tokens; the memory stays."""
        self.lengths = torch.zeros_like(self.lengths)
        self.longest = 0

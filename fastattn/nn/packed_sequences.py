"""Sequences laid end to end, so that no padding is computed."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PackedSequences:
    """Where sequences laid end to end begin; stands in the place of an attention mask.

    Attributes:
        indices: (tokens,), the place of each token in the flattened (batch · seq).
        cu_seqlens: (batch + 1,), int32, where each sequence begins, ending at tokens.
        max_seqlen: the longest.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def from_padding(cls, kept: Tensor) -> "PackedSequences":
        """From a mask (batch, seq), bool, True at the tokens; they need not stand together."""
        lengths = kept.sum(dim=1)
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(kept.flatten().nonzero().flatten(), cu_seqlens, int(lengths.max()))

    def pack(self, x: Tensor) -> Tensor:
        """(batch, seq, …) to (1, tokens, …)."""
        return x.flatten(0, 1).index_select(0, self.indices).unsqueeze(0)

    def unpack(self, x: Tensor, batch: int, seq: int) -> Tensor:
        """(1, tokens, …) to (batch, seq, …), zeros elsewhere."""
        rows = x.new_zeros(batch * seq, *x.shape[2:]).index_copy(0, self.indices, x[0])
        return rows.unflatten(0, (batch, seq))

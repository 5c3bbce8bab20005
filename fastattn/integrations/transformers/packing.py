"""An encoder that computes no padding.

    hidden (batch, seq, width), padding mask (batch, seq)
        -> (1, tokens, width)            the tokens that are not padding, end to end
        -> the layers as they are        linear layers, norms and activations see more rows of one sequence; attention
                                         is told where each begins by the `PackedSequences` that comes as its mask
        -> (batch, seq, width)           zeros at the padding

So no layer's code is copied. The padding's outputs are zeros where the model alone would leave values that depend on
nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..swap import Swapped

_active_collector: Any
try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # transformers moved it; then only what is asked for in the call itself is known
    _active_collector = None

# The attribute under which a mask carries the 2-D padding mask that it was made of.
PADDING = "fastattn_padding"


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


def wanted_outputs() -> set[str]:
    """The inner results ("hidden_states", "attentions", …) that the running call of a model collects."""
    if _active_collector is None:
        return set()
    # transformers keeps it in a context variable, which torch.compile cannot trace, and in a global one while compiling.
    wanted = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    return set(wanted or ())


class PackedEncoder(Swapped):
    """A stack of layers whose forward takes (hidden_states, attention_mask, …) and returns an output with
    last_hidden_state."""

    does = "no padding computed"
    leaves_padding_out = True

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        if any(getattr(child, "chunk_size_feed_forward", 0) for child in module.modules()):
            return (
                "chunk_size_feed_forward cuts sequences into chunks of one length, which packed sequences do not have"
            )
        return None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        padding = getattr(attention_mask, PADDING, None)
        if padding is None or not _only_encodes(args, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        sequences = PackedSequences.from_padding(padding)
        if sequences.max_seqlen == 0:  # layers reshape, and cannot reshape nothing
            output = super().forward(hidden_states, attention_mask, *args, **kwargs)
            output.last_hidden_state = output.last_hidden_state.masked_fill(~padding[..., None], 0.0)
            return output
        output = super().forward(sequences.pack(hidden_states), sequences, *args, **kwargs)
        output.last_hidden_state = sequences.unpack(output.last_hidden_state, *padding.shape)
        return output


def _only_encodes(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether nothing but the last hidden state is asked for, and nothing but the hidden states is given."""
    if any(given is not None for given in args) or wanted_outputs():
        return False
    if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
        return False
    return kwargs.get("encoder_hidden_states") is None and kwargs.get("past_key_values") is None

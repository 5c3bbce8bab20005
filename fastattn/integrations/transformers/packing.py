"""An encoder that computes no padding.

    hidden (batch, seq, width), padding mask (batch, seq)
        -> (1, tokens, width)            the tokens that are not padding, end to end
        -> the layers as they are        linear layers, norms and activations see more rows of one sequence; attention
                                         is told where each begins by the `PackedSequences` that comes as its mask
        -> (batch, seq, width)           zeros at the padding

So no layer's code is copied. The padding's outputs are zeros where the model alone would leave values that depend on
nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn.packed_sequences import PackedSequences

from ..swap import Swapped

_active_collector: Any
try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # transformers moved it; then only what is asked for in the call itself is known
    _active_collector = None

# The attribute under which a mask carries the 2-D padding mask that it was made of.
PADDING = "fastattn_padding"


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

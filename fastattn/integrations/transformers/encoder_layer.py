"""BERT's layer as one op where nothing is recorded for a backward; else as `FeedForwardAddNorm`, its parts one by one.

At a few tokens the Python between a layer's seven kernels takes a third of its time. The weights are read anew in every
call, from the modules as they are then: one that changes, or is replaced, hooked or adapted, counts from that call on.
"""

import itertools
from typing import Any

from torch import Tensor, nn

from fastattn import _watch, ops
from fastattn.nn import _modules
from fastattn.nn._encoder_layer import may_run, plain_norm
from fastattn.nn.feed_forward import activation_name, weights
from fastattn.nn.packed_sequences import PackedSequences

from ..patterns import FeedForwardAddNorm
from .attention import NAME
from .packing import wanted_outputs


class EncoderLayer(FeedForwardAddNorm):
    """norm2(h + w2 · activation(w1 · h)) with h = norm1(x + attention(x)), over the parts of a BertLayer."""

    does = "whole layer as one op at inference; in training the feed-forward network, and dropout, add and layer norm"
    roles = (
        *FeedForwardAddNorm.roles,
        "attention",
        "self_attention",
        "attention_output",
        "intermediate",
        "output",
    )

    @classmethod
    def parts(cls, module: nn.Module) -> list[nn.Module]:
        return [part for part in cls.get_parts(module)[:5] if isinstance(part, nn.Module)]

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if all(given is None or given is False for given in (*args, *kwargs.values())):
            layer = self._as_one_op(hidden_states, attention_mask)
            if layer is not None:
                return layer
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        *_, intermediate, output = self.get_parts(self)
        if (
            _modules.hooked(intermediate)
            or _modules.hooked(output)
            or not _of_one_model(self.original, [intermediate, output])
        ):
            return super(FeedForwardAddNorm, self).feed_forward_chunk(attention_output)  # type: ignore[misc]  # original's
        return super().feed_forward_chunk(attention_output)

    def _as_one_op(self, x: Tensor, mask: Any) -> Tensor | None:
        """The layer's output; None where a part of it does more than the op knows of, or is watched."""
        packed = isinstance(mask, PackedSequences)
        w1, activation, w2, dropout, norm2, *containers = self.get_parts(self)
        _, attention, output, _, _ = containers
        if not (mask is None or packed) or not may_run(attention.dropout, output.dropout, dropout):
            return None
        if attention.config._attn_implementation != NAME or attention.is_causal or wanted_outputs() & {"attentions"}:
            return None
        if (
            any(map(_modules.hooked, containers))
            or _watch.watched(attention)
            or not _of_one_model(self.original, containers)
        ):
            return None
        linears = (attention.query, attention.key, attention.value, output.dense, w1, w2)
        read: Any = [weights(linear) for linear in linears]
        first_norm, last_norm = plain_norm(output.LayerNorm), plain_norm(norm2)
        name = activation_name(activation)
        if None in read or first_norm is None or last_norm is None or name is None:
            return None
        *projections, first, last = read
        fused: Any = ops.encoder_layer  # mypy counts no arguments behind stars
        return fused(
            x,
            *itertools.chain(*projections),
            *first_norm[:2],
            *first,
            *last,
            *last_norm[:2],
            attention.num_attention_heads,
            name,
            first_norm[2],
            last_norm[2],
            scale=attention.scaling,
            cu_seqlens=mask.cu_seqlens if packed else None,
            max_seqlen=mask.max_seqlen if packed else None,
        )


def _of_one_model(layer: type, parts: list[nn.Module]) -> bool:
    """Whether these are classes of the model that the layer is of, and not what a user put there."""
    return all(getattr(type(part), "original", type(part)).__module__ == layer.__module__ for part in parts)

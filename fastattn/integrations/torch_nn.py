"""torch.nn's Transformer family: each class becomes its counterpart in `fastattn.nn`, which has the same state."""

from torch import nn

import fastattn.nn

from .swap import register

_DOES = {
    fastattn.nn.LayerNorm: "layer norm in one pass",
    fastattn.nn.RMSNorm: "RMS norm in one pass",
    fastattn.nn.MultiheadAttention: "fused attention",
    fastattn.nn.TransformerEncoderLayer: "fused add and norm, and feed-forward network",
    fastattn.nn.TransformerDecoderLayer: "fused add and norm, and feed-forward network",
    fastattn.nn.TransformerEncoder: "no padding computed at inference",
    fastattn.nn.TransformerDecoder: "a stack of fused layers",
    fastattn.nn.Transformer: "fused encoder and decoder",
}

# The counterparts compute their linear layers and dropouts themselves.
_children = classmethod(lambda cls, module: list(module.children()))

for _ours, _does in _DOES.items():
    _theirs = getattr(nn, _ours.__name__)
    register(f"{_theirs.__module__}.{_theirs.__qualname__}", _ours, does=_does, parts=_children)

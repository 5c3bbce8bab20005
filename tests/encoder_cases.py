"""Weights for the tests of encoder_layer."""

import torch
from torch import Tensor

NAMES = ("w_query", "b_query", "w_key", "b_key", "w_value", "b_value", "w_out", "b_out", "norm1_weight", "norm1_bias")
NAMES += ("w1", "b1", "w2", "b2", "norm2_weight", "norm2_bias")


def weights(width: int, inner: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """The weights of a layer by the names of encoder_layer's arguments."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        **dict.fromkeys(("w_query", "w_key", "w_value"), (inner, width)),
        "w_out": (width, inner),
        "w1": (hidden, width),
        "w2": (width, hidden),
    }
    shapes |= dict.fromkeys(("b_query", "b_key", "b_value"), (inner,)) | {"b1": (hidden,)}
    made = {}
    for name in NAMES:
        shape = shapes.get(name, (width,))
        scale = 1.0 if len(shape) == 1 else shape[1] ** -0.5
        made[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return made

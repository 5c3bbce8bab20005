"""Inputs that are the same on every run."""

import torch
from torch import Tensor


def random(*shapes: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Normal tensors of these shapes from a fixed seed; drawn in float32, so that every dtype gets the same values."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]


def lengths(batch: int, longest: int) -> list[int]:
    """Sequence lengths as in mixed text: the longest one, the rest spread geometrically down to a sixteenth of it."""
    return [max(1, round(longest * 16 ** (-i / max(batch - 1, 1)))) for i in range(batch)]

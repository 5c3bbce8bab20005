"""Inputs that are the same on every run."""

import torch
from torch import Tensor


def random(*shapes: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Normal tensors of these shapes from a fixed seed, on the default device, which is that of the case being built; drawn
    in float32, so that every dtype gets the same values."""
    device = torch.get_default_device()
    generator = torch.Generator(device).manual_seed(0)
    return [(torch.randn(shape, generator=generator, device=device) * scale).to(dtype) for shape in shapes]


def lengths(batch: int, longest: int) -> list[int]:
    """Sequence lengths as in mixed text: the longest one, the rest spread geometrically down to a sixteenth of it."""
    return [max(1, round(longest * 16 ** (-i / max(batch - 1, 1)))) for i in range(batch)]

"""Layouts that kernels ask for, and gradients and outputs that may be absent: for every backend."""

import torch
from torch import Tensor


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The same tensor without gaps, for kernels that take no strides; None stays None."""
    return None if tensor is None else tensor.contiguous()


def along(tensor: Tensor) -> Tensor:
    """The same tensor with the elements of its last dimension next to each other in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def given(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one where there is none: torch.library ops return tensors."""
    return like.new_empty(0) if tensor is None else tensor


def matrix(tensor: Tensor) -> Tensor:
    """The same (…, features) tensor, or its (rows, features) matrix where the leading dimensions are no single one in memory."""
    return tensor if tensor.ndim <= 2 or tensor.is_contiguous() else tensor.reshape(-1, tensor.shape[-1])


def rows(tensor: Tensor) -> Tensor:
    """`matrix`, with the features of a row next to each other in memory."""
    return matrix(along(tensor))


def gradient(tensor: Tensor | None, needed: bool) -> Tensor | None:
    """A tensor for the gradient of this one, in its layout; None where nobody asks for it."""
    return torch.empty_like(tensor) if needed and tensor is not None else None

"""Tensor descriptors: with one, a single thread asks the copy engine (TMA) of sm_90 and sm_100 for a tile of a tensor.

No register holds an address or a mask then: what lies outside of the tensor comes as zeros. The engine wants a last dimension
without gaps, and everything else to begin at multiples of 16 bytes.
"""

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..tensors import living

_ALIGNMENT = 16  # bytes


def readable(tensor: Tensor) -> bool:
    """Whether the copy engine can read this tensor."""
    elements = _ALIGNMENT // tensor.element_size()
    return (
        tensor.numel() > 0
        and tensor.stride(-1) == 1
        and all(n == 1 or (s > 0 and s % elements == 0) for n, s in zip(tensor.shape[:-1], tensor.stride()))
        and living(tensor).data_ptr() % _ALIGNMENT == 0
    )


def describe(tensor: Tensor, tile: Sequence[int]) -> TensorDescriptor:
    """A descriptor of a `readable` tensor, for tiles of this shape."""
    elements = _ALIGNMENT // tensor.element_size()
    strides = [elements if n == 1 else s for n, s in zip(tensor.shape[:-1], tensor.stride())]  # of one there may be any
    return TensorDescriptor(living(tensor), list(tensor.shape), [*strides, 1], list(tile))

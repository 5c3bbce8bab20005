"""What kernels of every backend ask of tensors: layouts, dtypes; and gradients and outputs that may be absent."""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, unwrap_if_dead

# What kernels compute on; csrc/cuda numbers them in this order. The 16-bit ones are computed in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unlike(tensor: Tensor, *others: Tensor | None) -> str | None:
    """Why a GPU's kernels cannot take tensors of these dtypes and devices together, as one sentence; None if they can."""
    dtype = tensor.dtype
    if dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    for other in others:
        if other is not None and (other.dtype != dtype or other.device != tensor.device):
            return (
                f"its tensors must share one dtype and device, and these are {str(dtype).removeprefix('torch.')} on "
                f"{tensor.device} and {str(other.dtype).removeprefix('torch.')} on {other.device}"
            )
    return None


def living(tensor: Tensor) -> Tensor:
    """A tensor that has outlived the transform in which it was made stands for another one, whose memory is meant."""
    return unwrap_if_dead(tensor) if is_functorch_wrapped_tensor(tensor) else tensor


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The same tensor without gaps, for kernels that take no strides; None stays None."""
    return None if tensor is None else tensor.contiguous()


def along(tensor: Tensor) -> Tensor:
    """The same tensor with the elements of its last dimension next to each other in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def cache_capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """How many keys a sequence has room for in a key-value cache, contiguous or paged."""
    return cache.shape[2] * (1 if block_table is None else block_table.shape[1])


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

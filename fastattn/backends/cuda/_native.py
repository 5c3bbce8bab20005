"""The extension module `fastattn._cuda`, and the checks without which no address goes to it."""

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from ..tensors import living, unlike
from ..triton.chips import too_old

emulated: bool = os.environ.get("FASTATTN_CUDA_EMULATED", "0") not in ("", "0")


def _load() -> tuple[Any, str | None]:
    """The module, or None and the reason why it is not there."""
    if not emulated and torch.version.cuda is None:
        return None, "the cuda backend runs on NVIDIA GPUs, and this torch was built without CUDA"
    name = "_cuda_emulated" if emulated else "_cuda"
    try:
        return importlib.import_module(f"fastattn.{name}"), None
    except ImportError as error:
        return None, (
            f"the cuda backend was not built (fastattn.{name}: {error}); reinstall fastattn with nvcc on the PATH or in CUDA_HOME"
        )


C, reason = _load()
MOST_FEATURES: int = 0 if C is None else C.norm_most_features()


def unsupported(tensor: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, as one sentence; None if they can.

    The first tensor sets the device and the dtype; of the others, those that are there must have both. Absent ones are None.
    """
    if C is None:
        return reason
    if emulated != tensor.is_cpu or not (emulated or tensor.is_cuda):
        place = "CPU tensors (FASTATTN_CUDA_EMULATED is set)" if emulated else "GPU tensors"
        return f"it runs on {place}, and these are on {tensor.device}"
    if not emulated and (why := too_old(tensor.device.index)) is not None:
        return why
    return unlike(tensor, *others)


def address(
    tensor: Tensor | None,
    name: str,
    like: Tensor,
    shape: tuple[int, ...],
    *dtypes: torch.dtype,
    strided: bool = False,
) -> int:
    """A tensor's address for a kernel, 0 for None.

    Args:
        strided: whether the kernel gets the tensor's strides, but for the last dimension, which has to be without gaps.

    Raises:
        ValueError: it is not on the device of `like`, has another shape or a gap in its memory, or is none of `dtypes`. A kernel
            would read or write beyond it.
    """
    if tensor is None:
        return 0
    tensor = living(tensor)
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; expected {like.device}")
    whole = tensor.is_contiguous() or (strided and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1))
    if tuple(tensor.shape) != shape or not whole:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected shape {shape} "
            f"{'with a last stride of 1' if strided else 'and no gaps'}"
        )
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
    return tensor.data_ptr()


def stream(tensor: Tensor) -> int:
    """The stream that is current on the tensor's device, where its kernels belong."""
    return 0 if emulated else torch.cuda.current_stream(tensor.device).cuda_stream


def multiprocessors(tensor: Tensor) -> int:
    """How many the tensor's GPU has; few in the emulation, where a program has to take several rows."""
    return 1 if emulated else torch.cuda.get_device_properties(tensor.device).multi_processor_count

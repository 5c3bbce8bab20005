"""The extension module `fastattn._C` and what every op of the CPU backend asks before it takes a call."""

import ctypes
import importlib
from pathlib import Path
from typing import Any

from torch import Tensor

from ..tensors import DTYPES


def _load() -> tuple[Any, str | None]:
    """The module, or None and the reason why it is not there."""
    try:
        try:
            return importlib.import_module("fastattn._C"), None
        except ImportError as error:
            # The extension takes OpenMP from the process, where torch has put it; a torch built otherwise has not.
            if "GOMP_" not in str(error) and "omp_" not in str(error):
                raise
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
            return importlib.import_module("fastattn._C"), None
    except (ImportError, OSError) as error:
        note = Path(__file__).with_name("not_built.txt")
        if note.exists():
            why = note.read_text().strip()
        elif isinstance(error, ModuleNotFoundError):
            why = "the module fastattn._C is missing"
        else:
            return None, f"the CPU backend could not be loaded: {error}"
        return None, f"the CPU backend was not built: {why}; install a C++17 compiler and reinstall fastattn"


C, reason = _load()
available: bool = C is not None

if available:
    C.isa()  # a FASTATTN_CPU_ISA that cannot be used is an error now, not at the first kernel


def unsupported(tensor: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, as one sentence; None if they can.

    The first tensor sets the device and the dtype; of the others, those that are there must have both. Absent ones are
    None.
    """
    if not available:
        return reason
    if not tensor.is_cpu:
        return f"it runs on CPU tensors, and these are on {tensor.device}"
    dtype = tensor.dtype
    if dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if tensor.ndim > 8:
        return f"its tensors have at most 8 dimensions, not {tensor.ndim}; flatten some of them"
    for other in others:
        if other is not None and (other.dtype != dtype or not other.is_cpu):
            return (
                f"its tensors must share one dtype and device, and these are {str(dtype).removeprefix('torch.')} and "
                f"{str(other.dtype).removeprefix('torch.')} on {other.device}"
            )
    return None

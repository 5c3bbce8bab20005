"""Starts a kernel, and answers what every op of the Triton backend asks before it takes a call."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..tensors import living, unlike
from . import interpreted, reason
from .chips import too_old
from .configs import Config

_one_at_a_time = threading.Lock()

# What takes a launch in the place of the GPU: (kernel, arguments, constants, config).
Recorder = Callable[[Any, tuple, dict[str, Any], Config], None]
_recorder: Recorder | None = None


@contextlib.contextmanager
def record_launches(recorder: Recorder) -> Iterator[None]:
    """Inside the `with` block no kernel runs: the recorder gets each launch. Tensors may be on the meta device."""
    global _recorder
    previous, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = previous


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any) -> None:
    """Runs `kernel` on a grid of programs with a config's tiles. An empty grid is no launch.

    Args:
        grid: the number of programs in up to three dimensions, of which the last two are at most 65535.
        args: what the kernel takes before its constants, tensors in tuples, too; it runs on the device of the first one.
        constants: the kernel's `tl.constexpr` parameters beside those of the config.
    """
    if _recorder is not None:
        _recorder(kernel, args, {**constants, **config.tiles}, config)
        return
    if 0 in grid:
        return
    args = _living(args)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    # The interpreter puts its own functions in the place of Triton's while a kernel runs: one thread at a time.
    with _one_at_a_time if interpreted else torch.cuda.device_of(next(_tensors(args))):
        kernel[grid](*args, **constants, **config.tiles, **options)


def _living(args: tuple) -> tuple:
    """The arguments with the memory that is meant in the place of each tensor."""
    found = (
        living(arg) if isinstance(arg, Tensor) else _living(arg) if isinstance(arg, tuple) else arg for arg in args
    )
    return type(args)(*found) if hasattr(args, "_fields") else tuple(found)


def _tensors(args: tuple) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)


def unsupported(tensor: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, as one sentence; None if they can.

    The first tensor sets the device and the dtype; of the others, those that are there must have both. Absent ones are None.
    """
    if reason is not None:
        return reason
    if interpreted:
        if not tensor.is_cpu:
            return (
                f"it interprets its kernels on CPU tensors (TRITON_INTERPRET is set), and these are on {tensor.device}"
            )
        if tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; take float32 or float16 there"
    elif not tensor.is_cuda:
        return f"it runs on GPU tensors, and these are on {tensor.device}"
    elif (why := too_old(tensor.device.index)) is not None:
        return why
    return unlike(tensor, *others)


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies this dtype: float32 as torch.set_float32_matmul_precision says, exactly by default."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"

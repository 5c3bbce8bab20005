"""How the CUDA kernels are tested: on the GPU where there is one, else in the emulation of its blocks and warps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import moved

from fastattn import verify
from fastattn.backends import ABSENT
from fastattn.backends.cuda import _native

needs_cuda = pytest.mark.skipif("cuda" in ABSENT, reason=str(ABSENT.get("cuda")))

DEVICE = torch.device("cpu" if _native.emulated else "cuda")


def check(function: Callable, *args: Any, **kwargs: Any) -> None:
    """The numerics rule for the CUDA backend; outputs and the gradients of what requires one."""
    args, kwargs = moved((args, kwargs), DEVICE)
    verify.check(function, *args, backend="cuda", **kwargs).raise_if_failed()

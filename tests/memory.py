"""How much memory a call takes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A sanitizer keeps shadows and what was freed.
needs_linux = pytest.mark.skipif(
    sys.platform != "linux" or "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="the high-water mark of memory is read from /proc, of a process without a sanitizer",
)


def most_memory_of(call: Callable[[], object]) -> int:
    """The bytes by which the process's resident memory rises during the call, at the most."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is in use now
    before = _high_water_mark()
    call()
    return _high_water_mark() - before


def _high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class Allocations(TorchDispatchMode):
    """Inside the `with` block counts what torch allocates, on any device: `largest`, the bytes of one tensor, and `total`.

    All of them together, as if none were let go: no less than what a call needs at once. On meta tensors of any size nothing
    is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        made = out if len(returned) > 1 else (out,)
        for x, kind in zip(made, returned, strict=True):
            if isinstance(x, torch.Tensor) and kind.alias_info is None:  # neither a view nor an argument that is filled
                self.largest, self.total = max(self.largest, x.nbytes), self.total + x.nbytes
        return out

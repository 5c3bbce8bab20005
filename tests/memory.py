"""How much memory a call takes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is read from /proc")


def most_memory_of(call: Callable[[], object]) -> int:
    """The bytes by which the process's resident memory rises during the call, at the most."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is in use now
    before = _high_water_mark()
    call()
    return _high_water_mark() - before


def _high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

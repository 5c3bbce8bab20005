"""What a figure was measured on, the work it is held against, and the memory that a call takes."""

import ctypes
import functools
import importlib.metadata
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..backends.cpu import _native
from .peers import onednn_linear
from .timing import interleave

FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "amx_bf16",
    "neon",
    "asimd",
    "sve",
)


def cpu() -> tuple[str, list[str]]:
    """The processor's name, and which of FLAGS it has (Linux; elsewhere the name alone)."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    present = set(flags[1].split()) if flags else set()
    return (name[1] if name else platform.processor() or platform.machine()), [f for f in FLAGS if f in present]


def commit() -> str | None:
    """The commit of the checkout that fastattn is imported from, "+" after it if files differ; None outside one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def describe(device: str = "cpu") -> dict:
    """The machine, with the GPU where that is what was measured, and the versions, for a report's head."""
    import fastattn

    name, flags = cpu()
    return {
        **({} if device == "cpu" else gpu()),
        "cpu": name,
        "cpu_flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": None if _native.C is None else _native.C.isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastattn": fastattn.__version__,
        "commit": commit(),
    }


def gpu() -> dict:
    """The current GPU, and what its kernels were compiled by."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory": properties.total_memory,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": importlib.metadata.version("triton"),
    }


@dataclass(frozen=True)
class Yardstick:
    """Work that is timed beside a case, in the same rounds, to say how fast this machine was at that moment.

    Attributes:
        call: the work.
        share: the case takes at least this many times as long as the call does.
    """

    call: Callable[[], object]
    share: float


class Yardsticks:
    """The two things that every kernel is made of: multiplying matrices and moving bytes.

    `matmul` is a product of two square matrices with about as many operations as the case needs, up to
    1024 × 1024 × 1024 (on a GPU 8192³); the fastest of torch's and oneDNN's, in the dtype or in float32. `copy` copies as
    many bytes as the case moves, so that what stays in the caches is held against a copy in the caches.
    """

    def __init__(self, seconds: float = 0.2, device: str = "cpu") -> None:
        self._seconds = seconds  # to find the fastest product
        self._device = device
        self._largest = (
            (1024, 28) if device == "cpu" else (8192, 32)
        )  # of a matrix the side, of a copy the bits of its bytes
        self._fastest: dict[tuple[torch.dtype, int], Callable[[], object]] = {}

    def of(self, dtype: torch.dtype, flops: float, moved: float) -> dict[str, Yardstick]:
        """The yardsticks of a case with so much to do; none for work that it has not."""
        found = {}
        if flops > 0:
            size = min(max(32 * round((flops / 2) ** (1 / 3) / 32), 64), self._largest[0])
            found["matmul"] = Yardstick(self._matmul(dtype, size), flops / (2 * size**3))
        if moved > 0:
            size = 2 ** min(max(round(math.log2(moved)), 12), self._largest[1])
            source = torch.ones(size // 8, device=self._device)  # float32; half of the bytes are read, half written
            found["copy"] = Yardstick(functools.partial(torch.empty_like(source).copy_, source), moved / size)
        return found

    def _matmul(self, dtype: torch.dtype, size: int) -> Callable[[], object]:
        if (dtype, size) not in self._fastest:
            calls: list[Callable[[], object]] = []
            for kind in {dtype, torch.float32}:
                a, b = torch.randn(2, size, size, device=self._device).to(kind)  # a GPU multiplies ones faster
                calls.append(functools.partial(torch.mm, a, b.T))
                onednn = onednn_linear()
                if onednn is not None and self._device == "cpu" and kind in (torch.float32, torch.bfloat16):
                    calls.append(functools.partial(onednn, a, b))
            samples = interleave(calls, seconds=self._seconds, min_rounds=3, device=self._device)
            self._fastest[dtype, size] = min(zip(samples, calls, strict=True), key=lambda pair: min(pair[0]))[1]
        return self._fastest[dtype, size]


def peak_memory(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes by which the process grows at most during a call, results included; None where Linux does not tell.

    Seen from outside, so that a kernel's scratch counts as torch's tensors do. On a GPU it is what torch's allocator gave
    out at most, from which the kernels take theirs, too. Call it once before: what is made on a first call and kept is no
    part of it.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # free memory that the allocator keeps would hide what the call takes
        reset.write_text("5")  # sets the high-water mark to the present size
        before = _kilobytes(status.read_text(), "VmRSS")
        call()
        return max(0, _kilobytes(status.read_text(), "VmHWM") - before) * 1024
    except (OSError, AttributeError, ValueError):
        return None


def _kilobytes(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", status, re.M)
    if found is None:
        raise ValueError(f"no {name} in /proc/self/status")
    return int(found[1])

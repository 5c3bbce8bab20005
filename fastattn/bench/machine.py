"""What a figure was measured on, and the rates at which this machine can multiply and copy at all."""

import math
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

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


def describe() -> dict:
    """The machine and the versions, for a report's head."""
    import fastattn

    name, flags = cpu()
    return {
        "cpu": name,
        "cpu_flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastattn": fastattn.__version__,
        "commit": commit(),
    }


class Floors:
    """The best this machine does at the two things every kernel is made of, measured when first asked for.

    A computation of `flops` operations that moves `moved` bytes takes at least the longer of the two times. The matrix
    rate is the best of torch's product and oneDNN's at 1024 × 1024 × 1024, in the dtype or in float32; the bandwidth is
    that of a copy of as many bytes as the computation moves, so that what stays in the caches is compared with a copy
    in the caches.
    """

    def __init__(self, seconds: float = 0.3) -> None:
        self._seconds = seconds
        self._matmul: dict[torch.dtype, float] = {}  # flops a second
        self._copy: dict[int, float] = {}  # bytes a second, by bytes moved

    def seconds(self, dtype: torch.dtype, flops: float, moved: float) -> tuple[float, float]:
        """The shortest time for this many floating-point operations, and the shortest for this many bytes."""
        matmul = max(self._matmul_rate(dtype), self._matmul_rate(torch.float32))
        return flops / matmul, moved / self._copy_rate(moved)

    def as_dict(self) -> dict:
        """For JSON: what was measured so far."""
        return {
            "matmul_gflops": {str(d).removeprefix("torch."): rate / 1e9 for d, rate in self._matmul.items()},
            "copy_gbytes_per_s": {str(size): rate / 1e9 for size, rate in sorted(self._copy.items())},
        }

    def _matmul_rate(self, dtype: torch.dtype) -> float:
        if dtype not in self._matmul:
            size = 1024
            a, b = torch.randn(2, size, size).to(dtype)
            calls = [lambda: torch.mm(a, b.T)]
            onednn = onednn_linear()
            if onednn is not None:
                calls.append(lambda: onednn(a, b))
            with torch.no_grad():
                samples = interleave(calls, seconds=self._seconds, min_rounds=3)
            self._matmul[dtype] = 2 * size**3 / min(min(own) for own in samples)
        return self._matmul[dtype]

    def _copy_rate(self, moved: float) -> float:
        size = 2 ** min(max(round(math.log2(max(moved, 1.0))), 16), 28)
        if size not in self._copy:
            source = torch.ones(size // 8)  # float32; half of the bytes are read, half written
            target = torch.empty_like(source)
            (samples,) = interleave([lambda: target.copy_(source)], seconds=self._seconds, min_rounds=3)
            self._copy[size] = size / min(samples)
        return self._copy[size]

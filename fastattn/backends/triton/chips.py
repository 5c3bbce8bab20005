"""The chips that kernels are compiled and tuned for, and the one that a call runs on."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chip:
    """One generation of GPUs.

    Attributes:
        name: NVIDIA's sm_<capability>, or AMD's gfx name.
        backend: Triton's name for the compiler: cuda or hip.
        arch: Triton's name for the generation.
        warp_size: threads a warp.
        shared: bytes of shared memory that one block can have.
        registers: 32-bit registers of one multiprocessor.
        matrix: what the matrix instructions are called in the compiled code (PTX; for AMD its assembly).
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared: int
    registers: int
    matrix: str


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 80, 32, 163 * 1024, 65536, "mma.sync"),  # A100
        Chip("sm_86", "cuda", 86, 32, 99 * 1024, 65536, "mma.sync"),  # and 8.9: GeForce 30 and 40, A10, L4
        Chip("sm_90", "cuda", 90, 32, 227 * 1024, 65536, "wgmma"),  # H100, H200
        Chip("sm_100", "cuda", 100, 32, 227 * 1024, 65536, "tcgen05"),  # B200
        Chip("gfx942", "hip", "gfx942", 64, 64 * 1024, 131072, "v_mfma"),  # MI300
    )
}

# By compute capability; GeForce 50 (12.x) has the shared memory and the instructions of sm_86.
_OF_CAPABILITY = ((12, 0, "sm_86"), (10, 0, "sm_100"), (9, 0, "sm_90"), (8, 1, "sm_86"), (8, 0, "sm_80"))

_asked: Chip | None = None


@contextlib.contextmanager
def use_chip(name: str) -> Iterator[Chip]:
    """Inside the `with` block launchers choose their tiles for this chip, whatever the tensors lie on."""
    global _asked
    previous, _asked = _asked, CHIPS[name]
    try:
        yield CHIPS[name]
    finally:
        _asked = previous


def chip_of(device: torch.device) -> Chip:
    """The chip whose tiles a call on this device takes; in the interpreter, which has none, an A100's."""
    if _asked is not None:
        return _asked
    return CHIPS["sm_80"] if device.type != "cuda" else _chip_of_gpu(device.index or 0)


@functools.cache
def _chip_of_gpu(index: int) -> Chip:
    if torch.version.hip is not None:
        return CHIPS["gfx942"]
    capability = torch.cuda.get_device_capability(index)
    return CHIPS[next(name for major, minor, name in _OF_CAPABILITY if capability >= (major, minor))]


@functools.cache
def too_old(index: int) -> str | None:
    """Why this GPU cannot run the kernels; None if it can."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major >= 8:
        return None
    return f"it needs compute capability 8.0 (A100, GeForce 30) or later, and this GPU has {major}.{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks of one multiprocessor's size run at once; in the interpreter few, each of them taking its time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

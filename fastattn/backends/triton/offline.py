"""Compiles kernels for a chip that is not there, and reads from the binary what they need of it.

The launchers themselves run, on meta tensors (`calls/`), so what is compiled is what a GPU would be asked to run, with the
arguments' types, alignments and constants. This needs a process without TRITON_INTERPRET.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from . import _launch
from .chips import Chip, use_chip
from .configs import Config


@dataclass(frozen=True)
class Compiled:
    """What one launch needs of its chip.

    Attributes:
        kernel, chip: names.
        config: the row's config that was compiled.
        registers: 32-bit registers a thread.
        spills: bytes a thread keeps in local memory for want of registers.
        shared: bytes of shared memory a block.
        blocks: how many blocks fit on a multiprocessor by registers and shared memory.
        multiplies: whether the kernel has matrix products of 16-bit elements.
        matrix: the matrix instructions that it has: the chip's own, those of an older one, or "".
        described: whether its source loads by tensor descriptors.
        copies: whether the copy engine does that.
        specialised: whether its source asks for warps with tasks of their own.
        divided: whether they have them.
    """

    kernel: str
    chip: Chip
    config: Config
    registers: int
    spills: int
    shared: int
    blocks: int
    multiplies: bool
    matrix: str
    described: bool
    copies: bool
    specialised: bool
    divided: bool

    @property
    def faults(self) -> list[str]:
        """What breaks the budget of the config."""
        faults = []
        if self.spills > self.config.spills:
            faults.append(f"spills {self.spills} bytes a thread, {self.config.spills} are allowed")
        if self.shared > self.chip.shared:
            faults.append(f"takes {self.shared} bytes of shared memory, the chip has {self.chip.shared}")
        if self.blocks < self.config.blocks:
            faults.append(f"{self.blocks} blocks fit on a multiprocessor, {self.config.blocks} are expected")
        if self.multiplies and self.matrix != self.chip.matrix and (self.config.newest or not self.matrix):
            faults.append(f"has {self.matrix or 'no matrix instructions'} instead of {self.chip.matrix}")
        if self.described and not self.copies:
            faults.append("loads what descriptors describe without the copy engine")
        if self.specialised and not self.divided:
            faults.append("has no warps with tasks of their own")
        return faults


class _Driver:
    """What Triton asks of a GPU before it compiles, answered for a chip."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    def get_current_device(self) -> str:
        return self.chip.name

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.chip.backend, self.chip.arch, self.chip.warp_size)


@contextlib.contextmanager
def _compiling_for(chip: Chip) -> Iterator[None]:
    previous = driver._active
    driver.set_active(_Driver(chip))  # type: ignore[arg-type]
    try:
        with use_chip(chip.name):
            yield
    finally:
        driver._active = previous


def compile_call(call: Callable[[], Any], chip: Chip) -> list[Compiled]:
    """Every kernel that the call (of a launcher, on meta tensors) would launch on this chip."""
    found = []

    def compile_launch(kernel: Any, args: tuple, constants: dict[str, Any], config: Config) -> None:
        compiled = kernel.warmup(
            *args,
            **constants,
            grid=(1,),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
        found.append(_read(kernel.__name__, compiled, config, chip))

    with _compiling_for(chip), _launch.record_launches(compile_launch):
        call()
    return found


def _read(kernel: str, compiled: Any, config: Config, chip: Chip) -> Compiled:
    if chip.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills = _number(text, r"\.vgpr_count:\s*(\d+)"), 4 * _number(text, r"\.vgpr_spill_count:\s*(\d+)")
    else:
        text = compiled.asm["ptx"]
        usage = _resource_usage(compiled.asm["cubin"])
        registers, spills = _number(usage, r"REG:(\d+)"), _number(usage, r"STACK:(\d+)")
    shared = compiled.metadata.shared
    threads = compiled.metadata.num_warps * chip.warp_size  # warp specialisation adds warps to the config's
    by_registers = chip.registers // (max(registers, 1) * threads)
    by_shared = chip.shared // shared if shared else by_registers
    return Compiled(
        kernel,
        chip,
        config,
        registers,
        spills,
        shared,
        blocks=min(by_registers, by_shared),
        multiplies=re.search(r"tt\.dot.*x(bf16|f16)>", compiled.asm["ttir"]) is not None,
        matrix=next((name for name in (chip.matrix, "mma.sync") if name in text), ""),
        described="tt.descriptor_load" in compiled.asm["ttir"],
        copies="cp.async.bulk.tensor" in text,
        specialised="tt.warp_specialize" in compiled.asm["ttir"],
        divided="ttg.warp_specialize" in compiled.asm.get("ttgir", ""),
    )


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}; this version of Triton is not known")
    return int(match.group(1))


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout

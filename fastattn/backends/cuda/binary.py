"""What the compiler made of the CUDA kernels: read from the built extension, which holds machine code for each generation."""

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

REGISTERS = 65536  # of a multiprocessor, in every generation


@dataclass(frozen=True)
class Kernel:
    """What is known of a kernel's source.

    Attributes:
        spills: bytes a thread may keep in local memory.
        arguments: the numbers and flags among its template arguments, in words: for a flag those for false and true.
        threads: of a block.
        block: the place of the flag that says whether it may have 1024 of them.
    """

    spills: int
    arguments: tuple[str | tuple[str, str], ...] = ()
    threads: int = 128
    block: int | None = None


_ALIGNED = ("unaligned", "aligned")
_NORM = ("{} vectors", ("a row by a warp", "a row by a block"), _ALIGNED)
# A norm's block of 1024 threads has 64 registers each. The longest rows exceed them: backward beyond 8192 features in 16 bits and
# 4096 in float32, forward beyond 8192 in float32. On sm_100a attend with four rows stores one register before its loops and loads
# it behind them.
KERNELS = {
    "norm_forward": Kernel(16, _NORM, block=1),
    "norm_backward": Kernel(400, _NORM, block=1),
    "attend": Kernel(8, ("{} rows", "{} lanes a key", "{} vectors", _ALIGNED)),
    "combine": Kernel(0),
    "attend_hopper": Kernel(0, ("head_dim {}",), threads=384),  # for other generations it is empty
}
_NAME = re.compile(rf"\d+({'|'.join(KERNELS)})I((?:(?!L[ib]\d).)*?)((?:L[ib]\d+E)*)EEv")
_ELEMENTS = {"f": "float32", "BFloat16": "bfloat16", "Half": "float16"}


@dataclass(frozen=True)
class Built:
    """One kernel for one generation.

    Attributes:
        kernel: its name.
        variant: its template arguments in words.
        chip: sm_80, sm_90a, …
        threads: of its largest block.
        registers, spills: 32-bit registers and bytes of local memory a thread.
        shared: bytes of shared memory a block.
    """

    kernel: str
    variant: str
    chip: str
    threads: int
    registers: int
    spills: int
    shared: int

    @property
    def faults(self) -> list[str]:
        """What breaks the kernel's budget."""
        faults = []
        allowed = KERNELS[self.kernel].spills
        if self.spills > allowed:
            faults.append(f"spills {self.spills} bytes a thread, {allowed} are allowed")
        if self.registers * self.threads > REGISTERS:
            faults.append(f"{self.threads} threads of {self.registers} registers do not fit")
        return faults


def built() -> list[Built]:
    """Every kernel of `fastattn._cuda`.

    Raises:
        FileNotFoundError: the extension was not built, or Triton, whose cuobjdump reads it, is not there.
    """
    root = Path(__file__).parents[2]
    library = next(iter(root.glob("_cuda.*.so")), None)
    triton = importlib.util.find_spec("triton")
    if library is None or triton is None or triton.origin is None:
        raise FileNotFoundError("fastattn._cuda was not built, or triton is not installed")
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, chip = [], ""
    for line in text.splitlines():
        if "arch =" in line:
            chip = line.split("arch =")[1].strip()
        elif "Function" in line:
            name = _NAME.search(line)
        elif "REG:" in line and name is not None:
            usage = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", line)}
            kernel, types, literals = name.groups()
            numbers = [int(number) for number in re.findall(r"L[ib](\d+)E", literals)]
            known = KERNELS[kernel]
            threads = 1024 if known.block is not None and numbers[known.block] else known.threads
            variant = ", ".join([_types(types), *_words(known, numbers)])
            found.append(Built(kernel, variant, chip, threads, usage["REG"], usage["STACK"], usage["SHARED"]))
    return found


def _words(kernel: Kernel, numbers: list[int]) -> list[str]:
    pairs = zip(kernel.arguments, numbers, strict=True)
    return [word.format(number) if isinstance(word, str) else word[number] for word, number in pairs]


def _types(mangled: str) -> str:
    """The dtype of the rows and, where another, that of the parameters."""
    rows, parameters = (*re.findall(r"BFloat16|Half|f(?=f|$)", mangled), "")[:2]  # the same again is written S3_
    rows = _ELEMENTS[rows]
    parameters = _ELEMENTS.get(parameters, rows)
    return rows if rows == parameters else f"{rows} with {parameters} parameters"

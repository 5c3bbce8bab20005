"""What the compiler made of the CUDA kernels: read from the built extension, which holds machine code for each generation."""

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Kernels are launched with at most as many threads as their launch bounds say: those of a row's block, or four warps.
_NAME = re.compile(r"\d+(norm_forward|norm_backward)I(.*?)Li(\d)ELb([01])ELb([01])EEEv")
_ELEMENTS = {"f": "float32", "BFloat16": "bfloat16", "Half": "float16"}
REGISTERS = 65536  # of a multiprocessor, in every generation

# Bytes a thread may keep in local memory. A block of 1024 threads has 64 registers each. The longest rows exceed them:
# backward beyond 8192 features in 16 bits and 4096 in float32, forward beyond 8192 in float32.
SPILLS = {"norm_forward": 16, "norm_backward": 400}


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
        if self.spills > SPILLS[self.kernel]:
            faults.append(f"spills {self.spills} bytes a thread, {SPILLS[self.kernel]} are allowed")
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
            kernel, types, vectors, block, aligned = name.groups()
            variant = f"{_types(types)}, {vectors} vectors, {'block' if block == '1' else 'warp'} a row"
            found.append(
                Built(
                    kernel,
                    variant + ("" if aligned == "1" else ", unaligned"),
                    chip,
                    1024 if block == "1" else 128,
                    usage["REG"],
                    usage["STACK"],
                    usage["SHARED"],
                )
            )
    return found


def _types(mangled: str) -> str:
    """The dtype of the rows and, where another, that of the parameters."""
    rows, parameters = (*re.findall(r"BFloat16|Half|f(?=f|$)", mangled), "")[:2]  # the same again is written S3_
    rows = _ELEMENTS[rows]
    parameters = _ELEMENTS.get(parameters, rows)
    return rows if rows == parameters else f"{rows} with {parameters} parameters"

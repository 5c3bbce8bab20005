"""Builds the extension modules from csrc/ with pybind11 and ninja; torch is not needed to build.

    fastattn._C               csrc/cpu: every file that holds a kernel once per instruction set
    fastattn._cuda            csrc/cuda, where nvcc is found
    fastattn._cuda_emulated   csrc/cuda over tests/cuda_emulator, for tests (FASTATTN_BUILD_EMULATED)

New files are found by their place. What cannot be built is left out of the installation, which says so.

Environment:
    FASTATTN_CPU_ISAS=avx2,portable   the instruction sets to build; all that the machine's architecture has by default
    FASTATTN_BUILD_EMULATED=1         also builds, for tests, the AVX-512 and AMX code paths for machines that have AVX2 only and
                                      the CUDA kernels for machines without a GPU; auto: the former in the place of what this
                                      machine lacks
    FASTATTN_CUDA_ARCHS=80,90a        the GPU generations to build for (80, 90a, 100a as far as nvcc knows them); none: no CUDA
    CUDA_HOME                         where nvcc is, if not on the PATH
    FASTATTN_SANITIZE=1               builds with AddressSanitizer and UndefinedBehaviorSanitizer
    CXX, CXXFLAGS, MAX_JOBS           the compiler, flags added to every file, how many files to compile at once
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NOTE = Path("fastattn/backends/cpu/not_built.txt")
OLDEST_NVCC = 12


@dataclass(frozen=True)
class Isa:
    """An instruction set that the kernels are compiled for.

    Attributes:
        known_as: what /proc/cpuinfo calls its newest instructions; of an emulation, those that it stands for.
    """

    name: str
    flags: tuple[str, ...]
    lanes: int
    known_as: str
    bf16_pairs: bool = False
    matrix_unit: bool = False
    emulation: bool = False

    @property
    def compile_flags(self) -> list[str]:
        defines = [f"-DFASTATTN_ISA={self.name}", f"-DFASTATTN_LANES={self.lanes}"]
        defines += ["-DFASTATTN_BF16_PAIRS=1"] if self.bf16_pairs else []
        defines += ["-DFASTATTN_MATRIX_UNIT=1"] if self.matrix_unit else []
        # Nobody waits for an emulation's kernels, but for its compilation: a third less. Multiplications and additions are still
        # fused, as everywhere.
        fast_to_compile = ["-O1", "-fexpensive-optimizations"] if self.emulation else []
        return [*self.flags, *fast_to_compile, *defines]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
PORTABLE = Isa("portable", (), 4, "")
# The kernels say what is to be vectors, unrolled and inlined. What -O3 and a higher limit for inlining add to that takes
# a third longer each and gives kernels that are no faster (a geometric mean of 1.00 over attention, matrix products, norms
# and losses, forward and backward, with AVX2 and AVX-512).
_OPTIMISE = ("-O2", "-finline-limit=60")
X86 = (
    Isa("avx2", _AVX2, 8, "avx2"),
    Isa("avx512", _AVX512, 16, "avx512bw"),
    Isa("avx512_bf16", (*_AVX512, "-mavx512bf16"), 16, "avx512_bf16", bf16_pairs=True),
    Isa(
        "amx", (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"), 16, "amx_bf16", bf16_pairs=True, matrix_unit=True
    ),
    Isa("emulated512", _AVX2, 16, "avx512bw", emulation=True),
    Isa("emulated512_bf16", _AVX2, 16, "avx512_bf16", bf16_pairs=True, emulation=True),
    Isa("emulated_amx", _AVX2, 16, "amx_bf16", bf16_pairs=True, matrix_unit=True, emulation=True),
)

_WITHOUT_KERNELS = ("isa.cpp", "process.cpp")  # of csrc/cpu: the same for every instruction set


class BuildError(Exception):
    """Why the extension could not be built, as one sentence."""


def selected_isas() -> list[Isa]:
    """The instruction sets to build on this machine, as the environment asks."""
    known = [PORTABLE, *(X86 if platform.machine().lower() in ("x86_64", "amd64") else ())]
    if emulated() == "auto":  # nothing that cannot be tested here: a third of the time of build and tests is saved
        there = {"", *_cpu_flags()}
        known = [isa for isa in known if isa.emulation != (isa.known_as in there)]
    elif not emulated():
        known = [isa for isa in known if not isa.emulation]
    asked = os.environ.get("FASTATTN_CPU_ISAS", "")
    if not asked:
        return known
    names = [name.strip() for name in asked.split(",") if name.strip()]
    unknown = sorted(set(names) - {isa.name for isa in known})
    if unknown:
        valid = ", ".join(isa.name for isa in known)
        sys.exit(f"FASTATTN_CPU_ISAS names {', '.join(unknown)}; this machine can build {valid}")
    return [isa for isa in known if isa.name in names or isa.emulation]


def emulated() -> str:
    """FASTATTN_BUILD_EMULATED, empty where it asks for nothing."""
    asked = os.environ.get("FASTATTN_BUILD_EMULATED", "0")
    return "" if asked == "0" else asked


def _cpu_flags() -> set[str]:
    """The instruction sets of this machine, by Linux's names; none elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first one on the path."""
    asked = os.environ.get("CXX")
    candidates = [asked] if asked else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler was found (tried {', '.join(candidates)})")


def write_if_changed(path: Path, text: str) -> None:
    """Leaves the file's time alone if nothing changed, so that nothing is rebuilt for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class NinjaFile:
    """The text of a build.ninja that compiles files, each with flags of its own, and links them."""

    def __init__(self, build_dir: Path, cxx: list[str], cflags: list[str]) -> None:
        import pybind11

        python_headers = sorted({sysconfig.get_path(name) for name in ("include", "platinclude")})
        self.binding_flags = ["-O1", *(f"-I{path}" for path in (*python_headers, pybind11.get_include()))]
        self._dir, self._objects = build_dir, list[Path]()
        self._lines = ["ninja_required_version = 1.5"]
        self.compiler("cxx", [*cxx, *cflags, *shlex.split(os.environ.get("CXXFLAGS", ""))])

    def compiler(self, name: str, command: list[str]) -> None:
        """A rule by which files are compiled: a command that takes gcc's -M and -c."""
        self._lines += [
            f"rule {name}",
            f"  command = {self._command(command)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
        ]

    def compile(self, source: Path, folder: str, flags: list[str], compiler: str = "cxx") -> None:
        target = self._dir / folder / f"{source.stem}.o"
        self._lines += [f"build {_escape(target)}: {compiler} {_escape(source)}", f"  flags = {self._command(flags)}"]
        self._objects.append(target)

    def link(self, command: list[str], flags: list[str], output: Path) -> str:
        """The whole text; what was compiled becomes `output`."""
        self._lines += [
            "rule link",
            f"  command = {self._command(command)} $in -o $out {self._command(flags)}",
            "  description = link $out",
            f"build {_escape(output)}: link {' '.join(map(_escape, self._objects))}",
            f"default {_escape(output)}",
        ]
        return "\n".join(self._lines) + "\n"

    @staticmethod
    def _command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


_CFLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]


def cpu_ninja_file(build_dir: Path, output: Path) -> str:
    """fastattn._C: each kernel file once per instruction set, all else once, then the link."""
    compiler, isas = find_compiler(), selected_isas()
    list_of_isas = " ".join(f"X({isa.name})" for isa in isas)
    write_if_changed(build_dir / "built_isas.h", f"#define FASTATTN_FOR_EACH_ISA(X) {list_of_isas}\n")
    macos = sys.platform == "darwin"
    sanitize = os.environ.get("FASTATTN_SANITIZE", "0") not in ("", "0")
    cflags = [*_CFLAGS, *(["-O1", "-g1", "-fno-omit-frame-pointer"] if sanitize else [*_OPTIMISE, "-DNDEBUG"])]
    kernel_flags = ["-fno-math-errno", "-fno-trapping-math"]  # no kernel reads errno or the floating-point flags
    ldflags = ["-bundle", "-undefined", "dynamic_lookup"] if macos else ["-shared", "-Wl,-z,now"]
    if not macos:
        # Compiled for OpenMP but not linked with it: importing torch has put its own libgomp in the process, and the
        # kernels share torch's threads. Xcode's compiler has no OpenMP; there the kernels run on one thread.
        cflags.append("-fopenmp")
    if sanitize:
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        cflags += sanitizers
        ldflags += sanitizers
    ninja = NinjaFile(build_dir, compiler, [*cflags, f"-I{build_dir}", f"-I{ROOT}/csrc"])
    kernels = sorted(path for path in (ROOT / "csrc/cpu").glob("*.cpp") if path.name not in _WITHOUT_KERNELS)
    # Long ones first, as far as a file's size tells: the last one has the machine to itself.
    for source in sorted(kernels, key=lambda path: path.stat().st_size, reverse=True):
        for isa in reversed(isas):
            ninja.compile(source, isa.name, [*isa.compile_flags, *kernel_flags])
    for name in _WITHOUT_KERNELS:
        ninja.compile(ROOT / "csrc/cpu" / name, "common", [])
    # The bindings as one file: pybind11's headers take ten times as long to compile as one of them.
    includes_of_all = "".join(f'#include "{source.name}"\n' for source in sorted((ROOT / "csrc").glob("bindings*.cpp")))
    write_if_changed(build_dir / "all_bindings.cpp", includes_of_all)
    ninja.compile(build_dir / "all_bindings.cpp", "common", ninja.binding_flags)
    return ninja.link(compiler, ldflags, output)


def cuda_ninja_file(build_dir: Path, output: Path) -> str:
    """fastattn._cuda: the kernels by nvcc, with machine code for each generation and PTX for those to come."""
    compiler, nvcc = find_compiler(), find_nvcc()
    archs = cuda_archs(nvcc)
    ninja = NinjaFile(build_dir, compiler, [*_CFLAGS, "-DFASTATTN_CUDA_MODULE=_cuda"])
    generations = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    generations.append("-gencode=arch=compute_80,code=compute_80")
    host = ["-ccbin", compiler[-1], "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    ninja.compiler("nvcc", [nvcc, "-std=c++17", "-O3", "--threads", "2", *generations, *host])
    # The longest first: the last one has the machine to itself, and uses one core of it.
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda path: path.stat().st_size, reverse=True):
        ninja.compile(source, "cuda", [], "nvcc")
    ninja.compile(ROOT / "csrc/cuda/bindings.cpp", "cuda", ninja.binding_flags)
    return ninja.link([nvcc, "-shared", "-ccbin", compiler[-1]], [], output)


def emulated_ninja_file(build_dir: Path, output: Path) -> str:
    """fastattn._cuda_emulated: the same kernels as C++, over the emulation of a GPU's blocks."""
    compiler = find_compiler()
    ninja = NinjaFile(build_dir, compiler, [*_CFLAGS, "-DFASTATTN_CUDA_MODULE=_cuda_emulated"])
    flags = ["-O1", "-x", "c++", "-DFASTATTN_CUDA_EMULATED", f"-I{ROOT}/tests/cuda_emulator"]
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        ninja.compile(source, "emulated", flags)
    ninja.compile(ROOT / "csrc/cuda/bindings.cpp", "emulated", ninja.binding_flags)
    return ninja.link(compiler, ["-shared"], output)


def find_nvcc() -> str:
    """CUDA's compiler."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("nvcc was not found on the PATH or in CUDA_HOME")
    version = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if version is None or int(version[1]) < OLDEST_NVCC:
        raise BuildError(f"{nvcc} is older than CUDA {OLDEST_NVCC}, whose headers the kernels for Hopper need")
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """The generations to build for: those asked for, or those of ours that this nvcc knows."""
    asked = os.environ.get("FASTATTN_CUDA_ARCHS", "")
    if asked:
        return [name.strip() for name in asked.split(",")]
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ("80", "90a", "100a") if f"sm_{arch.rstrip('a')}" in known]


EXTENSIONS = {
    "fastattn._C": cpu_ninja_file,
    "fastattn._cuda": cuda_ninja_file,
    "fastattn._cuda_emulated": emulated_ninja_file,
}


def extensions() -> list[Extension]:
    """What to build here. Optional: an editable install then does not ask for a file that could not be built."""
    names = ["fastattn._C"]
    if sys.platform == "linux":
        if os.environ.get("FASTATTN_CUDA_ARCHS", "") != "none" and (
            os.environ.get("CUDA_HOME") or shutil.which("nvcc")
        ):
            names.append("fastattn._cuda")
        if emulated():
            names.append("fastattn._cuda_emulated")
    return [Extension(name, sources=[], optional=True) for name in names]


class NinjaBuildExt(build_ext):
    """build_ext that hands the whole extension to ninja, and leaves it out of an installation that cannot build it."""

    def run(self) -> None:
        self.asked_for_alone = bool(self.inplace) and not self.editable_mode  # `setup.py build_ext --inplace`
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        note = Path(self.build_lib).resolve() / NOTE
        kernels = "CPU" if ext.name == "fastattn._C" else "CUDA"
        try:
            self._build(ext.name, output)
        except BuildError as error:
            output.unlink(missing_ok=True)
            if self.asked_for_alone:
                sys.exit(f"fastattn: {error}")
            message = [f"fastattn: the {kernels} backend was NOT built:", f"    {error}"]
            if kernels == "CPU":
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(f"{error}\n")
                message += [
                    "The package works all the same, in plain torch. For the fast kernels install a C++17 compiler (g++ 11",
                    "or newer, or clang++) and Python's headers, and install fastattn again.",
                ]
            print("\n".join(["*" * 100, *message, "*" * 100]), file=sys.stderr, flush=True)
        else:
            if kernels == "CPU":
                note.unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        """For builds in place: also brings the note why there is no extension, and takes stale files away."""
        for ext in self.extensions:
            filename = self.get_ext_filename(ext.name)
            if not (Path(self.build_lib) / filename).exists():
                (ROOT / filename).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        note = Path(self.build_lib) / NOTE
        if note.exists():
            shutil.copyfile(note, ROOT / NOTE)
        else:
            (ROOT / NOTE).unlink(missing_ok=True)

    def _build(self, name: str, output: Path) -> None:
        try:
            import ninja
        except ImportError:
            program = shutil.which("ninja")
        else:
            program = str(Path(ninja.BIN_DIR) / "ninja")
        if program is None:
            raise BuildError("ninja was not found; pip install ninja")
        # The CPU's objects keep their place at the top.
        build_dir = Path(self.build_temp).resolve() / ("" if name == "fastattn._C" else name)
        write_if_changed(build_dir / "build.ninja", EXTENSIONS[name](build_dir, output))
        output.parent.mkdir(parents=True, exist_ok=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        result = subprocess.run([program, "-C", str(build_dir), *jobs], stdout=subprocess.PIPE, text=True)
        print(result.stdout, end="", flush=True)
        if result.returncode != 0:
            errors = [line for line in result.stdout.splitlines() if "error" in line.lower()]
            raise BuildError(f"the build of {name} failed: {errors[0] if errors else 'see the output above'}")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuildExt})

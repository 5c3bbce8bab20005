"""The build: every instruction set's code compiles, whatever this machine has."""

import os
import platform
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastattn.backends.cpu import _native

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not _native.available,
    reason="there is one instruction set, or no compiler",
)

THERE = set(_native.C.isas()) if _native.available else set()
LACKING = [name for name in ("avx2", "avx512", "avx512_bf16", "amx") if name not in THERE]


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    """The names of setup.py, without a build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytest.importorskip("setuptools"), "setup", lambda **options: None)
        return runpy.run_path(str(ROOT / "setup.py"))


# Those that have code of their own for an instruction set: matrix tiles, and conversions.
@pytest.mark.parametrize("source", ["gemm.cpp", "attention_forward.cpp", "attention_decode.cpp"])
@pytest.mark.parametrize("name", LACKING)
def test_what_this_machine_lacks_compiles(build: dict[str, Any], tmp_path: Path, name: str, source: str) -> None:
    isa = next(isa for isa in build["X86"] if isa.name == name)
    command = [*build["find_compiler"](), *build["_CFLAGS"], "-O0", "-fopenmp", f"-I{ROOT}/csrc", *isa.compile_flags]
    source_file = str(ROOT / "csrc" / "cpu" / source)
    done = subprocess.run(
        [*command, "-c", source_file, "-o", str(tmp_path / "x.o")],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "there", [set(), {"avx2"}, {"avx2", "avx512bw"}, {"avx2", "avx512bw", "avx512_bf16", "amx_bf16"}]
)
def test_each_set_is_tested_as_it_is_or_emulated(build: dict[str, Any], there: set[str], monkeypatch) -> None:
    selected = build["selected_isas"]
    monkeypatch.delenv("FASTATTN_CPU_ISAS", raising=False)
    monkeypatch.setenv("FASTATTN_BUILD_EMULATED", "auto")
    monkeypatch.setitem(selected.__globals__, "_cpu_flags", lambda: there)
    names = {isa.name for isa in selected()}
    assert "portable" in names
    assert ("avx2" in names) == ("avx2" in there)
    for real, emulation, known_as in (
        ("avx512", "emulated512", "avx512bw"),
        ("avx512_bf16", "emulated512_bf16", "avx512_bf16"),
        ("amx", "emulated_amx", "amx_bf16"),
    ):
        assert (real in names) == (known_as in there)
        assert (emulation in names) == (known_as not in there)


@pytest.mark.parametrize(("emulated", "emulations"), [("0", False), ("1", True)])
def test_an_install_has_every_set(build: dict[str, Any], emulated: str, emulations: bool, monkeypatch) -> None:
    monkeypatch.delenv("FASTATTN_CPU_ISAS", raising=False)
    monkeypatch.setenv("FASTATTN_BUILD_EMULATED", emulated)
    names = [isa.name for isa in build["selected_isas"]()]
    assert names == ["portable", *(isa.name for isa in build["X86"] if emulations or not isa.emulation)]

"""Every Triton kernel, with every row of the table of configurations, compiles for a chip and keeps its budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_backend import needs_triton

from fastattn.backends.triton.calls import OPS, calls
from fastattn.backends.triton.chips import CHIPS, use_chip
from fastattn.backends.triton.configs import TABLE

pytestmark = needs_triton

# Compiling for every chip takes fifteen minutes of one core, so the tests do it for one, in 16 bits, and
# `python -m fastattn kernels --dtype bfloat16 float32` for all. FASTATTN_TEST_CHIPS=sm_80,gfx942 asks for others, in both dtypes.
COMPILED = os.environ.get("FASTATTN_TEST_CHIPS", "sm_90").split(",")
DTYPES = ("bfloat16", "float32") if "FASTATTN_TEST_CHIPS" in os.environ else ("bfloat16",)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What `python -m fastattn kernels` finds, in a process that compiles instead of interpreting."""
    file: Path = tmp_path_factory.mktemp("kernels") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "fastattn",
        "kernels",
        "--dtype",
        *DTYPES,
        "--chip",
        *COMPILED,
        "--json",
        str(file),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert file.exists(), done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("chip", COMPILED)
def test_every_kernel_keeps_its_budget(table: list[dict], chip: str) -> None:
    entries = [entry for entry in table if entry["chip"] == chip]
    assert {entry["op"] for entry in entries} == set(OPS)
    faults = [f"{e['kernel']} {e['tiles']} ({e['call']}): {'; '.join(e['faults'])}" for e in entries if e["faults"]]
    assert not faults, "\n".join(faults)


def test_the_calls_use_every_row_of_the_table() -> None:
    from fastattn.backends.triton._launch import record_launches

    used = set()
    for chip in CHIPS:
        for dtype in (torch.float32, torch.bfloat16):
            for op in OPS:
                with use_chip(chip), record_launches(lambda kernel, a, c, config: used.add(id(config))):
                    for _, call in calls(op, dtype):
                        call()
    unused = [row for row in TABLE if id(row.config) not in used]
    assert not unused

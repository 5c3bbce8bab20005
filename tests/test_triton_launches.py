"""What a launch hands to a kernel, by Triton's own launcher, with a driver that stands in for CUDA's.

The interpreter and the offline compiler show what a kernel does with its parameters. Between them and a GPU is the launcher:
it takes tuples apart, leaves out what was compiled in, and makes tensor maps.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton_backend import needs_triton

from fastattn.backends.triton import interpreted

HERE = Path(__file__).resolve().parent

compiler = shutil.which("cc")
pytestmark = [
    needs_triton,
    pytest.mark.skipif(not interpreted, reason="a GPU has the driver itself"),
    pytest.mark.skipif(compiler is None or sys.platform != "linux", reason="it builds a driver with cc"),
]


def test_kernels_get_what_their_launchers_were_given(tmp_path: Path) -> None:
    import triton

    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = tmp_path / "libcuda.so.1"
    source = HERE / "cuda_driver" / "driver.c"
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{headers}", str(source), "-o", str(library)], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_launches.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    launches = json.loads(done.stdout.splitlines()[-1])
    expected = {"attention_forward", "attention_backward_key", "attention_mask_gradient", "matmul", "matmul_persistent"}
    assert expected <= {launch["kernel"] for launch in launches}
    assert not [launch for launch in launches if launch["wrong"]]
    assert all(launch["parameters"] > 3 for launch in launches)

"""The Triton backend: GPU kernels, one source for NVIDIA and AMD chips.

Each op's file holds its kernels and their launchers. `chips.py` says what a chip has, `configs.py` which tiles a kernel takes
on it, `_launch.py` starts a kernel: on a GPU, in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1, set before
fastattn is imported), or, for `python -m fastattn kernels`, into the offline compiler.
"""

import importlib.util
import os

import torch


def _reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton backend needs the package triton; pip install 'fastattn[gpu]'"
    if torch.version.cuda is None and torch.version.hip is None and not interpreted:
        return "the triton backend runs on GPUs, and this torch was built without; TRITON_INTERPRET=1 interprets its kernels"
    return None


interpreted: bool = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

# Why no kernel can be run in this process, or None. Where there is a reason, triton is not imported, which takes a while.
reason: str | None = _reason()

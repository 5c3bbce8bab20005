"""Run by test_triton_launches.py, in a process without a GPU whose libcuda.so.1 is cuda_driver/driver.c: launches kernels.

Prints, as JSON, one entry a launch: the kernel's name, how many parameters it got, and those that differ from what its launcher
was given, in the order of the kernel's signature.
"""

import ctypes
import dataclasses
import json
import struct
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.backends.triton import _launch
from fastattn.backends.triton.calls import calls
from fastattn.backends.triton.chips import use_chip

CALLS = {
    "attention": ("nothing", "bias, dropout"),
    "attention_varlen": ("causal",),
    "linear": ("64 rows, bias, GELU, residual", "4096 rows, bias, GELU, residual"),
}


def pretend() -> None:
    """Makes torch, built without CUDA, answer Triton as if there were an H100."""
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    driver.set_active(CudaDriver())


def real(given: Any) -> Any:
    """The same with memory, of its own, in the place of a meta tensor's; nobody reads it."""
    if isinstance(given, Tensor):
        return torch.empty(64, dtype=given.dtype)
    return dataclasses.replace(given, base=real(given.base)) if isinstance(given, TensorDescriptor) else given


def parameters(given: Any) -> Iterator[tuple[str, Any]]:
    """(format, value) of what a kernel receives of an argument: absent ones, constants and ones are compiled in."""
    if isinstance(given, Tensor):
        yield "Q", given.data_ptr()
    elif isinstance(given, TensorDescriptor):
        yield "Q", given.base.data_ptr()
        for size in given.shape:
            yield "i", size
        for stride in given.strides:
            yield "q", stride
    elif isinstance(given, float):
        yield "f", given
    elif isinstance(given, int) and given != 1:
        yield "i" if -(2**31) <= given < 2**31 else "q", given
    else:
        assert given is None or given == 1 or isinstance(given, tl.constexpr), given


def main() -> None:
    stand_in = ctypes.CDLL("libcuda.so.1")
    stand_in.launched.restype = ctypes.c_uint64
    pretend()
    launches: list[dict[str, Any]] = []

    def launch(kernel: Any, args: tuple, constants: dict[str, Any], config: Any) -> None:
        args = tree_map(real, args)
        expected = [parameter for given in tree_leaves(args) for parameter in parameters(given)]
        stand_in.expect(len(expected))
        kernel[(1,)](
            *args, **constants, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True
        )
        wrong = []
        for number, (kind, value) in enumerate(expected):
            size = struct.calcsize(kind)
            found = struct.unpack(kind, struct.pack("Q", stand_in.launched(number))[:size])[0]
            if found != struct.unpack(kind, struct.pack(kind, value))[0]:
                wrong.append((number, kind, value, found))
        launches.append({"kernel": kernel.__name__, "parameters": len(expected), "wrong": wrong})

    with use_chip("sm_90"), _launch.record_launches(launch):
        for op, names in CALLS.items():
            for name, call in calls(op, torch.bfloat16):
                if name in names:
                    call()
    print(json.dumps(launches))


main()

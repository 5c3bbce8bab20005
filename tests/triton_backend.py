"""How the Triton kernels are tested: on the GPU where there is one, else in Triton's interpreter, with each chip's tiles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import moved
from hypothesis import strategies as st

import fastattn
from fastattn import verify
from fastattn.backends import ABSENT
from fastattn.backends.triton import interpreted
from fastattn.backends.triton._launch import record_launches
from fastattn.backends.triton.chips import CHIPS, chip_of, use_chip

needs_triton = pytest.mark.skipif("triton" in ABSENT, reason=str(ABSENT.get("triton")))

DEVICE = torch.device("cpu" if interpreted else "cuda")
# The interpreter's bfloat16 is wrong (and refused): what is special about it, its stores and loads, is left to a GPU.
DTYPES = (torch.float32, torch.float16) if interpreted else (torch.float32, torch.float16, torch.bfloat16)
dtypes = st.sampled_from(DTYPES)
# A GPU takes its own tiles; the interpreter those of every chip.
OWN = tuple(CHIPS) if interpreted else (chip_of(DEVICE).name,) if "triton" not in ABSENT else ()
chips = st.sampled_from(OWN or tuple(CHIPS))
# Those whose copy engine loads what tensor descriptors describe.
WITH_ENGINE = tuple(chip for chip in OWN if chip in ("sm_90", "sm_100"))
needs_engine = pytest.mark.skipif(not WITH_ENGINE, reason="the GPU has no copy engine (TMA)")


def on_device(tree: Any) -> Any:
    """The same arguments on the device under test; what required a gradient does so there."""
    return moved(tree, DEVICE)


def check(function: Callable, chip: str, *args: Any, **kwargs: Any) -> None:
    """The numerics rule for the Triton backend with a chip's tiles; outputs and the gradients of what requires one."""
    args, kwargs = on_device((args, kwargs))
    with use_chip(chip):
        verify.check(function, *args, backend="triton", **kwargs).raise_if_failed()


def kernels_of(call: Callable[[], object]) -> list[str]:
    """The names of the kernels that a call would launch."""
    names: list[str] = []
    with (
        fastattn.use_backend("triton"),
        record_launches(lambda kernel, args, constants, config: names.append(kernel.__name__)),
    ):
        call()
    return names

"""Every CUDA kernel in the machine code for each generation keeps its budget of registers, spills and shared memory."""

import pytest

from fastattn.backends.cuda import binary


def test_every_built_kernel_keeps_its_budget() -> None:
    """Registers and spills in the machine code for each generation; where nvcc was there to make it."""
    try:
        kernels = binary.built()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert {kernel.chip for kernel in kernels} >= {"sm_80", "sm_90a"}
    faults = [f"{k.kernel} {k.variant} {k.chip}: {'; '.join(k.faults)}" for k in kernels if k.faults]
    assert not faults, "\n".join(faults)

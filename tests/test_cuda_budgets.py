"""Every CUDA kernel in the machine code for each generation that was built keeps its budget: registers, spills, shared memory."""

import pytest

from fastattn.backends.cuda import binary


def test_every_built_kernel_keeps_its_budget() -> None:
    """Registers and spills in the machine code for each generation; where nvcc was there to make it."""
    try:
        kernels = binary.built()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert "sm_90a" in {kernel.chip for kernel in kernels}
    faults = [f"{k.kernel} {k.variant} {k.chip}: {'; '.join(k.faults)}" for k in kernels if k.faults]
    assert not faults, "\n".join(faults)

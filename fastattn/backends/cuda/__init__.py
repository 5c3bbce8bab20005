"""The CUDA backend: CUDA C++ kernels in csrc/cuda, for what Triton does less well.

FASTATTN_CUDA_EMULATED=1, set before fastattn is imported, runs the same sources on CPU tensors in an emulation of blocks,
barriers and warp shuffles (tests/cuda_emulator), where that was built (FASTATTN_BUILD_EMULATED=1).
"""

from ._native import reason as reason

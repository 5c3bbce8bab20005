"""The CPU backend: C++ kernels in csrc/cpu, forward and backward."""

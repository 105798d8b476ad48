"""Kernels below the ops: `native` loads the C++ and CUDA modules, `triton` holds Triton kernels."""

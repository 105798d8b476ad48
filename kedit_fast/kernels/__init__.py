"""Kernels below the ops: `native` calls the C++ and CUDA modules, `triton` holds the Triton kernels."""

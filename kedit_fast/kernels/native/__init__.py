"""The compiled modules `kedit_fast._cpu` (C++) and `kedit_fast._cuda` (CUDA): a file of callers each, and the loader.

Importing this package registers both backends, whether or not their modules were built.
"""

from kedit_fast.kernels.native import cpu, cuda

__all__ = ["cpu", "cuda"]

"""Whether Triton kernels can run here. The kernels themselves are loaded on first use, never at import."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

from kedit_fast.backends import Probe, register_probe


@lru_cache(maxsize=1)
def probe_triton() -> Probe:
    """Whether Triton is installed and has a device (or the interpreter)."""
    if importlib.util.find_spec("triton") is None:
        return Probe("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Probe("", "interpreter")
    if not torch.cuda.is_available():
        return Probe("no GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)")
    return Probe("", torch.cuda.get_device_name())


register_probe("triton", probe_triton)

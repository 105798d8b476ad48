"""Triton kernels, one file an op; loaded on first use, so that importing the package does not import Triton."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from kedit_fast.backends import Probe, register_probe


@lru_cache(maxsize=1)
def probe_triton() -> Probe:
    """Whether Triton is installed and has a device (or the interpreter)."""
    if importlib.util.find_spec("triton") is None:
        return Probe("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Probe(explicit_only=True)
    if not torch.cuda.is_available():
        return Probe("no GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)")
    if torch.version.hip:
        return Probe("an AMD GPU: the configurations are NVIDIA's")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return Probe(f"sm_{major}{minor}: compute capability 8.0 or higher is needed")
    return Probe()


def _describe() -> str:
    if probe_triton().explicit_only:
        return "interpreter on the CPU: slow, only when asked for"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}"


def lazy(module: str, function: str) -> Callable[..., Any]:
    """A function of `kedit_fast.kernels.triton.<module>` that is imported when it is first called."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(*args)

    return call


def declines_device(tensor: torch.Tensor) -> str:
    """Why Triton does not take tensors of this device, or ''. The interpreter takes them all."""
    if tensor.device.type == "cuda" or probe_triton().explicit_only:
        return ""
    return f"tensors on {tensor.device}"


register_probe("triton", probe_triton, _describe)

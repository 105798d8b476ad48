"""Triton kernels, one file per op, loaded on first use: importing the package does not import Triton."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
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
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        return Probe("no C compiler: Triton needs one when it first launches a kernel")
    return Probe()


def _describe() -> str:
    if probe_triton().explicit_only:
        return "interpreter on the CPU: slow, only when asked for"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def lazy(module: str, function: str) -> Callable[..., Any]:
    """A function of `kedit_fast.kernels.triton.<module>` that is imported when it is first called."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(*args)

    return call


def declines_device(tensor: torch.Tensor) -> str:
    """Why Triton does not take tensors of this device, or ''. The interpreter takes them all."""
    if probe_triton().explicit_only:
        return ""
    return _too_old(tensor.device) if tensor.device.type == "cuda" else f"tensors on {tensor.device}"


def declines_float64(*tensors: torch.Tensor | None) -> str:
    """Why the kernels, which compute in fp32, do not take these tensors, or ''."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return "float64 tensors" if wide else ""


@lru_cache(maxsize=64)
def _too_old(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"sm_{major}{minor} ({device}): compute capability 8.0 or higher is needed"


register_probe("triton", probe_triton, _describe)

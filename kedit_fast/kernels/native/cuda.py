"""Backend `cuda`: the CUDA kernels of `kedit_fast._cuda`, on tensors of an NVIDIA GPU."""

from __future__ import annotations

import re
from functools import lru_cache
from types import ModuleType

import torch

from kedit_fast.backends import Probe, register_probe
from kedit_fast.errors import BackendUnavailableError
from kedit_fast.kernels.native.loader import call, capsule, load


def module() -> ModuleType:
    """`kedit_fast._cuda`; raises BackendUnavailableError with the reason when it cannot be used."""
    loaded, reason = load("_cuda")
    if loaded is None:
        raise BackendUnavailableError(f"backend 'cuda' cannot run here: {reason}")
    return loaded


@lru_cache(maxsize=1)
def probe() -> Probe:
    """Whether `kedit_fast._cuda` can run here."""
    loaded, reason = load("_cuda")
    reason = reason if loaded is None else loaded.refusal()
    return Probe(reason or ("" if torch.cuda.is_available() else "this torch has no CUDA"))


def _describe() -> str:
    return f"sm_{module().architectures().replace(';', ', sm_')}"


def declines_device(tensor: torch.Tensor) -> str:
    """Why the CUDA kernels do not take tensors of this device, or ''."""
    return lacks_code_for(tensor.device)


@lru_cache(maxsize=64)
def lacks_code_for(device: torch.device) -> str:
    """Why the CUDA module has no code for a device, or ''."""
    if device.type != "cuda":
        return f"tensors on {device}"
    capability, built = torch.cuda.get_device_capability(device), module().architectures()
    if runs_on(built, capability):
        return ""
    return f"{device} is sm_{capability[0]}{capability[1]}, built for sm_{built.replace(';', ', sm_')}"


def runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether code built for architectures, such as "80;90" or "90a;120f", runs on a device.

    Machine code runs on its own major version, from its minor version on. PTX, which only the last architecture comes
    with, runs on every device that is not older. An `a` allows only that very device, an `f` only its major version.
    """
    parts = [re.fullmatch(r"(\d+)(\d)([af]?)", name) for name in built.split(";")]
    architectures = [((int(part[1]), int(part[2])), part[3]) for part in parts if part]
    for least, kind in architectures:
        if capability == least or (kind != "a" and capability[0] == least[0] and capability >= least):
            return True
    return bool(architectures) and architectures[-1][1] == "" and capability >= architectures[-1][0]


def rank_k_update_(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float, copy: torch.Tensor | None
) -> None:
    """Call the CUDA kernel of the op of the same name on torch's current stream."""
    stream = torch.cuda.current_stream(weight.device).cuda_stream
    left, right = left.float(), right.float()
    call(module().rank_k_update_, capsule(weight), capsule(left), capsule(right), alpha, capsule(copy), stream)


register_probe("cuda", probe, _describe)

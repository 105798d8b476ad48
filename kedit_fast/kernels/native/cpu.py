"""The only importer of the compiled modules `kedit_fast._cpu` and `kedit_fast._cuda`.

Tensors cross as DLPack capsules, so the modules link no libtorch and one build serves every torch version.
"""

from __future__ import annotations

import importlib
import os
import re
from functools import cache, lru_cache
from types import ModuleType

import torch  # before the native modules: they borrow the OpenMP runtime that torch brings
from torch.utils.dlpack import to_dlpack

from kedit_fast.backends import Probe, register_probe
from kedit_fast.errors import BackendUnavailableError, InvalidArgumentError


def build_reason(module: str) -> str:
    """Why `module` ('_cpu' or '_cuda') was not built, or '' when the build information does not say."""
    try:
        info = importlib.import_module("kedit_fast._build_info")
    except ModuleNotFoundError:
        return "not built (a source tree without build information)"
    return info.MODULES.get(module, "") or ""


@cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    reason = build_reason(name)
    if reason:
        return None, f"not built: {reason}"
    try:
        module = importlib.import_module(f"kedit_fast.{name}")
    except ModuleNotFoundError:
        return None, "not built"
    except ImportError as error:
        return None, f"built but cannot be loaded: {error}"
    if name == "_cpu" and (isa := os.environ.get("KEDIT_FAST_ISA")):
        try:
            module.select_isa(isa)
        except ValueError as error:
            return None, f"KEDIT_FAST_ISA={isa}: {error}"
    return module, ""


def cpu() -> ModuleType:
    """The C++ module; raises BackendUnavailableError with the reason when there is none."""
    module, reason = _load("_cpu")
    if module is None:
        raise BackendUnavailableError(f"backend 'cpu' cannot run here: {reason}")
    return module


def cuda() -> ModuleType:
    """The CUDA module; raises BackendUnavailableError with the reason when there is none."""
    module, reason = _load("_cuda")
    if module is None:
        raise BackendUnavailableError(f"backend 'cuda' cannot run here: {reason}")
    return module


def capsule(tensor: torch.Tensor | None):
    """A DLPack capsule of the tensor's own memory, or None."""
    return None if tensor is None else to_dlpack(tensor)


@lru_cache(maxsize=1)
def probe_cpu() -> Probe:
    """Whether the C++ module can run."""
    reason = _load("_cpu")[1]
    return Probe(reason, misconfigured=reason.startswith("KEDIT_FAST_ISA"))


def _describe_cpu() -> str:
    return f"{cpu().isa()}, {torch.get_num_threads()} threads ({cpu().thread_source()})"


@lru_cache(maxsize=1)
def probe_cuda() -> Probe:
    """Whether the CUDA module can run."""
    module, reason = _load("_cuda")
    reason = reason if module is None else module.refusal()
    return Probe(reason or ("" if torch.cuda.is_available() else "this torch has no CUDA"))


def _describe_cuda() -> str:
    return f"sm_{cuda().architectures().replace(';', ', sm_')}"


@lru_cache(maxsize=64)
def cuda_declines(device: torch.device) -> str:
    """Why the CUDA module has no code for a device, or ''."""
    if device.type != "cuda":
        return f"tensors on {device}"
    capability, built = torch.cuda.get_device_capability(device), cuda().architectures()
    if runs_on(built, capability):
        return ""
    return f"{device} is sm_{capability[0]}{capability[1]}, built for sm_{built.replace(';', ', sm_')}"


def runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Whether code for architectures, such as "80;90" or "90a;120f", runs on a device.

    Machine code runs on its own major version from its minor one on; PTX, which there is of the last architecture, on
    everything that is not older. An a allows that very device alone, an f its major version alone.
    """
    parts = [re.fullmatch(r"(\d+)(\d)([af]?)", name) for name in built.split(";")]
    every = [((int(part[1]), int(part[2])), part[3]) for part in parts if part]
    for least, kind in every:
        if capability == least or (kind != "a" and capability[0] == least[0] and capability >= least):
            return True
    return bool(every) and every[-1][1] == "" and capability >= every[-1][0]


def symmetric_rank_k_update_(
    acc: torch.Tensor, x: torch.Tensor, row_weights: torch.Tensor | None, mask: torch.Tensor | None, alpha: float
) -> None:
    """Call the C++ kernel of the op of the same name."""
    flags = None if mask is None else mask.view(torch.uint8)
    _call(
        cpu().symmetric_rank_k_update_,
        capsule(acc), capsule(x), capsule(row_weights), capsule(flags), alpha, torch.get_num_threads(),
    )  # fmt: skip


def rank_k_update_cpu(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float, copy: torch.Tensor | None
) -> None:
    """Call the C++ kernel of `rank_k_update_`."""
    threads = torch.get_num_threads()
    _call(cpu().rank_k_update_, capsule(weight), capsule(left), capsule(right), alpha, capsule(copy), threads)


def rank_k_update_cuda(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float, copy: torch.Tensor | None
) -> None:
    """Call the CUDA kernel of `rank_k_update_` on torch's current stream."""
    stream = torch.cuda.current_stream(weight.device).cuda_stream
    left, right = left.float(), right.float()
    _call(cuda().rank_k_update_, capsule(weight), capsule(left), capsule(right), alpha, capsule(copy), stream)


def declines_float64(first: torch.Tensor, *_) -> str:
    """Why the C++ kernels that compute in fp32 alone do not take these tensors, or ''."""
    if first.device.type != "cpu":
        return f"tensors on {first.device}"
    return "float64" if first.dtype == torch.float64 else ""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool) -> torch.Tensor:
    """Call the C++ kernel of the op of the same name."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, own = _rows(x), weight.contiguous()
    threads = torch.get_num_threads()
    _call(cpu().rms_norm, capsule(_rows(out)), capsule(rows), capsule(own), eps, round_first, threads)
    return out


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Call the C++ kernel of the op of the same name."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _rows(gate), _rows(up)
    _call(cpu().gated_silu, capsule(_rows(out)), capsule(gate), capsule(up), torch.get_num_threads())
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[.., d] as [n, d] with contiguous rows: the tensor's own memory where its strides allow it."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] <= 1 else flat.contiguous()


def _call(function, *args) -> None:
    try:
        function(*args)
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from None


_RUNS = Probe()
register_probe("torch", lambda: _RUNS, lambda: f"reference, torch {torch.__version__}")
register_probe("cpu", probe_cpu, _describe_cpu)
register_probe("cuda", probe_cuda, _describe_cuda)

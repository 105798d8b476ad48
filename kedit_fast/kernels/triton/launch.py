"""What all kernels share: how a kernel is launched, and with which configuration.

The function `launches` of a kernel's file makes a list of `Launch`es from tensors. Calls run that list, and
benchmarks/aot.py compiles it ahead of time, so the committed table of registers is that of the kernels users get.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch

from kedit_fast.kernels.triton.configs import INTERPRETED, Config, candidates, lookup

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
PROCESSORS = 132  # assumed where launches are made without a GPU, to be compiled only

_log = logging.getLogger("kedit_fast")
_tuned: dict[tuple[str, str, str], Tuned] = {}


@dataclass(frozen=True)
class Tuned:
    """What autotuning chose for an op, a shape class and a size."""

    config: Config
    """The fastest configuration."""
    milliseconds: float
    """Its time per call, in ms."""
    table_milliseconds: float
    """The time per call of the table's configuration, in ms."""


@dataclass(frozen=True)
class Launch:
    """One call of a kernel."""

    kernel: Any
    """A function decorated with `triton.jit`."""
    grid: tuple[int, ...]
    """Number of programs along each axis."""
    arguments: dict[str, Any]
    """Tensors and numbers, by parameter."""
    constants: dict[str, Any]
    """The `tl.constexpr` parameters."""
    config: Config
    """The tile, from which warps and stages are taken."""


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient rounded up."""
    return -(-numerator // denominator)


def architecture(device: torch.device) -> str:
    """'sm_90' and the like, or 'interpret'."""
    if INTERPRET:
        return "interpret"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 under the interpreter, so that small inputs are split too."""
    if INTERPRET:
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch on torch's current stream of `device`."""
    if device.type != "cuda":
        _run(launches)
        return
    with torch.cuda.device(device):
        _run(launches)


def _run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        meta = {} if INTERPRET else {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
        launch.kernel[launch.grid](**launch.arguments, **launch.constants, **meta)


def loads_wide(*matrices: torch.Tensor) -> bool:
    """Whether Triton loads 16 bytes of a row at once: less goes through registers, which large tiles lack."""
    return all(
        m.stride(1) == 1 and m.stride(0) % 16 == 0 and m.shape[1] % 16 == 0 and m.data_ptr() % 16 == 0 for m in matrices
    )


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """[.., d] as [n, d] with contiguous rows: the tensor's own memory where its strides allow it."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def size_class(number: int) -> str:
    """The smallest power of two not below the number: one tuned configuration serves all sizes of a class."""
    return str(1 << max(0, number - 1).bit_length())


def choose(
    op: str, shape_class: str, device: torch.device, trial: Callable[[Config], Sequence[Launch]], size: str
) -> Config:
    """The configuration for these shapes: from the table, or the fastest one when KEDIT_FAST_AUTOTUNE=1.

    `trial(config)` makes launches that write only to scratch memory; `size` names the sizes that a tuned choice is for.
    Nothing can be timed while a graph is captured: then a choice tuned earlier is used, else the table's, which is
    logged.
    """
    if INTERPRET:
        return INTERPRETED[op]
    row = lookup(op, shape_class, architecture(device))
    if os.environ.get("KEDIT_FAST_AUTOTUNE") != "1":
        return row
    key = (op, shape_class, f"{architecture(device)}, {size}")
    if key not in _tuned:
        if torch.cuda.is_current_stream_capturing():
            _log.warning("%s was not tuned before this graph's capture, which keeps the table's %s", key, row)
            return row
        with torch.cuda.device(device):
            _tuned[key] = _fastest(key, row, device, trial)
    return _tuned[key].config


def tuned() -> dict[tuple[str, str, str], Tuned]:
    """The choices tuned in this process, by op, shape class, and architecture with sizes."""
    return dict(_tuned)


def _fastest(
    key: tuple[str, str, str], row: Config, device: torch.device, trial: Callable[[Config], Sequence[Launch]]
) -> Tuned:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    def milliseconds(config: Config) -> float:
        launches = trial(config)  # made, with its scratch memory, before the clock starts
        return cast(float, do_bench(lambda: run(launches, device), return_mode="median"))

    times = {row: milliseconds(row)}
    for config in dict.fromkeys(candidates(*key[:2])):
        if config == row:
            continue
        try:
            times[config] = milliseconds(config)
        except (OutOfResources, PTXASError, CompilationError, torch.OutOfMemoryError) as error:
            _log.debug("%s: %s cannot be used: %s", key, config, error)  # a candidate need not fit this device
    best = min(times, key=times.__getitem__)
    _log.info("tuned %s: %s, %.4f ms (the table's: %.4f ms)", key, best, times[best], times[row])
    return Tuned(best, times[best], times[row])

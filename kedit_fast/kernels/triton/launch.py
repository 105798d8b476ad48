"""From a plan to a launch: configurations, devices and the interpreter, the same for every kernel.

A plan is a list of `Launch`es made from tensors. What runs and what is compiled ahead of time (benchmarks/aot.py) come
from the same plan, so that the committed table of registers is that of the kernels users get.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from kedit_fast.kernels.triton.configs import CANDIDATES, INTERPRETED, Config, lookup

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
PROCESSORS = 132  # of the device that plans without one are made for

_log = logging.getLogger("kedit_fast")
_tuned: dict[tuple[str, str, str], Config] = {}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: `arguments` are tensors and numbers, `constants` the tl.constexpr parameters."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config


def architecture(device: torch.device) -> str:
    """'sm_90' and the like, or 'interpret'."""
    if INTERPRET:
        return "interpret"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a few under the interpreter, so that small inputs are split too."""
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


def choose(op: str, shape_class: str, device: torch.device, trial: Callable[[Config], Sequence[Launch]]) -> Config:
    """The configuration for these shapes: from the table, or the fastest one when KEDIT_FAST_AUTOTUNE=1.

    `trial(config)` is a plan that writes to scratch memory only.
    """
    if INTERPRET:
        return INTERPRETED[op]
    key = (op, shape_class, architecture(device))
    if os.environ.get("KEDIT_FAST_AUTOTUNE") != "1" or torch.cuda.is_current_stream_capturing():
        return lookup(*key)
    if key not in _tuned:
        _tuned[key] = _fastest(key, device, trial)
    return _tuned[key]


def _fastest(key: tuple[str, str, str], device: torch.device, trial: Callable[[Config], Sequence[Launch]]) -> Config:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: dict[Config, float] = {}
    for config in dict.fromkeys((lookup(*key), *CANDIDATES[key[0]])):
        try:
            launches = trial(config)
            times[config] = do_bench(lambda launches=launches: run(launches, device), return_mode="median")
        except OutOfResources as error:
            _log.debug("%s: %s does not fit: %s", key, config, error)
    best = min(times, key=times.__getitem__)
    _log.info("tuned %s: %s, %.4f ms (the table's: %.4f ms)", key, best, times[best], times.get(lookup(*key), -1.0))
    return best

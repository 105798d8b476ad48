"""Clocks that wait for a device to finish."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, MutableMapping
from typing import TypeVar

import torch

Phase = TypeVar("Phase", bound=str)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronized_clock(device: torch.device) -> float:
    """Seconds of a monotonic clock, read once `device` has finished its queued work."""
    synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def timed(seconds: MutableMapping[Phase, float], phase: Phase, device: torch.device | None = None) -> Iterator[None]:
    """Add the time of a block to `seconds[phase]`, also where it raises.

    Args:
        seconds: phase -> seconds.
        phase: what the block belongs to.
        device: whose queued work counts; None for the time that passes on the host.
    """
    device = torch.device("cpu") if device is None else device
    begin = synchronized_clock(device)
    try:
        yield
    finally:
        seconds[phase] += synchronized_clock(device) - begin

"""Clocks that wait for a device."""

from __future__ import annotations

import time

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronized_clock(device: torch.device) -> float:
    """Seconds of a clock that never goes back, read once `device` has done what it was given."""
    synchronize(device)
    return time.perf_counter()

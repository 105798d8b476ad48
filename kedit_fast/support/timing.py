"""Clocks that wait for a device to finish."""

from __future__ import annotations

import time

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronized_clock(device: torch.device) -> float:
    """Seconds of a monotonic clock, read once `device` has finished its queued work."""
    synchronize(device)
    return time.perf_counter()

"""How much memory is free, on a GPU or on the host."""

from __future__ import annotations

import os
from pathlib import Path

import torch

ROOT = Path("/sys/fs/cgroup")
_UNKNOWN = 2 << 30  # where the system does not say
# Files with the limit, the usage and the statistics; and in the last one, the line of reclaimable file pages.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: on a GPU including torch's unused reserve, or on the host."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_available(), *_group_limits()])


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return _UNKNOWN


def _group_limits() -> list[int]:
    """Bytes left below the limit of a container, where there is one."""
    limits = []
    for names in _CGROUPS:
        try:
            limit, usage, statistics = ((ROOT / name).read_text(encoding="ascii") for name in names[:3])
            if limit.strip() == "max":
                continue
            values = dict(line.split() for line in statistics.splitlines())
            limits.append(max(0, int(limit) - int(usage) + int(values.get(names[3], 0))))
        except (OSError, ValueError):
            continue
    return limits

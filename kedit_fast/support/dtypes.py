"""Which dtype is computed in."""

from __future__ import annotations

import torch


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What sums of a tensor's numbers are kept in: float64 of float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

"""The golden tensors of tuning editors and side memories."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

FILE = Path(__file__).parents[1] / "data" / "golden_memories.safetensors"


@cache
def _tensors() -> dict[str, torch.Tensor]:
    return load_file(FILE)


def golden(name: str) -> torch.Tensor:
    """A copy of one tensor."""
    return _tensors()[name].clone()

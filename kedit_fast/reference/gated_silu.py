"""Reference of `gated_silu`: silu(gate) * up."""

from __future__ import annotations

import torch


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate), rounded to its dtype, times up; both of one shape and dtype."""
    return torch.nn.functional.silu(gate) * up

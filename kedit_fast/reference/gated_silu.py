"""Reference of `gated_silu`: silu(gate) * up."""

from __future__ import annotations

import torch

from kedit_fast.support.dtypes import accumulation_dtype


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate), rounded to its dtype, times up; both of one shape and dtype."""
    return torch.nn.functional.silu(gate) * up


def gated_silu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients in gate and up from that in the result, each computed in fp32 (fp64 for fp64) and rounded once."""
    dtype = accumulation_dtype(gate)
    wide = grad.to(dtype)
    d_gate = torch.ops.aten.silu_backward(wide * up.to(dtype), gate.to(dtype))
    return d_gate.to(gate.dtype), (wide * torch.nn.functional.silu(gate).to(dtype)).to(gate.dtype)

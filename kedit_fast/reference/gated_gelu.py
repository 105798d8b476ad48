"""Reference of `gated_gelu`: gelu(gate) * up, gelu in its tanh form."""

from __future__ import annotations

import torch

from kedit_fast.support.dtypes import accumulation_dtype


def gated_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate), rounded to its dtype, times up; both of one shape and dtype."""
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def gated_gelu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients in gate and up from that in the result, each computed in fp32 (fp64 for fp64) and rounded once."""
    dtype = accumulation_dtype(gate)
    wide = grad.to(dtype)
    d_gate = torch.ops.aten.gelu_backward(wide * up.to(dtype), gate.to(dtype), approximate="tanh")
    value = torch.nn.functional.gelu(gate, approximate="tanh")
    return d_gate.to(gate.dtype), (wide * value.to(dtype)).to(gate.dtype)

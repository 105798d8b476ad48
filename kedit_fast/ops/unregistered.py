"""The norm and the gated activations as modules of models call them: without the registration with torch.

A registered op that is differentiated takes about 0.3 ms a call for its way through torch.library, more than the work
of a single edit's few rows; half of it is saved here. Arguments are not checked, and torch.compile and subclasses
of tensors are not served.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from kedit_fast.backends import requested
from kedit_fast.ops._checks import refuse_second_derivative
from kedit_fast.ops._library import dispatch

GatedOp = Literal["gated_silu", "gated_gelu"]


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool) -> torch.Tensor:
    """What `rms_norm` returns for rows of 32 or 16 bits and a weight that needs no gradient."""
    return _Norm.apply(x, weight, eps, round_first)


def gated(op: GatedOp, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What `gated_silu` or `gated_gelu` returns for rows of 32 or 16 bits."""
    return _Gated.apply(gate, up, op)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool) -> torch.Tensor:
        ctx.backend = requested(None)  # a backward pass on a GPU runs in another thread
        out, rstd = dispatch("rms_norm", ctx.backend, (x, weight), x, weight, eps, round_first)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative("rms_norm")
        x, weight, rstd = ctx.saved_tensors
        return dispatch("rms_norm_backward", ctx.backend, (x, weight), grad, x, weight, rstd), None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, op: GatedOp) -> torch.Tensor:
        ctx.op, ctx.backend = op, requested(None)
        ctx.save_for_backward(gate, up)
        return dispatch(op, ctx.backend, (gate, up), gate, up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative(ctx.op)
        gate, up = ctx.saved_tensors
        return *dispatch(f"{ctx.op}_backward", ctx.backend, (gate, up), grad, gate, up), None

"""What the gated activations share: schemas, checks, the chain rule and the backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kedit_fast.backends import Implementation, register, requested
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import describe, refuse_second_derivative, require, require_dtype, require_same_device
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.support.dtypes import FLOATS


def define(op: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """Register `op` and `{op}_backward`, whose references are given, and their backends; returns op(gate, up, backend).

    A second derivative is refused by name.
    """
    slopes = f"{op}_backward"
    LIBRARY.define(f"{op}(Tensor gate, Tensor up, str backend) -> Tensor")
    LIBRARY.define(f"{slopes}(Tensor grad, Tensor gate, Tensor up, str backend) -> (Tensor, Tensor)")

    @torch.library.impl(LIBRARY, op, "CompositeExplicitAutograd")
    def run(gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
        _check(gate, up)
        return dispatch(op, backend, (gate, up), gate, up).contiguous()

    @torch.library.register_fake(f"kedit_fast::{op}", lib=LIBRARY)
    def fake(gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
        _check(gate, up)
        return torch.empty_like(gate, memory_format=torch.contiguous_format)

    @torch.library.impl(LIBRARY, slopes, "CompositeExplicitAutograd")
    def run_backward(
        grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _check(gate, up, grad)
        d_gate, d_up = dispatch(slopes, backend, (gate, up, grad), grad, gate, up)
        return d_gate.contiguous(), d_up.contiguous()

    @torch.library.register_fake(f"kedit_fast::{slopes}", lib=LIBRARY)
    def fake_backward(
        grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _check(gate, up, grad)
        d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        return d_gate, torch.empty_like(d_gate)

    derivative = getattr(torch.ops.kedit_fast, slopes).default

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        gate, up, backend = inputs
        ctx.backend = backend or requested(None)  # a backward pass on a GPU runs in another thread
        ctx.save_for_backward(gate, up)

    def differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative(op)
        return *derivative(grad, *ctx.saved_tensors, ctx.backend), None

    torch.library.register_autograd(f"kedit_fast::{op}", differentiate, setup_context=set_up, lib=LIBRARY)
    for name, reference in ((op, forward), (slopes, backward)):
        register(Implementation(name, "torch", reference))
        register(Implementation(name, "cpu", getattr(native.cpu, name), _cpu_declines(name)))
        register(Implementation(name, "triton", triton.lazy("gated", name), _triton_declines))
    return getattr(torch.ops.kedit_fast, op).default


def _check(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor | None = None) -> None:
    require(gate.ndim >= 1, lambda: f"gate must be [.., d]; got {describe(gate)}")
    require_dtype("gate", gate, FLOATS)
    _check_beside("up", up, gate)
    if grad is not None:
        _check_beside("grad", grad, gate)
    require_same_device(gate=gate, up=up, grad=grad)


def _check_beside(name: str, part: torch.Tensor, gate: torch.Tensor) -> None:
    require(part.shape == gate.shape, lambda: f"{name} must be {list(gate.shape)}; got {describe(part)}")
    require_dtype(name, part, (gate.dtype,))


def _cpu_declines(name: str) -> Callable[..., str]:
    return lambda gate, *_: native.cpu.declines_float64(gate) or native.cpu.declines_older(name, gate)


def _triton_declines(gate: torch.Tensor, *_: object) -> str:
    return triton.declines_device(gate) or triton.declines_float64(gate)

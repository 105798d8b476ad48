"""Gated activations and their gradients in one pass each.

Both activations are x sigmoid(z): silu with z = x, and gelu in its tanh form with z = 2 sqrt(2 / pi) (x + a x^3),
because 1 + tanh(z / 2) = 2 sigmoid(z).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import narrow
from kedit_fast.kernels.triton.configs import GATED, Config
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, by_rows, ceil_div, choose, run, size_class

SILU, GELU_TANH = 0, 1


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 x, and its derivative s + x z' s (1 - s), whose second term ends where s is 0 or 1."""
    z = x
    dz = tl.full(x.shape, 1.0, tl.float32)
    if ACTIVATION == 1:
        z = x * (x * x * (1.5957691216057308 * 0.044715) + 1.5957691216057308)
        dz = x * x * (3 * 1.5957691216057308 * 0.044715) + 1.5957691216057308
    decline = tl.exp(-tl.minimum(tl.maximum(z, -88.0), 87.0))
    s = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), decline + 1.0)
    none = x * 0.0  # NaN of what is not finite
    bend = tl.where(z > 87.0, none, x * dz * s * (decline * s))
    return tl.where(z < -88.0, none, x * s), tl.where(z < -88.0, none, s + bend)


@triton.jit
def _gated_kernel(
    out, gate, up, d, blocks, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    opened = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(opened, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues] - triton compiles it
    value = narrow(value, gate.dtype.element_ty, INTERPRET).to(tl.float32)
    value *= tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * d + column, narrow(value, out.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit
def _gated_backward_kernel(
    d_gate, d_up, grad, gate, up, d, blocks, grad_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    opened = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(opened, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues] - triton compiles it
    value = narrow(value, gate.dtype.element_ty, INTERPRET).to(tl.float32)
    slope *= tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_gate + row * d + column, narrow(g * slope, d_gate.dtype.element_ty, INTERPRET), mask=inside)
    tl.store(d_up + row * d + column, narrow(g * value, d_up.dtype.element_ty, INTERPRET), mask=inside)


def launches(out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: int, config: Config) -> list[Launch]:
    """The launch that gates rows [n, d]; out is contiguous."""
    return _launches(_gated_kernel, {"out": out}, {"gate": gate, "up": up}, activation, config)


def backward_launches(
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: int,
    config: Config,
) -> list[Launch]:
    """The launch that makes both gradients of rows [n, d]; d_gate and d_up are contiguous."""
    written, read = {"d_gate": d_gate, "d_up": d_up}, {"grad": grad, "gate": gate, "up": up}
    return _launches(_gated_backward_kernel, written, read, activation, config)


def _launches(
    kernel: object, written: dict[str, torch.Tensor], read: dict[str, torch.Tensor], activation: int, config: Config
) -> list[Launch]:
    rows, d = read["gate"].shape
    block = min(config.n, int(size_class(d)))
    blocks = ceil_div(d, block)
    strides = {f"{name}_stride": tensor.stride(0) for name, tensor in read.items()}
    arguments = {**written, **read, "d": d, "blocks": blocks, **strides}
    constants = {"ACTIVATION": activation, "BLOCK": block, "INTERPRET": INTERPRET}
    return [Launch(kernel, (rows * blocks,), arguments, constants, config)]


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Run the op of the same name; see kedit_fast/ops/gated_silu.py."""
    return _forward(gate, up, SILU)


def gated_silu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op of the same name; see kedit_fast/ops/gated_silu.py."""
    return _backward((grad, gate, up), SILU)


def gated_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Run the op of the same name; see kedit_fast/ops/gated_gelu.py."""
    return _forward(gate, up, GELU_TANH)


def gated_gelu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op of the same name; see kedit_fast/ops/gated_gelu.py."""
    return _backward((grad, gate, up), GELU_TANH)


def _forward(gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not gate.numel():
        return out
    rows = by_rows(gate), by_rows(up)

    def trial(config: Config) -> list[Launch]:
        return launches(torch.empty_like(out), *rows, activation, config)

    config = choose(GATED, "entries", gate.device, trial, f"{gate.dtype}, {activation}, {size_class(gate.numel())}")
    run(launches(out, *rows, activation, config), gate.device)
    return out


def _backward(tensors: Sequence[torch.Tensor], activation: int) -> tuple[torch.Tensor, torch.Tensor]:
    gate = tensors[1]
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if not gate.numel():
        return d_gate, d_up
    grad_rows, gate_rows, up_rows = map(by_rows, tensors)

    def made(out: torch.Tensor, beside: torch.Tensor, config: Config) -> list[Launch]:
        return backward_launches(out, beside, grad_rows, gate_rows, up_rows, activation, config)

    def trial(config: Config) -> list[Launch]:
        return made(torch.empty_like(d_gate), torch.empty_like(d_up), config)

    config = choose(GATED, "backward", gate.device, trial, f"{gate.dtype}, {activation}, {size_class(gate.numel())}")
    run(made(d_gate, d_up, config), gate.device)
    return d_gate, d_up

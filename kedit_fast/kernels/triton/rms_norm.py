"""The root-mean-square norm and its gradient: a program reads its row twice, the second time from a cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import narrow
from kedit_fast.kernels.triton.configs import NORM, Config
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, by_rows, choose, run, size_class


@triton.jit
def _rms_norm_kernel(
    out, rstd, x, weight, d, inverse, eps, x_stride,
    ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """out = x r weight and rstd = r = 1 / sqrt(mean(x^2) + eps) of one row; `inverse` is 1 / d."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * d
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < d, other=0.0).to(tl.float32)
        squares += value * value
    root = tl.sqrt_rn(tl.sum(squares, axis=0) * inverse + eps)
    scale = tl.div_rn(tl.full((), 1.0, tl.float32), root)
    tl.store(rstd + row, scale)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < d
        value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32) * scale
        if ROUND_FIRST:
            value = narrow(value, x.dtype.element_ty, INTERPRET).to(tl.float32)
        value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + column, narrow(value, out.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    out, grad, x, weight, rstd, d, inverse, grad_stride, x_stride, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """out = r g - x r^3 mean(g x) of one row, g = grad weight."""
    row = tl.program_id(0).to(tl.int64)
    grad += row * grad_stride
    x += row * x_stride
    out += row * d
    scale = tl.load(rstd + row)
    products = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < d
        weighted = tl.load(grad + column, mask=inside, other=0.0).to(tl.float32)
        weighted *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        products += weighted * tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    back = scale * scale * scale * (tl.sum(products, axis=0) * inverse)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < d
        weighted = tl.load(grad + column, mask=inside, other=0.0).to(tl.float32)
        weighted *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        value = weighted * scale - tl.load(x + column, mask=inside, other=0.0).to(tl.float32) * back
        tl.store(out + column, narrow(value, out.dtype.element_ty, INTERPRET), mask=inside)


def launches(
    out: torch.Tensor,
    rstd: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    round_first: bool,
    config: Config,
) -> list[Launch]:
    """The launch that norms rows [n, d], a program for each; all but x is contiguous."""
    rows, d = x.shape
    arguments = {
        "out": out, "rstd": rstd, "x": x, "weight": weight, "d": d, "inverse": 1.0 / d, "eps": eps,
        "x_stride": x.stride(0),
    }  # fmt: skip
    constants = {"ROUND_FIRST": round_first, "BLOCK": _block(d, config), "INTERPRET": INTERPRET}
    return [Launch(_rms_norm_kernel, (rows,), arguments, constants, config)]


def backward_launches(
    out: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, config: Config
) -> list[Launch]:
    """The launch that makes the gradient of rows [n, d], a program for each; out, weight and rstd are contiguous."""
    rows, d = x.shape
    arguments = {
        "out": out, "grad": grad, "x": x, "weight": weight, "rstd": rstd, "d": d, "inverse": 1.0 / d,
        "grad_stride": grad.stride(0), "x_stride": x.stride(0),
    }  # fmt: skip
    constants = {"BLOCK": _block(d, config), "INTERPRET": INTERPRET}
    return [Launch(_rms_norm_backward_kernel, (rows,), arguments, constants, config)]


def _block(d: int, config: Config) -> int:
    return min(config.n, int(size_class(d)))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op of the same name; see kedit_fast/ops/rms_norm.py."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows, gain = by_rows(x), weight.contiguous()
    if not x.numel():
        return out, rstd

    def trial(config: Config) -> list[Launch]:
        return launches(torch.empty_like(out), torch.empty_like(rstd), rows, gain, eps, round_first, config)

    config = choose(NORM, "rows", x.device, trial, f"{x.dtype}, {size_class(len(rows))}, {size_class(x.shape[-1])}")
    run(launches(out, rstd, rows, gain, eps, round_first, config), x.device)
    return out, rstd


def rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """Run the op of the same name; see kedit_fast/ops/rms_norm.py."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = by_rows(grad), by_rows(x), weight.contiguous(), rstd.contiguous()
    if not x.numel():
        return out

    def trial(config: Config) -> list[Launch]:
        return backward_launches(torch.empty_like(out), *tensors, config)

    size = f"{x.dtype}, {size_class(len(tensors[1]))}, {size_class(x.shape[-1])}"
    config = choose(NORM, "backward", x.device, trial, size)
    run(backward_launches(out, *tensors, config), x.device)
    return out

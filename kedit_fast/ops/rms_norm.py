"""The norm of the Llama family in one pass."""

from __future__ import annotations

from typing import Any

import torch

from kedit_fast.backends import Implementation, register, requested
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import (
    describe,
    refuse_second_derivative,
    require,
    require_dtype,
    require_finite_number,
    require_no_grad,
    require_same_device,
)
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import rms_norm as reference
from kedit_fast.support.dtypes import FLOATS, accumulation_dtype

OP = "rms_norm"
BACKWARD = "rms_norm_backward"
LIBRARY.define(f"{OP}(Tensor x, Tensor weight, float eps, bool round_first, str backend) -> (Tensor, Tensor)")
LIBRARY.define(f"{BACKWARD}(Tensor grad, Tensor x, Tensor weight, Tensor rstd, str backend) -> Tensor")
_op = torch.ops.kedit_fast.rms_norm.default
_backward_op = torch.ops.kedit_fast.rms_norm_backward.default


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, round_first: bool = True, backend: str | None = None
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, differentiable once in x.

    Equivalent, with `round_first`, to the norm of transformers' Llama,
    `weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)` with `x32 = x.float()`. Of the
    gradient nothing is rounded in between; there is none for the weight.

    Args:
        x: [.., d] float32, float64, bfloat16 or float16.
        weight: [d] float32 or of the dtype of x.
        eps: added to the mean square, not negative.
        round_first: round the quotient to the dtype of x before the product (Llama, Mistral, Qwen); otherwise only the
            product is rounded (OLMo 2; Gemma with `1 + weight` in float32).
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [.., d] of the dtype of x, contiguous. Arithmetic in fp32 (fp64 for fp64 x); the C++ kernel gives the same bits
        for any number of threads and differs from torch by the rounding of the sum.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device, or an eps that is negative or not finite.
        BackendUnavailableError: `backend` cannot run.
        GradientError: the weight requires grad; or, in the backward pass, a second derivative is asked for.

    Cost: reads and writes x once; backward reads x and the gradient once, and writes one. For a gradient x stays in
    memory as it is, and one number for each row.
    Source: arXiv 1910.07467, eq. 4.

    Example:
        >>> x, weight = 3 * torch.randn(4, 16), torch.ones(16)
        >>> rms_norm(x, weight).square().mean(-1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000])
    """
    require_finite_number("eps", eps)
    require_no_grad(OP, weight=weight)
    return _op(x, weight, float(eps), bool(round_first), backend or "")[0]


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float = 0.0) -> None:
    require(x.ndim >= 1 and x.shape[-1] > 0, lambda: f"x must be [.., d], d not 0; got {describe(x)}")
    require_dtype("x", x, FLOATS)
    size = x.shape[-1]
    require(tuple(weight.shape) == (size,), lambda: f"weight must be [{size}]; got {describe(weight)}")
    require_dtype("weight", weight, (torch.float32, x.dtype))
    require(eps >= 0, lambda: f"eps must not be negative; got {eps}")
    require_same_device(x=x, weight=weight)


def _check_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> None:
    _check(x, weight)
    require(grad.shape == x.shape, lambda: f"grad must be {list(x.shape)}; got {describe(grad)}")
    require_dtype("grad", grad, (x.dtype,))
    require(rstd.shape == x.shape[:-1], lambda: f"rstd must be {list(x.shape[:-1])}; got {describe(rstd)}")
    require_dtype("rstd", rstd, (accumulation_dtype(x),))
    require_same_device(x=x, grad=grad, rstd=rstd)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight, eps)
    out, rstd = dispatch(OP, backend, (x, weight), x, weight, eps, round_first)
    return out.contiguous(), rstd.contiguous()


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight, eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x))


@torch.library.impl(LIBRARY, BACKWARD, "CompositeExplicitAutograd")
def _run_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, backend: str
) -> torch.Tensor:
    _check_backward(grad, x, weight, rstd)
    return dispatch(BACKWARD, backend, (x, weight), grad, x, weight, rstd).contiguous()


@torch.library.register_fake(f"kedit_fast::{BACKWARD}", lib=LIBRARY)
def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, backend: str
) -> torch.Tensor:
    _check_backward(grad, x, weight, rstd)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, _, backend = inputs
    ctx.backend = backend or requested(None)  # a backward pass on a GPU runs in another thread
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    refuse_second_derivative(OP)
    return _backward_op(grad, *ctx.saved_tensors, ctx.backend), None, None, None, None


def _cpu_declines(x: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_float64(x) or native.cpu.declines_older(BACKWARD, x)


def _triton_declines(x: torch.Tensor, *_: object) -> str:
    return triton.declines_device(x) or triton.declines_float64(x)


torch.library.register_autograd(f"kedit_fast::{OP}", _backward, setup_context=_setup_context, lib=LIBRARY)
register(Implementation(OP, "torch", reference.rms_norm_with_rstd))
register(Implementation(OP, "cpu", native.cpu.rms_norm, _cpu_declines))
register(Implementation(OP, "triton", triton.lazy("rms_norm", OP), _triton_declines))
register(Implementation(BACKWARD, "torch", reference.rms_norm_backward))
register(Implementation(BACKWARD, "cpu", native.cpu.rms_norm_backward, _cpu_declines))
register(Implementation(BACKWARD, "triton", triton.lazy("rms_norm", BACKWARD), _triton_declines))

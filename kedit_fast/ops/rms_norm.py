"""The norm of the Llama family in one pass."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native
from kedit_fast.ops._checks import (
    describe,
    require,
    require_dtype,
    require_finite_number,
    require_no_grad,
    require_same_device,
)
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import rms_norm as reference
from kedit_fast.support.dtypes import FLOATS

OP = "rms_norm"
LIBRARY.define(f"{OP}(Tensor x, Tensor weight, float eps, bool round_first, str backend) -> Tensor")
_op = torch.ops.kedit_fast.rms_norm.default


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, round_first: bool = True, backend: str | None = None
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, without a derivative.

    For forward passes that need no gradient. Equivalent, with `round_first`, to the norm of transformers' Llama,
    `weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)` with `x32 = x.float()`.

    Args:
        x: [.., d] float32, float64, bfloat16 or float16.
        weight: [d] float32 or of the dtype of x.
        eps: added to the mean square, not negative.
        round_first: round the quotient to the dtype of x before the product (Llama, Mistral, Qwen); otherwise only the
            product is rounded (OLMo 2; Gemma with `1 + weight` in float32).
        backend: "torch", "cpu" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [.., d] of the dtype of x, contiguous. Arithmetic in fp32 (fp64 for fp64 x); the C++ kernel gives the same bits
        for any number of threads and differs from torch by the rounding of the sum.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device, or an eps that is negative or not finite.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: reads and writes x once.
    Source: arXiv 1910.07467, eq. 4.

    Example:
        >>> x, weight = 3 * torch.randn(4, 16), torch.ones(16)
        >>> rms_norm(x, weight).square().mean(-1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000])
    """
    require_finite_number("eps", eps)
    require_no_grad(OP, x=x, weight=weight)
    return _op(x, weight, float(eps), bool(round_first), backend or "")


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    require(x.ndim >= 1 and x.shape[-1] > 0, lambda: f"x must be [.., d], d not 0; got {describe(x)}")
    require_dtype("x", x, FLOATS)
    size = x.shape[-1]
    require(tuple(weight.shape) == (size,), lambda: f"weight must be [{size}]; got {describe(weight)}")
    require_dtype("weight", weight, (torch.float32, x.dtype))
    require(eps >= 0, lambda: f"eps must not be negative; got {eps}")
    require_same_device(x=x, weight=weight)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool, backend: str) -> torch.Tensor:
    _check(x, weight, eps)
    return dispatch(OP, backend, (x, weight), x, weight, eps, round_first).contiguous()


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(x: torch.Tensor, weight: torch.Tensor, eps: float, round_first: bool, backend: str) -> torch.Tensor:
    _check(x, weight, eps)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register(Implementation(OP, "torch", reference.rms_norm))
register(Implementation(OP, "cpu", native.cpu.rms_norm, native.cpu.declines_float64))

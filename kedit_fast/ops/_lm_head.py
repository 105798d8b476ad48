"""What the two ops on a language-model head share: checks, their fake gradient, and the chain rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kedit_fast.errors import GradientError
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import describe, require, require_dtype
from kedit_fast.reference.wide_product import has_wide_product, wide_product
from kedit_fast.support.dtypes import FLOATS, accumulation_dtype


def check_head(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, softcap: float) -> None:
    """Check states [rows, h], a head [V, h], its bias [V] and the logit cap."""
    require(hidden.ndim == 2, lambda: f"hidden must be [rows, h]; got {describe(hidden)}")
    require_dtype("hidden", hidden, FLOATS)
    fits = head.ndim == 2 and head.shape[1] == hidden.shape[1] and head.shape[0] > 0
    require(fits, lambda: f"head must be [V, {hidden.shape[1]}] with V > 0; got {describe(head)}")
    narrower = (torch.bfloat16, torch.float16) if hidden.dtype == torch.float32 else ()
    require_dtype("head", head, (hidden.dtype, *narrower))
    if bias is not None:
        require(tuple(bias.shape) == (head.shape[0],), lambda: f"bias must be [{head.shape[0]}]; got {describe(bias)}")
        require_dtype("bias", bias, FLOATS)
    require(0.0 <= softcap < float("inf"), lambda: f"softcap must be 0 (none) or a positive number; got {softcap}")


def triton_declines(hidden: torch.Tensor, *heads: torch.Tensor) -> str:
    """Why the Triton kernels do not take these states and their head, or ''."""
    if any(part.dtype != hidden.dtype for part in heads if part.is_floating_point()):
        return "a head of another dtype than the states"
    return triton.declines_device(hidden) or ("float64 states" if hidden.dtype == torch.float64 else "")


def triton_is_slower(hidden: torch.Tensor, *_: torch.Tensor) -> str:
    """Why torch's own products are preferred to the Triton kernels, or ''. Measured on an H200: see benchmarks."""
    if hidden.dtype == torch.float32 or has_wide_product(hidden):  # a head beside 16-bit states has their dtype
        return "torch's own matrix products are faster"
    return ""


def triton_runs(op: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The Triton form of an op: chunks of torch's products where it has those with fp32 results, else one kernel."""
    fused, chunked = triton.lazy(op, op), triton.lazy("head_chunks", op)

    def run(hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        if has_wide_product(hidden):  # a head beside 16-bit states has their dtype
            return chunked(hidden, *rest, wide_product)
        return fused(hidden, *rest)

    return run


def cpu_declines(op: str) -> Callable[..., str]:
    """Why the C++ kernel of an op does not take these states and their head, or ''."""
    return lambda hidden, *_: native.cpu.declines_older(op, hidden)


def cpu_is_slower(hidden: torch.Tensor, *_: torch.Tensor) -> str:
    """Why torch's own products are preferred to the C++ kernel, or ''. Timed on AVX2 and AVX-512 alone."""
    isa = native.cpu.module().isa()
    return f"not timed beside torch's own matrix products on {isa}" if isa in ("generic", "neon") else ""


class DirectCall(torch.autograd.Function):
    """An op on a head without the dispatcher: what `register_autograd` makes of it, for plain tensors."""

    @staticmethod
    def forward(
        ctx: Any, op: str, run: Callable[..., tuple[torch.Tensor, ...]], *args: Any
    ) -> tuple[torch.Tensor, ...]:
        """Run the op on args, of which the first are the states; its last result is the gradient."""
        *results, slope = run(*args)
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(slope)
        ctx.op, ctx.gradient, ctx.dtype, ctx.others = op, True, args[0].dtype, len(args) - 1
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The chain rule for the states."""
        return None, None, chain(ctx.op, ctx, grads[0]), *(None,) * ctx.others


def fake_gradient(hidden: torch.Tensor, gradient: bool) -> torch.Tensor:
    """The shape of the gradient that is computed with the value: [rows, h], or [0, h] where none is wanted."""
    return hidden.new_empty(hidden.shape[0] if gradient else 0, hidden.shape[1], dtype=accumulation_dtype(hidden))


def chain(op: str, ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    """grad [rows] times the gradient [rows, h] that was computed with the value.

    Raises:
        GradientError: a second derivative, or a gradient where none was computed.
    """
    if torch.is_grad_enabled():  # create_graph=True: the saved gradient has no graph
        raise GradientError(f"{op} has no second derivative")
    if not ctx.gradient:
        raise GradientError(f"{op} was called with gradient=False")
    (slope,) = ctx.saved_tensors
    return (grad[:, None] * slope).to(ctx.dtype)

"""log p(target) from hidden states, without the matrix of all logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kedit_fast.backends import Implementation, register, requested, select
from kedit_fast.errors import GradientError
from kedit_fast.kernels import triton
from kedit_fast.ops.arguments import (
    FLOATS,
    LIBRARY,
    describe,
    require,
    require_dtype,
    require_no_grad,
    require_same_device,
    run_stated,
)
from kedit_fast.reference import target_log_probs as reference
from kedit_fast.support.dtypes import accumulation_dtype

OP = "target_log_probs"
LIBRARY.define(
    f"{OP}(Tensor hidden, Tensor head, Tensor targets, Tensor? bias, float softcap, bool gradient, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


class TargetLogProbs(NamedTuple):
    """What `target_log_probs` returns."""

    log_prob: torch.Tensor  # [rows] log p(target), fp32 (fp64 for fp64 input); differentiable in hidden
    top1: torch.Tensor | None  # [rows] int64: the most probable token
    top1_log_prob: torch.Tensor | None  # [rows] its log probability


def target_log_probs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    return_top1: bool = False,
    *,
    backend: str | None = None,
) -> TargetLogProbs:
    """`log_softmax(cap(hidden head^T + bias))[targets]`, in vocabulary chunks; differentiable in `hidden`.

    Equivalent to `torch.log_softmax(hidden.float() @ head.float().T + bias, -1).gather(1, targets[:, None])[:, 0]`
    with logits z replaced by `softcap * tanh(z / softcap)` where softcap > 0.

    Args:
        hidden: [rows, h] of a floating dtype: the last hidden states, after the final norm.
        head: [V, h] of the same dtype, or of 16 bits with fp32 states (backend "torch", which widens it in chunks): the
            output embedding. No gradient flows to it.
        targets: [rows] int64, in [0, V).
        bias: [V] or None.
        softcap: Gemma 2's logit cap; 0 for none.
        return_top1: also return the most probable token and its log probability (not differentiable).
        backend: "torch", "triton" or "auto"; None asks the context and the environment.

    Returns:
        TargetLogProbs.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device, or a target outside the vocabulary (on a GPU: NaN).
        GradientError: head or bias require grad.

    Cost: 2 rows V h flops, and 2 (triton: 4) more where a gradient is wanted, which is computed at once and kept,
    [rows, h]. At a time there are 8,192 logits a row on a CPU and 16,384 on a GPU (torch), or none for the value and
    64 MiB of them for the gradient (triton).
    """
    require_no_grad(OP, head=head, bias=bias)
    gradient = hidden.requires_grad and torch.is_grad_enabled()
    found = torch.ops.kedit_fast.target_log_probs(hidden, head, targets, bias, float(softcap), gradient, backend or "")
    log_prob, top1, best, _ = found
    if return_top1:
        return TargetLogProbs(log_prob, top1, best.detach())
    return TargetLogProbs(log_prob, None, None)


def check_head(hidden, head, bias, softcap) -> None:
    """Checks shared with `distribution_kl`."""
    require(hidden.ndim == 2, lambda: f"hidden must be [rows, h]; got {describe(hidden)}")
    require_dtype("hidden", hidden, FLOATS)
    fits = head.ndim == 2 and head.shape[1] == hidden.shape[1] and head.shape[0] > 0
    require(fits, lambda: f"head must be [V, {hidden.shape[1]}] with V > 0; got {describe(head)}")
    require_dtype(
        "head", head, (hidden.dtype, *((torch.bfloat16, torch.float16) if hidden.dtype == torch.float32 else ()))
    )
    if bias is not None:
        require(tuple(bias.shape) == (head.shape[0],), lambda: f"bias must be [{head.shape[0]}]; got {describe(bias)}")
        require_dtype("bias", bias, FLOATS)
    require(0.0 <= softcap < float("inf"), lambda: f"softcap must be 0 (none) or a positive number; got {softcap}")


def triton_declines(hidden, *heads) -> str:
    """Why Triton does not take these states and their head, or ''."""
    if any(part.dtype != hidden.dtype for part in heads if part.is_floating_point()):
        return "a head of another dtype than the states"
    return triton.declines_device(hidden) or ("float64 states" if hidden.dtype == torch.float64 else "")


def _check(hidden, head, targets, bias, softcap) -> None:
    check_head(hidden, head, bias, softcap)
    require(
        tuple(targets.shape) == (hidden.shape[0],),
        lambda: f"targets must be [{hidden.shape[0]}]; got {describe(targets)}",
    )
    require_dtype("targets", targets, (torch.int64,))
    require_same_device(hidden=hidden, head=head, targets=targets, bias=bias)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(hidden, head, targets, bias, softcap, gradient, backend):
    _check(hidden, head, targets, bias, softcap)
    # Reading the bounds on a GPU would stall it at every step; there such a target gives NaN.
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        require(
            low >= 0 and high < head.shape[0], lambda: f"targets must be in [0, {head.shape[0]}); got {low} to {high}"
        )
    chosen = select(OP, requested(backend or None), hidden, head, targets)
    return run_stated(chosen, hidden, head, targets, bias, softcap, gradient)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(hidden, head, targets, bias, softcap, gradient, backend):
    _check(hidden, head, targets, bias, softcap)
    row = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden))
    return row, torch.empty_like(targets), torch.empty_like(row), fake_gradient(hidden, gradient)


def fake_gradient(hidden, gradient) -> torch.Tensor:
    """The shape of the gradient that comes with the value: [rows, h], or [0, h] when it is not asked for."""
    return hidden.new_empty(hidden.shape[0] if gradient else 0, hidden.shape[1], dtype=accumulation_dtype(hidden))


def _setup_context(ctx, inputs, output):
    _, top1, best, slope = output
    ctx.mark_non_differentiable(top1, best, slope)
    ctx.gradient, ctx.dtype = inputs[5], inputs[0].dtype
    ctx.save_for_backward(slope)


def _backward(ctx, grad, *_):
    return chain(OP, ctx, grad), None, None, None, None, None, None


def chain(op, ctx, grad) -> torch.Tensor:
    """grad [rows] times the gradient that was computed with the value [rows, h]; raises where that would be wrong."""
    if torch.is_grad_enabled():  # create_graph=True: the kept gradient has no graph
        raise GradientError(f"{op} has no second derivative")
    if not ctx.gradient:
        raise GradientError(f"{op} was called with gradient=False")
    (slope,) = ctx.saved_tensors
    return (grad[:, None] * slope).to(ctx.dtype)


torch.library.register_autograd(f"kedit_fast::{OP}", _backward, setup_context=_setup_context, lib=LIBRARY)
register(Implementation(OP, "torch", reference.target_log_probs))
register(Implementation(OP, "triton", triton.lazy("target_log_probs", OP), triton_declines))

"""log p(target) from hidden states, without the matrix of all logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native
from kedit_fast.ops._checks import describe, require, require_dtype, require_no_grad, require_same_device
from kedit_fast.ops._library import LIBRARY, dispatch, runs_at_once
from kedit_fast.ops._lm_head import (
    DirectCall,
    chain,
    check_head,
    cpu_declines,
    cpu_is_slower,
    fake_gradient,
    triton_declines,
    triton_is_slower,
    triton_runs,
)
from kedit_fast.reference import target_log_probs as reference
from kedit_fast.support.dtypes import accumulation_dtype

OP = "target_log_probs"
LIBRARY.define(
    f"{OP}(Tensor hidden, Tensor head, Tensor targets, Tensor? bias, float softcap, bool gradient, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_op = torch.ops.kedit_fast.target_log_probs.default


class TargetLogProbs(NamedTuple):
    """What `target_log_probs` returns."""

    log_prob: torch.Tensor
    """[rows] log p(target), fp32 (fp64 for fp64 input); differentiable in `hidden`."""
    top1: torch.Tensor | None
    """[rows] int64, the most probable token; None unless `return_top1`."""
    top1_log_prob: torch.Tensor | None
    """[rows] the log probability of that token; None unless `return_top1`."""


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
    """`log_softmax(cap(hidden head^T + bias))[targets]` in vocabulary chunks, differentiable in `hidden`.

    Equivalent to `torch.log_softmax(hidden.float() @ head.float().T + bias, -1).gather(1, targets[:, None])[:, 0]`
    with logits z replaced by `softcap * tanh(z / softcap)` where softcap > 0.

    Args:
        hidden: [rows, h] of a floating dtype: the last hidden states, after the final norm.
        head: [V, h], the output embedding: of the same dtype, or of 16 bits beside fp32 states (backend "torch", which
            widens it in chunks). No gradient flows to it.
        targets: [rows] int64, in [0, V).
        bias: [V] or None.
        softcap: Gemma 2's logit cap; 0 for none.
        return_top1: also return the most probable token and its log probability (not differentiable).
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        TargetLogProbs.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device, or a target outside the vocabulary (on a GPU: NaN).
        GradientError: head or bias requires grad.

    Cost: 2 rows V h flops. Where a gradient is wanted it is computed with the value and stored, [rows, h]: 2 rows V h
    flops more (triton, and 16-bit states on a GPU: 4 rows V h). Logits in memory at a time: 96 per row and
    thread (cpu), 8,192 per row on a CPU and 16,384 on a GPU (torch); none for the value and 64 MiB for the gradient
    (triton), or 256 MiB of logits and weights where torch has products with fp32 results. The C++ kernel gives the same
    bits for any number of threads, and holds the gradient by up to 32 parts, 64 MiB in all.

    Example:
        >>> hidden, head = torch.randn(3, 8), torch.randn(50, 8)
        >>> targets = torch.tensor([4, 0, 49])
        >>> result = target_log_probs(hidden, head, targets, return_top1=True)
        >>> expected = torch.log_softmax(hidden @ head.T, -1)
        >>> torch.allclose(result.log_prob, expected.gather(1, targets[:, None])[:, 0], atol=1e-5)
        True
        >>> torch.equal(result.top1, expected.argmax(-1))
        True
    """
    require_no_grad(OP, head=head, bias=bias)
    gradient = hidden.requires_grad and torch.is_grad_enabled()
    args = hidden, head, targets, bias, float(softcap), gradient, backend or ""
    if not runs_at_once(hidden, head, targets, *(() if bias is None else (bias,))):
        log_prob, top1, best, _ = _op(*args)
    elif gradient:
        log_prob, top1, best = DirectCall.apply(OP, _run, *args)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        log_prob, top1, best, _ = _run(*args)
    if return_top1:
        return TargetLogProbs(log_prob, top1, best.detach())
    return TargetLogProbs(log_prob, None, None)


def _check(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, softcap: float
) -> None:
    check_head(hidden, head, bias, softcap)
    require(
        tuple(targets.shape) == (hidden.shape[0],),
        lambda: f"targets must be [{hidden.shape[0]}]; got {describe(targets)}",
    )
    require_dtype("targets", targets, (torch.int64,))
    require_same_device(hidden=hidden, head=head, targets=targets, bias=bias)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    gradient: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(hidden, head, targets, bias, softcap)
    # Reading the bounds from a GPU would stall it at every step; there a target outside the vocabulary gives NaN.
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(bound) for bound in torch.aminmax(targets))
        require(
            low >= 0 and high < head.shape[0], lambda: f"targets must be in [0, {head.shape[0]}); got {low} to {high}"
        )
    return dispatch(OP, backend, (hidden, head, targets), hidden, head, targets, bias, softcap, gradient)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    gradient: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(hidden, head, targets, bias, softcap)
    row = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden))
    return row, torch.empty_like(targets), torch.empty_like(row), fake_gradient(hidden, gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, top1, best, slope = output
    ctx.mark_non_differentiable(top1, best, slope)
    ctx.gradient, ctx.dtype = inputs[5], inputs[0].dtype
    ctx.save_for_backward(slope)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    return chain(OP, ctx, grad), None, None, None, None, None, None


torch.library.register_autograd(f"kedit_fast::{OP}", _backward, setup_context=_setup_context, lib=LIBRARY)
register(Implementation(OP, "torch", reference.target_log_probs))
register(Implementation(OP, "cpu", native.cpu.target_log_probs, cpu_declines(OP), cpu_is_slower))
register(Implementation(OP, "triton", triton_runs(OP), triton_declines, triton_is_slower))

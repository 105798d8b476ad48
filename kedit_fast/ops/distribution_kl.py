"""KL divergence of two next-token distributions from hidden states, without the matrix of all logits."""

from __future__ import annotations

from typing import Any

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
from kedit_fast.reference import distribution_kl as reference
from kedit_fast.support.dtypes import accumulation_dtype

OP = "distribution_kl"
LIBRARY.define(
    f"{OP}(Tensor hidden, Tensor hidden_ref, Tensor head, Tensor? bias, float softcap, bool gradient,"
    " bool reverse, str backend) -> (Tensor, Tensor)"
)
_op = torch.ops.kedit_fast.distribution_kl.default


def distribution_kl(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """`KL(softmax(cap(hidden head^T + b)) || softmax(cap(hidden_ref head^T + b)))` per row, differentiable in `hidden`.

    Equivalent to `torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)` with log_p from
    `hidden` and log_q from `hidden_ref`; with `reverse` the other way round, KL(softmax of hidden_ref || softmax of
    hidden), as knowledge is distilled from hidden_ref.

    Both at a temperature T are those of hidden / T and hidden_ref / T with bias / T and softcap / T.

    Args:
        hidden: [rows, h] of a floating dtype.
        hidden_ref: [rows, h] of the same dtype; its distribution is recomputed, not stored. No gradient flows to it.
        head: [V, h] of the same dtype, or of 16 bits beside fp32 states (backend "torch"). No gradient flows to it.
        bias: [V] or None.
        softcap: Gemma 2's logit cap; 0 for none.
        reverse: whether the mean is over the distribution of `hidden_ref`.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [rows] fp32 (fp64 for fp64 input).

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device.
        GradientError: hidden_ref, head or bias requires grad.

    Cost: 4 rows V h flops. Where a gradient is wanted it is computed with the value and stored, [rows, h]: 4 rows V h
    flops more (triton: 6 rows V h, 16-bit states on a GPU: 8). Logits in memory at a time as in
    `target_log_probs`, of both distributions.

    Example:
        >>> hidden, hidden_ref, head = torch.randn(3, 8), torch.randn(3, 8), torch.randn(50, 8)
        >>> kl = distribution_kl(hidden, hidden_ref, head)
        >>> log_p, log_q = (torch.log_softmax(states @ head.T, -1) for states in (hidden, hidden_ref))
        >>> torch.allclose(kl, (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-4)
        True
    """
    require_no_grad(OP, hidden_ref=hidden_ref, head=head, bias=bias)
    gradient = hidden.requires_grad and torch.is_grad_enabled()
    args = hidden, hidden_ref, head, bias, float(softcap), gradient, bool(reverse), backend or ""
    if not runs_at_once(hidden, hidden_ref, head, *(() if bias is None else (bias,))):
        return _op(*args)[0]
    return (DirectCall.apply(OP, _run, *args) if gradient else _run(*args))[0]


def _check(
    hidden: torch.Tensor, hidden_ref: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, softcap: float
) -> None:
    check_head(hidden, head, bias, softcap)
    require(
        hidden_ref.shape == hidden.shape, lambda: f"hidden_ref must be {list(hidden.shape)}; got {describe(hidden_ref)}"
    )
    require_dtype("hidden_ref", hidden_ref, (hidden.dtype,))
    require_same_device(hidden=hidden, hidden_ref=hidden_ref, head=head, bias=bias)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    gradient: bool,
    reverse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(hidden, hidden_ref, head, bias, softcap)
    return dispatch(OP, backend, (hidden, hidden_ref, head), hidden, hidden_ref, head, bias, softcap, gradient, reverse)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    gradient: bool,
    reverse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(hidden, hidden_ref, head, bias, softcap)
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden)), fake_gradient(hidden, gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, slope = output
    ctx.mark_non_differentiable(slope)
    ctx.gradient, ctx.dtype = inputs[5], inputs[0].dtype
    ctx.save_for_backward(slope)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    return chain(OP, ctx, grad), *(None,) * 7


torch.library.register_autograd(f"kedit_fast::{OP}", _backward, setup_context=_setup_context, lib=LIBRARY)
register(Implementation(OP, "torch", reference.distribution_kl))
register(Implementation(OP, "cpu", native.cpu.distribution_kl, cpu_declines(OP), cpu_is_slower))
register(Implementation(OP, "triton", triton_runs(OP), triton_declines, triton_is_slower))

"""KL divergence of two next-token distributions from hidden states, without the matrix of all logits."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register, requested, select
from kedit_fast.errors import GradientError
from kedit_fast.kernels import triton
from kedit_fast.ops.arguments import (
    LIBRARY,
    describe,
    require,
    require_dtype,
    require_no_grad,
    require_same_device,
    run_stated,
)
from kedit_fast.ops.target_log_probs import check_head, triton_declines
from kedit_fast.reference import distribution_kl as reference
from kedit_fast.reference.target_log_probs import wide

OP = "distribution_kl"
LIBRARY.define(
    f"{OP}(Tensor hidden, Tensor hidden_ref, Tensor head, Tensor? bias, float softcap, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"{OP}_backward(Tensor grad, Tensor hidden, Tensor hidden_ref, Tensor head, Tensor? bias, float softcap,"
    " Tensor kl, Tensor total, Tensor total_ref, str backend) -> Tensor"
)


def distribution_kl(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`KL(softmax(cap(hidden head^T + b)) || softmax(cap(hidden_ref head^T + b)))` a row; differentiable in `hidden`.

    Equivalent to `torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)` with log_p from
    `hidden` and log_q from `hidden_ref`.

    Args:
        hidden: [rows, h] of a floating dtype.
        hidden_ref: [rows, h] of the same dtype; its distribution is recomputed, not stored. No gradient flows to it.
        head: [V, h] of the same dtype. No gradient flows to it.
        bias: [V] or None.
        softcap: Gemma 2's logit cap; 0 for none.
        backend: "torch", "triton" or "auto"; None asks the context and the environment.

    Returns:
        [rows] fp32 (fp64 for fp64 input).

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device.
        GradientError: hidden_ref, head or bias require grad.

    Cost: 8 rows V h flops forward, 6 backward; one chunk of 16,384 logits a row and distribution exists at a time.
    """
    require_no_grad(OP, hidden_ref=hidden_ref, head=head, bias=bias)
    return torch.ops.kedit_fast.distribution_kl(hidden, hidden_ref, head, bias, float(softcap), backend or "")[0]


def _check(hidden, hidden_ref, head, bias, softcap) -> None:
    check_head(hidden, head, bias, softcap)
    require(
        hidden_ref.shape == hidden.shape, lambda: f"hidden_ref must be {list(hidden.shape)}; got {describe(hidden_ref)}"
    )
    require_dtype("hidden_ref", hidden_ref, (hidden.dtype,))
    require_same_device(hidden=hidden, hidden_ref=hidden_ref, head=head, bias=bias)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(hidden, hidden_ref, head, bias, softcap, backend):
    _check(hidden, hidden_ref, head, bias, softcap)
    chosen = select(OP, requested(backend or None), hidden, hidden_ref, head)
    return run_stated(chosen, hidden, hidden_ref, head, bias, softcap)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(hidden, hidden_ref, head, bias, softcap, backend):
    _check(hidden, hidden_ref, head, bias, softcap)
    row = hidden.new_empty(hidden.shape[0], dtype=wide(hidden))
    return row, torch.empty_like(row), torch.empty_like(row)


@torch.library.impl(LIBRARY, f"{OP}_backward", "CompositeExplicitAutograd")
def _run_backward(grad, hidden, hidden_ref, head, bias, softcap, kl, total, total_ref, backend):
    chosen = select(f"{OP}_backward", requested(backend or None), hidden, hidden_ref, head)
    return run_stated(chosen, grad, hidden, hidden_ref, head, bias, softcap, kl, total, total_ref)


@torch.library.register_fake(f"kedit_fast::{OP}_backward", lib=LIBRARY)
def _fake_backward(grad, hidden, hidden_ref, head, bias, softcap, kl, total, total_ref, backend):
    return hidden.new_empty(hidden.shape)


def _setup_context(ctx, inputs, output):
    hidden, hidden_ref, head, bias, ctx.softcap, ctx.backend = inputs
    kl, total, total_ref = output
    ctx.mark_non_differentiable(total, total_ref)
    ctx.save_for_backward(hidden, hidden_ref, head, bias, kl, total, total_ref)


def _backward(ctx, grad, *_):
    if torch.is_grad_enabled():  # create_graph=True: autograd would trace through the arithmetic with stale sums
        raise GradientError(f"{OP} has no second derivative")
    hidden, hidden_ref, head, bias, kl, total, total_ref = ctx.saved_tensors
    d_hidden = torch.ops.kedit_fast.distribution_kl_backward(
        grad, hidden, hidden_ref, head, bias, ctx.softcap, kl, total, total_ref, ctx.backend
    )
    return d_hidden, None, None, None, None, None


torch.library.register_autograd(f"kedit_fast::{OP}", _backward, setup_context=_setup_context, lib=LIBRARY)
register(Implementation(OP, "torch", reference.distribution_kl))
register(Implementation(f"{OP}_backward", "torch", reference.distribution_kl_backward))
register(Implementation(OP, "triton", triton.lazy("distribution_kl", OP), triton_declines))
register(Implementation(f"{OP}_backward", "triton", triton.lazy("distribution_kl", f"{OP}_backward"), triton_declines))

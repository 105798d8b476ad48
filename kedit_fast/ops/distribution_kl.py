"""KL divergence of two next-token distributions from hidden states, without the matrix of all logits."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register, requested, select
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
from kedit_fast.ops.target_log_probs import chain, check_head, fake_gradient, triton_declines
from kedit_fast.reference import distribution_kl as reference
from kedit_fast.support.dtypes import accumulation_dtype

OP = "distribution_kl"
LIBRARY.define(
    f"{OP}(Tensor hidden, Tensor hidden_ref, Tensor head, Tensor? bias, float softcap, bool gradient, str backend)"
    " -> (Tensor, Tensor)"
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
        head: [V, h] of the same dtype, or of 16 bits with fp32 states (backend "torch"). No gradient flows to it.
        bias: [V] or None.
        softcap: Gemma 2's logit cap; 0 for none.
        backend: "torch", "triton" or "auto"; None asks the context and the environment.

    Returns:
        [rows] fp32 (fp64 for fp64 input).

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device.
        GradientError: hidden_ref, head or bias require grad.

    Cost: 4 rows V h flops, and 4 (triton: 6) more where a gradient is wanted, which is computed at once and kept,
    [rows, h]. At a time there are 8,192 logits a row and distribution on a CPU and 16,384 on a GPU (torch), or none for
    the value and 64 MiB of them for the gradient (triton).
    """
    require_no_grad(OP, hidden_ref=hidden_ref, head=head, bias=bias)
    gradient = hidden.requires_grad and torch.is_grad_enabled()
    return torch.ops.kedit_fast.distribution_kl(
        hidden, hidden_ref, head, bias, float(softcap), gradient, backend or ""
    )[0]


def _check(hidden, hidden_ref, head, bias, softcap) -> None:
    check_head(hidden, head, bias, softcap)
    require(
        hidden_ref.shape == hidden.shape, lambda: f"hidden_ref must be {list(hidden.shape)}; got {describe(hidden_ref)}"
    )
    require_dtype("hidden_ref", hidden_ref, (hidden.dtype,))
    require_same_device(hidden=hidden, hidden_ref=hidden_ref, head=head, bias=bias)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(hidden, hidden_ref, head, bias, softcap, gradient, backend):
    _check(hidden, hidden_ref, head, bias, softcap)
    chosen = select(OP, requested(backend or None), hidden, hidden_ref, head)
    return run_stated(chosen, hidden, hidden_ref, head, bias, softcap, gradient)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(hidden, hidden_ref, head, bias, softcap, gradient, backend):
    _check(hidden, hidden_ref, head, bias, softcap)
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden)), fake_gradient(hidden, gradient)


def _setup_context(ctx, inputs, output):
    _, slope = output
    ctx.mark_non_differentiable(slope)
    ctx.gradient, ctx.dtype = inputs[5], inputs[0].dtype
    ctx.save_for_backward(slope)


def _backward(ctx, grad, *_):
    return chain(OP, ctx, grad), None, None, None, None, None, None


torch.library.register_autograd(f"kedit_fast::{OP}", _backward, setup_context=_setup_context, lib=LIBRARY)
register(Implementation(OP, "torch", reference.distribution_kl))
register(Implementation(OP, "triton", triton.lazy("distribution_kl", OP), triton_declines))

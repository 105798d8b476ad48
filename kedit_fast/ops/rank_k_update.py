"""The write: weight += alpha left right^T, rounded once."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import (
    describe,
    require,
    require_apart,
    require_dtype,
    require_finite_number,
    require_no_grad,
    require_not_overlapping,
    require_same_device,
)
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import rank_k_update as reference
from kedit_fast.support.dtypes import FLOATS

OP = "rank_k_update_"
CUDA_RANKS = 32
"""Ranks up to which the CUDA kernel is preferred."""
LIBRARY.define(f"{OP}(Tensor(a!) weight, Tensor left, Tensor right, float alpha, Tensor(b!)? copy, str backend) -> ()")
_op = torch.ops.kedit_fast.rank_k_update_.default


def rank_k_update_(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    alpha: float = 1.0,
    copy: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`weight += alpha left right^T` in place, computed in fp32 (fp64 for fp64 weights) and rounded once.

    Equivalent to `weight.copy_(weight.float() + alpha * left.float() @ right.float().T)`, and with `copy` to
    `copy.copy_(weight)` after it.

    Args:
        weight: [out, in] float32, float64, bfloat16 or float16, any strides (pass the transposed view of a Conv1D
            weight); written.
        left: [out, k] of a floating dtype, any strides.
        right: [in, k] likewise.
        alpha: factor of the update.
        copy: [out, in] bfloat16 or float16, or None. Only with a float32 `weight`, the master: `copy` receives the
            rounded result in the same pass. Written.
        backend: "torch", "cpu", "triton", "cuda" or "auto"; None takes the choice of `use_backend` or
            KEDIT_FAST_BACKEND.

    Returns:
        `weight`. The C++ kernels give the same bits for any number of threads. Backends differ by the rounding of the
        fp32 sums, at most k 2^-23 (|alpha| |left| |right|^T + |weight|) per entry, and 1 ulp of the weight's dtype.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device, overlapping memory, or an alpha that is not finite.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: 2 out in k flops; reads and writes `weight` once.
    Source: the insertion of ROME (arXiv 2202.05262, eq. 2) and MEMIT (arXiv 2210.07229, eq. 14).

    Example:
        >>> weight, left, right = torch.zeros(2, 3), torch.tensor([[1.0], [2.0]]), torch.ones(3, 1)
        >>> rank_k_update_(weight, left, right, alpha=0.5)
        tensor([[0.5000, 0.5000, 0.5000],
                [1.0000, 1.0000, 1.0000]])
    """
    require_finite_number("alpha", alpha)
    require_no_grad(OP, weight=weight, left=left, right=right, copy=copy)
    _op(weight, left, right, float(alpha), copy, backend or "")
    return weight


def rank_one_update_(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    alpha: float = 1.0,
    copy: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`weight += alpha left ⊗ right` in place: `rank_k_update_` with left [out] and right [in].

    Equivalent to `weight.copy_(torch.addr(weight.float(), left, right, alpha=alpha))`. Errors and cost are those of
    `rank_k_update_` with k = 1.

    Example:
        >>> rank_one_update_(torch.zeros(2, 3), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0]))
        tensor([[1., 0., 3.],
                [2., 0., 6.]])
    """
    require(left.ndim == 1 and right.ndim == 1, lambda: "left and right must be vectors, [out] and [in]")
    return rank_k_update_(weight, left[:, None], right[:, None], alpha, copy, backend=backend)


def _check(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, copy: torch.Tensor | None) -> None:
    require(weight.ndim == 2, lambda: f"weight must be [out, in]; got {describe(weight)}")
    require_dtype("weight", weight, FLOATS)
    out, inner = weight.shape
    require(left.ndim == 2 and left.shape[0] == out, lambda: f"left must be [{out}, k]; got {describe(left)}")
    k = left.shape[1]
    require(tuple(right.shape) == (inner, k), lambda: f"right must be [{inner}, {k}]; got {describe(right)}")
    require_dtype("left", left, FLOATS)
    require_dtype("right", right, FLOATS)
    if copy is not None:
        require(weight.dtype == torch.float32, lambda: f"copy needs a float32 weight; got {describe(weight)}")
        require(copy.shape == weight.shape, lambda: f"copy must be {list(weight.shape)}; got {describe(copy)}")
        require_dtype("copy", copy, (torch.bfloat16, torch.float16))
    require_same_device(weight=weight, left=left, right=right, copy=copy)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    alpha: float,
    copy: torch.Tensor | None,
    backend: str,
) -> None:
    _check(weight, left, right, copy)
    require_not_overlapping("weight", weight)
    require_apart("weight", weight, left=left, right=right, copy=copy)
    if copy is not None:
        require_not_overlapping("copy", copy)
        require_apart("copy", copy, left=left, right=right)
    if left.shape[1] == 0 and copy is None:
        return
    dispatch(OP, backend, (weight, left, right, copy), weight, left, right, alpha, copy)
    torch.autograd.graph.increment_version(weight)
    if copy is not None:
        torch.autograd.graph.increment_version(copy)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    alpha: float,
    copy: torch.Tensor | None,
    backend: str,
) -> None:
    _check(weight, left, right, copy)


def _cpu_declines(weight: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_device(weight)


def _cuda_declines(
    weight: torch.Tensor, left: torch.Tensor | None = None, right: torch.Tensor | None = None, *_: object
) -> str:
    return native.cuda.declines_device(weight) or triton.declines_float64(weight, left, right)


def _triton_declines(
    weight: torch.Tensor, left: torch.Tensor | None = None, right: torch.Tensor | None = None, *_: object
) -> str:
    return triton.declines_device(weight) or triton.declines_float64(weight, left, right)


def _cuda_is_slower(weight: torch.Tensor, left: torch.Tensor | None = None, *_: object) -> str:
    """Its threads multiply without the matrix unit; measured on an H200: see benchmarks."""
    is_slower = left is not None and left.shape[1] > CUDA_RANKS
    return f"Triton's kernel is faster above rank {CUDA_RANKS}" if is_slower else ""


register(Implementation(OP, "torch", reference.rank_k_update_))
register(Implementation(OP, "cpu", native.cpu.rank_k_update_, _cpu_declines))
register(Implementation(OP, "cuda", native.cuda.rank_k_update_, _cuda_declines, _cuda_is_slower))
register(Implementation(OP, "triton", triton.lazy("rank_k_update", OP), _triton_declines))

"""The second-moment kernel: acc += alpha x^T diag(w) x on the lower triangle."""

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
from kedit_fast.reference import symmetric_rank_k_update as reference
from kedit_fast.support.dtypes import FLOATS

OP = "symmetric_rank_k_update_"
LIBRARY.define(f"{OP}(Tensor(a!) acc, Tensor x, Tensor? row_weights, Tensor? mask, float alpha, str backend) -> ()")
_op = torch.ops.kedit_fast.symmetric_rank_k_update_.default


def symmetric_rank_k_update_(
    acc: torch.Tensor,
    x: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alpha: float = 1.0,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`acc += alpha x^T diag(row_weights * mask) x` in place, in the lower triangle only.

    Equivalent to `acc += torch.tril(alpha * (x.float() * w[:, None]).T @ x.float())`, except that the strict upper
    triangle is neither read nor written; `mirror_(acc)` fills it.

    Args:
        acc: [d, d] float32 or float64, contiguous rows; written.
        x: [n, d] float32, float64, bfloat16 or float16, any strides. float64 rows need a float64 `acc`.
        row_weights: [n] float32 or float64, or None for ones.
        mask: [n] bool, or None for all rows. A row whose mask is false or whose weight is 0 does not count, even if it
            holds NaN.
        alpha: factor of the whole update.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        `acc`. Products of 16-bit rows are exact in fp32; sums over a chunk of rows are in fp32 (fp64 for fp64 rows),
        and chunks are added in the dtype of `acc`. The Triton kernel writes fp32 rows, and weighted rows, as sums of
        three bf16 numbers and computes the six largest of the nine products: exact to the rounding of fp32. The C++
        kernels give the same bits for any number of threads, the Triton kernel at every run. A row that counts and is
        not finite makes the entries that it contributes to not finite.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device, overlapping memory, or an alpha that is not finite.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: n d (d + 1) flops; reads n d elements, reads and writes d (d + 1) / 2 elements of `acc`.
    Source: the covariance of ROME (arXiv 2202.05262, eq. 8) and MEMIT (arXiv 2210.07229, eq. 15).

    Example:
        >>> acc, x = torch.zeros(3, 3), torch.randn(10, 3)
        >>> torch.allclose(symmetric_rank_k_update_(acc, x), torch.tril(x.T @ x), atol=1e-5)
        True
    """
    require_finite_number("alpha", alpha)
    require_no_grad(OP, acc=acc, x=x, row_weights=row_weights)
    _op(acc, x, row_weights, mask, float(alpha), backend or "")
    return acc


def mirror_(acc: torch.Tensor) -> torch.Tensor:
    """Copy the lower triangle of `acc` [d, d] to the upper one, in place; returns `acc`.

    Raises:
        InvalidArgumentError: `acc` is not a square matrix.

    Cost: reads and writes d (d - 1) / 2 elements; makes no second matrix.

    Example:
        >>> mirror_(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
        tensor([[1., 2.],
                [2., 3.]])
    """
    require(acc.ndim == 2 and acc.shape[0] == acc.shape[1], lambda: f"acc must be square; got {describe(acc)}")
    reference.mirror_(acc)
    return acc


def _check(acc: torch.Tensor, x: torch.Tensor, row_weights: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    require(acc.ndim == 2 and acc.shape[0] == acc.shape[1], lambda: f"acc must be [d, d]; got {describe(acc)}")
    require_dtype("acc", acc, (torch.float32, torch.float64))
    require(
        acc.shape[1] <= 1 or acc.stride(1) == 1, lambda: f"acc must have contiguous rows; got strides {acc.stride()}"
    )
    require(x.ndim == 2 and x.shape[1] == acc.shape[0], lambda: f"x must be [n, {acc.shape[0]}]; got {describe(x)}")
    require_dtype("x", x, FLOATS)
    require(x.dtype != torch.float64 or acc.dtype == torch.float64, lambda: "acc must be float64 for float64 rows of x")
    if row_weights is not None:
        _check_rows("row_weights", row_weights, x)
        require_dtype("row_weights", row_weights, (torch.float32, torch.float64))
    if mask is not None:
        _check_rows("mask", mask, x)
        require_dtype("mask", mask, (torch.bool,))
    require_same_device(acc=acc, x=x, row_weights=row_weights, mask=mask)


def _check_rows(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    fits = tensor.shape == x.shape[:1]
    require(fits, lambda: f"{name} must be [{x.shape[0]}], one entry per row; got {describe(tensor)}")


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    acc: torch.Tensor,
    x: torch.Tensor,
    row_weights: torch.Tensor | None,
    mask: torch.Tensor | None,
    alpha: float,
    backend: str,
) -> None:
    _check(acc, x, row_weights, mask)
    require_not_overlapping("acc", acc)
    require_apart("acc", acc, x=x, row_weights=row_weights, mask=mask)
    dispatch(OP, backend, (acc, x), acc, x, row_weights, mask, alpha)
    torch.autograd.graph.increment_version(acc)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    acc: torch.Tensor,
    x: torch.Tensor,
    row_weights: torch.Tensor | None,
    mask: torch.Tensor | None,
    alpha: float,
    backend: str,
) -> None:
    _check(acc, x, row_weights, mask)


def _cpu_declines(acc: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_device(acc)


def _triton_declines(acc: torch.Tensor, x: torch.Tensor, *_: object) -> str:
    return triton.declines_device(acc) or ("float64 rows" if x.dtype == torch.float64 else "")


register(Implementation(OP, "torch", reference.symmetric_rank_k_update_))
register(Implementation(OP, "cpu", native.cpu.symmetric_rank_k_update_, _cpu_declines))
register(Implementation(OP, "triton", triton.lazy("symmetric_rank_k_update", OP), _triton_declines))

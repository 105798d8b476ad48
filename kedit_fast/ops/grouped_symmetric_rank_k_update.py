"""The second-moment kernel of a stack: acc[e] += alpha x_e^T diag(w_e) x_e, rows sorted by e."""

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
    require_offsets,
    require_rising,
    require_same_device,
)
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import grouped_symmetric_rank_k_update as reference
from kedit_fast.support.dtypes import FLOATS

OP = "grouped_symmetric_rank_k_update_"
LIBRARY.define(f"{OP}(Tensor(a!) acc, Tensor x, Tensor offsets, Tensor? row_weights, float alpha, str backend) -> ()")
_op = torch.ops.kedit_fast.grouped_symmetric_rank_k_update_.default


def grouped_symmetric_rank_k_update_(
    acc: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    alpha: float = 1.0,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`acc[e] += alpha x_e^T diag(w_e) x_e` for every group e, in place, in the lower triangles only.

    x_e is `x[offsets[e]:offsets[e + 1]]`: the rows are sorted by group. Equivalent to
    `symmetric_rank_k_update_(acc[e], x_e, w_e, alpha=alpha)` for every e. The strict upper triangles are neither read
    nor written; `mirror_(acc[e])` fills one.

    Args:
        acc: [E, d, d] float32 or float64, contiguous rows; written.
        x: [n, d] float32, float64, bfloat16 or float16, any strides. float64 rows need a float64 `acc`.
        offsets: int64 [E + 1] on the device, rising from 0 to n. Checked on a CPU alone; on a GPU offsets outside of
            the rows are cut off.
        row_weights: [n] float32 or float64, or None for ones. A row whose weight is 0 does not count, even if it holds
            NaN.
        alpha: factor of the whole update.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        `acc`, with the precision of `symmetric_rank_k_update_`; a group without rows is not touched. The C++ kernels
        give the bits of a loop over that op, for any number of threads, the Triton kernel the same bits at every run.
        Triton's host never waits for the GPU, the `torch` backend's waits for `offsets`.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device, overlapping memory, offsets that do not rise from 0 to n,
            or an alpha that is not finite.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: n d (d + 1) flops; reads n d elements, reads and writes d (d + 1) / 2 elements of `acc` for each group that
    has rows.
    Source: the covariance of MEMIT (arXiv 2210.07229, eq. 15) for each expert of a mixture.

    Example:
        >>> acc, x, offsets = torch.zeros(2, 3, 3), torch.randn(10, 3), torch.tensor([0, 4, 10])
        >>> _ = grouped_symmetric_rank_k_update_(acc, x, offsets)
        >>> torch.allclose(acc[1], torch.tril(x[4:].T @ x[4:]), atol=1e-5)
        True
    """
    require_finite_number("alpha", alpha)
    require_no_grad(OP, acc=acc, x=x, row_weights=row_weights)
    _op(acc, x, offsets, row_weights, float(alpha), backend or "")
    return acc


def _check(acc: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, row_weights: torch.Tensor | None) -> None:
    require(acc.ndim == 3 and acc.shape[1] == acc.shape[2], lambda: f"acc must be [E, d, d]; got {describe(acc)}")
    require_dtype("acc", acc, (torch.float32, torch.float64))
    require(
        acc.shape[2] <= 1 or acc.stride(2) == 1, lambda: f"acc must have contiguous rows; got strides {acc.stride()}"
    )
    require(x.ndim == 2 and x.shape[1] == acc.shape[1], lambda: f"x must be [n, {acc.shape[1]}]; got {describe(x)}")
    require_dtype("x", x, FLOATS)
    require(x.dtype != torch.float64 or acc.dtype == torch.float64, lambda: "acc must be float64 for float64 rows of x")
    require_offsets("offsets", offsets, acc.shape[0])
    if row_weights is not None:
        fits = row_weights.shape == x.shape[:1]
        require(fits, lambda: f"row_weights must be [{x.shape[0]}], one entry per row; got {describe(row_weights)}")
        require_dtype("row_weights", row_weights, (torch.float32, torch.float64))
    require_same_device(acc=acc, x=x, offsets=offsets, row_weights=row_weights)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    acc: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    row_weights: torch.Tensor | None,
    alpha: float,
    backend: str,
) -> None:
    _check(acc, x, offsets, row_weights)
    require_not_overlapping("acc", acc)
    require_apart("acc", acc, x=x, offsets=offsets, row_weights=row_weights)
    require_rising("offsets", offsets, x.shape[0], "the rows of x")
    dispatch(OP, backend, (acc, x), acc, x, offsets, row_weights, alpha)
    torch.autograd.graph.increment_version(acc)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    acc: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    row_weights: torch.Tensor | None,
    alpha: float,
    backend: str,
) -> None:
    _check(acc, x, offsets, row_weights)


def _cpu_declines(acc: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_older(OP, acc)


def _triton_declines(acc: torch.Tensor, x: torch.Tensor, *_: object) -> str:
    return triton.declines_device(acc) or ("float64 rows" if x.dtype == torch.float64 else "")


register(Implementation(OP, "torch", reference.grouped_symmetric_rank_k_update_))
register(Implementation(OP, "cpu", native.cpu.grouped_symmetric_rank_k_update_, _cpu_declines))
register(Implementation(OP, "triton", triton.lazy("grouped_symmetric_rank_k_update", OP), _triton_declines))

"""The write of a stack: weight[e] += alpha left[:, columns_e] right_e, rounded once."""

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
from kedit_fast.reference import grouped_rank_k_update as reference
from kedit_fast.support.dtypes import FLOATS

OP = "grouped_rank_k_update_"
LIBRARY.define(
    f"{OP}(Tensor(a!) weight, Tensor left, Tensor right, Tensor columns, Tensor offsets, float alpha, "
    "Tensor(b!)? copy, str backend) -> ()"
)
_op = torch.ops.kedit_fast.grouped_rank_k_update_.default


def grouped_rank_k_update_(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    alpha: float = 1.0,
    copy: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`weight[e] += alpha left[:, columns_e] right_e` for every e, in place, in fp32 (fp64 for fp64), rounded once.

    right_e and columns_e are the rows `offsets[e]:offsets[e + 1]` of `right` and `columns`: each row of `right` says
    what its matrix adds times one column of `left`. Equivalent to
    `rank_k_update_(weight[e], left[:, columns_e], right_e.T, alpha, copy[e])` for every e.

    Args:
        weight: [E, out, in] float32, float64, bfloat16 or float16, any strides (pass the transposed view where the
            stack is stored as [E, in, out]); written.
        left: [out, u] of a floating dtype, any strides.
        right: [n, in] likewise, its rows sorted by matrix.
        columns: int64 [n] on the device: the column of `left` that belongs to each row of `right`, 0 to u - 1. Checked
            on a CPU alone; on a GPU what another column would add is NaN.
        offsets: int64 [E + 1] on the device, rising from 0 to n. Checked on a CPU alone; on a GPU offsets outside of
            the rows are cut off.
        alpha: factor of the update.
        copy: [E, out, in] bfloat16 or float16, or None. Only with a float32 `weight`, the master: `copy` receives the
            rounded result in the same pass, that of matrices without rows too. Written.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        `weight`, with the precision of `rank_k_update_`; a matrix without rows is not touched. The C++ kernels give
        the bits of a loop over that op, for any number of threads. Triton's host never waits for the GPU, the `torch`
        backend's waits for `offsets`.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device, overlapping memory, offsets that do not rise from 0 to n, a
            column that `left` does not have, or an alpha that is not finite.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: 2 out in n flops; reads and writes each matrix that has rows once.
    Source: the insertion of MEMIT (arXiv 2210.07229, eq. 14) into the stacked experts of a mixture, [W_1 ... W_E].

    Example:
        >>> weight, left = torch.zeros(2, 2, 3), torch.tensor([[1.0, 5.0], [2.0, 6.0]])
        >>> columns, offsets = torch.tensor([1]), torch.tensor([0, 0, 1])
        >>> grouped_rank_k_update_(weight, left, torch.ones(1, 3), columns, offsets)[1]
        tensor([[5., 5., 5.],
                [6., 6., 6.]])
    """
    require_finite_number("alpha", alpha)
    require_no_grad(OP, weight=weight, left=left, right=right, copy=copy)
    _op(weight, left, right, columns, offsets, float(alpha), copy, backend or "")
    return weight


def _check(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    copy: torch.Tensor | None,
) -> None:
    require(weight.ndim == 3, lambda: f"weight must be [E, out, in]; got {describe(weight)}")
    require_dtype("weight", weight, FLOATS)
    count, out, inner = weight.shape
    require(left.ndim == 2 and left.shape[0] == out, lambda: f"left must be [{out}, u]; got {describe(left)}")
    require(right.ndim == 2 and right.shape[1] == inner, lambda: f"right must be [n, {inner}]; got {describe(right)}")
    require_dtype("left", left, FLOATS)
    require_dtype("right", right, FLOATS)
    rows = right.shape[0]
    require(
        tuple(columns.shape) == (rows,),
        lambda: f"columns must be [{rows}], one for each row of right; got {describe(columns)}",
    )
    require_dtype("columns", columns, (torch.int64,))
    require_offsets("offsets", offsets, count)
    if copy is not None:
        require(weight.dtype == torch.float32, lambda: f"copy needs a float32 weight; got {describe(weight)}")
        require(copy.shape == weight.shape, lambda: f"copy must be {list(weight.shape)}; got {describe(copy)}")
        require_dtype("copy", copy, (torch.bfloat16, torch.float16))
    require_same_device(weight=weight, left=left, right=right, columns=columns, offsets=offsets, copy=copy)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    alpha: float,
    copy: torch.Tensor | None,
    backend: str,
) -> None:
    _check(weight, left, right, columns, offsets, copy)
    require_not_overlapping("weight", weight)
    read = {"left": left, "right": right, "columns": columns, "offsets": offsets}
    require_apart("weight", weight, **read, copy=copy)
    if copy is not None:
        require_not_overlapping("copy", copy)
        require_apart("copy", copy, **read)
    require_rising("offsets", offsets, right.shape[0], "the rows of right")
    if columns.device.type == "cpu" and columns.numel():
        low, high = (int(end) for end in columns.aminmax())
        last = left.shape[1] - 1
        require(low >= 0 and high <= last, lambda: f"columns must be 0 to {last}; got {low} to {high}")
    if right.shape[0] == 0 and copy is None:
        return
    dispatch(OP, backend, (weight, left, right, copy), weight, left, right, columns, offsets, alpha, copy)
    torch.autograd.graph.increment_version(weight)
    if copy is not None:
        torch.autograd.graph.increment_version(copy)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    alpha: float,
    copy: torch.Tensor | None,
    backend: str,
) -> None:
    _check(weight, left, right, columns, offsets, copy)


def _cpu_declines(weight: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_older(OP, weight)


def _triton_declines(
    weight: torch.Tensor, left: torch.Tensor | None = None, right: torch.Tensor | None = None, *_: object
) -> str:
    return triton.declines_device(weight) or triton.declines_float64(weight, left, right)


register(Implementation(OP, "torch", reference.grouped_rank_k_update_))
register(Implementation(OP, "cpu", native.cpu.grouped_rank_k_update_, _cpu_declines))
register(Implementation(OP, "triton", triton.lazy("grouped_rank_k_update", OP), _triton_declines))

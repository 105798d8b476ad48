"""The size that a given number of entries reach: a selection over a whole matrix without sorting it."""

from __future__ import annotations

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import describe, require, require_dtype, require_no_grad, require_same_device
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import magnitude_bound as reference
from kedit_fast.support.dtypes import FLOATS, accumulation_dtype

OP = "magnitude_bound"
LIBRARY.define(f"{OP}(Tensor x, int count, Tensor? divisor, str backend) -> Tensor")
_op = torch.ops.kedit_fast.magnitude_bound.default


def magnitude_bound(
    x: torch.Tensor, count: int, divisor: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """The count-th largest |x|, or |x / (divisor + 1e-8)|, over all entries.

    Equivalent to `x.abs().flatten().topk(count).values[-1]`.

    Args:
        x: any shape but empty, of a floating dtype.
        count: between 1 and the number of entries.
        divisor: of the shape of x and a floating dtype, or None.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        [] float32 (float64 for a float64 x, which the quotient has too): one of the sizes, exactly, the same on every
        backend. NaN where a size is NaN; infinity is the largest size.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device, or a count out of range.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: one selection over the entries.
    Source: RECT (arXiv 2401.04700) keeps the largest relative changes; TIES-Merging (arXiv 2306.01708) trims with it.

    Example:
        >>> magnitude_bound(torch.tensor([3.0, -5.0, 1.0, 4.0]), 2)
        tensor(4.)
        >>> magnitude_bound(torch.tensor([3.0, -5.0]), 1, torch.tensor([0.5, 2.0]))
        tensor(6.)
    """
    require_no_grad(OP, x=x, divisor=divisor)
    return _op(x, count, divisor, backend or "")


def _check(x: torch.Tensor, count: int, divisor: torch.Tensor | None) -> None:
    require_dtype("x", x, FLOATS)
    require(1 <= count <= x.numel(), lambda: f"count must be in [1, {x.numel()}], the entries of x; got {count}")
    if divisor is not None:
        require(divisor.shape == x.shape, lambda: f"divisor must be {list(x.shape)}; got {describe(divisor)}")
        require_dtype("divisor", divisor, FLOATS)
    require_same_device(x=x, divisor=divisor)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(x: torch.Tensor, count: int, divisor: torch.Tensor | None, backend: str) -> torch.Tensor:
    _check(x, count, divisor)
    if x.ndim == 2 and x.T.is_contiguous():
        x, divisor = x.T, None if divisor is None else divisor.T  # any order of the entries will do
    if divisor is not None:
        narrow = torch.float64 not in (x.dtype, divisor.dtype)
        divisor = (divisor if narrow else divisor.to(accumulation_dtype(x))).reshape(-1)
    return dispatch(OP, backend, (x, divisor), x.reshape(-1), count, divisor)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(x: torch.Tensor, count: int, divisor: torch.Tensor | None, backend: str) -> torch.Tensor:
    _check(x, count, divisor)
    return x.new_empty((), dtype=accumulation_dtype(x))


def _cpu_declines(first: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_device(first)


def _triton_declines(first: torch.Tensor, *others: torch.Tensor | None) -> str:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in (first, *others))
    return triton.declines_device(first) or ("float64" if wide else "")


register(Implementation(OP, "torch", reference.magnitude_bound))
register(Implementation(OP, "cpu", native.cpu.magnitude_bound, _cpu_declines))
register(Implementation(OP, "triton", triton.lazy("magnitude_bound", "magnitude_bound"), _triton_declines))

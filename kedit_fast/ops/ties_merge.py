"""Several changed copies of a matrix merged into one: trim, one sign an entry, mean of those that have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.errors import InvalidArgumentError
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
from kedit_fast.reference import ties_merge as reference
from kedit_fast.support.dtypes import FLOATS, accumulation_dtype

OP = "ties_merge_"
MOST_MEMORIES = 16
LIBRARY.define(
    f"{OP}(Tensor(a!) out, Tensor base, Tensor memories, float[] coefficients, float density, str backend) -> ()"
)
_op = torch.ops.kedit_fast.ties_merge_.default


def ties_merge_(
    out: torch.Tensor,
    base: torch.Tensor,
    memories: torch.Tensor,
    coefficients: Sequence[float],
    density: float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`base + sum_m c_m t_m / sum_m c_m`, over the memories whose trimmed difference t_m has the sign of their sum.

    t_m is W_m - base at its int(density h d) entries of largest size, those of equal size from the lowest index on, and
    0 elsewhere. The sign of an entry is that of sum_m c_m t_m, and + where the sum is 0. An entry that no memory
    changes stays that of `base`.

    Args:
        out: [h, d] of a floating dtype, any strides; written.
        base: [h, d] of a floating dtype.
        memories: [M, h, d] of a floating dtype, M from 1 to 16: the changed copies of `base`.
        coefficients: M finite numbers, the weight of each memory.
        density: share of the entries that a memory keeps, in [0, 1].
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        `out`. Computed in fp32 (fp64 where base or memories are fp64) and rounded once; the same on every backend.

    Raises:
        InvalidArgumentError: a wrong shape, dtype, device or number, overlapping memory, or a memory or base with
            values that are not finite. Nothing is written then.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: one selection over the entries of each memory, and one pass over all. It waits for the device, once a memory.
    Source: TIES-Merging (arXiv 2306.01708), as WISE (arXiv 2405.14768) merges its memories.

    Example:
        >>> base, memories = torch.zeros(1, 3), torch.tensor([[[4.0, 1.0, 3.0]], [[2.0, 0.5, -1.0]]])
        >>> ties_merge_(torch.empty(1, 3), base, memories, [0.5, 0.5], density=0.7)
        tensor([[3., 0., 3.]])
    """
    require_finite_number("density", density)
    for number in coefficients:
        require_finite_number("each of coefficients", number)
    require_no_grad(OP, out=out, base=base, memories=memories)
    _op(out, base, memories, [float(number) for number in coefficients], float(density), backend or "")
    return out


def _check(
    out: torch.Tensor, base: torch.Tensor, memories: torch.Tensor, coefficients: Sequence[float], density: float
) -> None:
    require(base.ndim == 2, lambda: f"base must be [h, d]; got {describe(base)}")
    h, d = base.shape
    require(out.shape == base.shape, lambda: f"out must be [{h}, {d}]; got {describe(out)}")
    fits = memories.ndim == 3 and memories.shape[1:] == base.shape and 1 <= memories.shape[0] <= MOST_MEMORIES
    require(fits, lambda: f"memories must be [M, {h}, {d}], M from 1 to {MOST_MEMORIES}; got {describe(memories)}")
    require_dtype("out", out, FLOATS)
    require_dtype("base", base, FLOATS)
    require_dtype("memories", memories, FLOATS)
    m = memories.shape[0]
    require(len(coefficients) == m, lambda: f"coefficients must be {m}, one a memory; got {len(coefficients)}")
    require(0 <= density <= 1, lambda: f"density must be in [0, 1]; got {density}")
    require_same_device(out=out, base=base, memories=memories)


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    out: torch.Tensor,
    base: torch.Tensor,
    memories: torch.Tensor,
    coefficients: Sequence[float],
    density: float,
    backend: str,
) -> None:
    _check(out, base, memories, coefficients, density)
    require_not_overlapping("out", out)
    require_apart("out", out, base=base, memories=memories)
    if not base.numel():
        return
    if wide := torch.float64 in (base.dtype, memories.dtype):
        base, memories = base.double(), memories.double()
    in_place = out.is_contiguous() and (out.dtype == torch.float64) == wide
    result = out if in_place else torch.empty(base.shape, dtype=accumulation_dtype(base), device=out.device)
    entries = result.view(-1), base.reshape(-1), memories.reshape(len(memories), -1)
    if not dispatch(OP, backend, entries, *entries, coefficients, int(density * base.numel())):
        raise InvalidArgumentError(f"{OP}: base or a memory has values that are not finite")
    if not in_place:
        out.copy_(result)
    torch.autograd.graph.increment_version(out)


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    out: torch.Tensor,
    base: torch.Tensor,
    memories: torch.Tensor,
    coefficients: Sequence[float],
    density: float,
    backend: str,
) -> None:
    _check(out, base, memories, coefficients, density)


def _cpu_declines(first: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_device(first)


def _triton_declines(first: torch.Tensor, *others: torch.Tensor | None) -> str:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in (first, *others))
    return triton.declines_device(first) or ("float64" if wide else "")


register(Implementation(OP, "torch", reference.ties_merge_))
register(Implementation(OP, "cpu", native.cpu.ties_merge_, _cpu_declines))
register(Implementation(OP, "triton", triton.lazy("ties_merge", "ties_merge_"), _triton_declines))

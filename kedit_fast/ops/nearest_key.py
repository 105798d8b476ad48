"""Which key of a memory is nearest to a query, and whether the query lies within that key's radius."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kedit_fast.backends import Implementation, register
from kedit_fast.kernels import native, triton
from kedit_fast.ops._checks import describe, require, require_dtype, require_no_grad, require_same_device
from kedit_fast.ops._library import LIBRARY, dispatch
from kedit_fast.reference import nearest_key as reference
from kedit_fast.support.dtypes import FLOATS

OP = "nearest_key"
LIBRARY.define(f"{OP}(Tensor queries, Tensor keys, Tensor radii, str backend) -> (Tensor, Tensor, Tensor)")
_op = torch.ops.kedit_fast.nearest_key.default


class NearestKey(NamedTuple):
    """What `nearest_key` returns."""

    index: torch.Tensor
    """[N] int64, the nearest key; the lowest of those at equal distance, -1 where there is no key."""
    distance: torch.Tensor
    """[N] Euclidean distance to it, fp32 (fp64 where queries or keys are fp64); infinity where there is no key."""
    inside: torch.Tensor
    """[N] bool, whether the distance is at most the radius of that key."""


def nearest_key(
    queries: torch.Tensor, keys: torch.Tensor, radii: torch.Tensor, *, backend: str | None = None
) -> NearestKey:
    """`min_j |query - key_j|` for every query, from differences: exact where |q|^2 + |k|^2 - 2 q k would cancel.

    Equivalent to `torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist").min(1)`, with ties to the
    lowest index, and `distance <= radii[index]`.

    Args:
        queries: [N, d] of a floating dtype.
        keys: [K, d] of a floating dtype; K may be 0.
        radii: [K] float32 or float64, the radius of each key. A negative one contains nothing.
        backend: "torch", "cpu", "triton" or "auto"; None takes the choice of `use_backend` or KEDIT_FAST_BACKEND.

    Returns:
        NearestKey. Differences, squares and sums are in fp32, in fp64 where queries or keys are fp64. The C++ kernel
        gives the same bits for any number of threads. A distance that is NaN is compared as infinity, so a key that
        holds NaN is never preferred to a sound one; a query that holds NaN has the distance NaN, and is inside nothing.

    Raises:
        InvalidArgumentError: a wrong shape, dtype or device.
        BackendUnavailableError: `backend` cannot run.
        GradientError: an argument requires grad.

    Cost: 3 N K d flops.
    Source: GRACE (arXiv 2211.11031), section 3.2.

    Example:
        >>> keys, radii = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([1.0, 1.0])
        >>> nearest = nearest_key(torch.tensor([[3.0, 3.5], [0.0, 2.0]]), keys, radii)
        >>> nearest.index, nearest.distance, nearest.inside
        (tensor([1, 0]), tensor([0.5000, 2.0000]), tensor([ True, False]))
    """
    require_no_grad(OP, queries=queries, keys=keys, radii=radii)
    return NearestKey(*_op(queries, keys, radii, backend or ""))


def _check(queries: torch.Tensor, keys: torch.Tensor, radii: torch.Tensor) -> None:
    require(queries.ndim == 2, lambda: f"queries must be [N, d]; got {describe(queries)}")
    d = queries.shape[1]
    require(keys.ndim == 2 and keys.shape[1] == d, lambda: f"keys must be [K, {d}]; got {describe(keys)}")
    require(radii.shape == keys.shape[:1], lambda: f"radii must be [{keys.shape[0]}]; got {describe(radii)}")
    require_dtype("queries", queries, FLOATS)
    require_dtype("keys", keys, FLOATS)
    require_dtype("radii", radii, (torch.float32, torch.float64))
    require_same_device(queries=queries, keys=keys, radii=radii)


def _wide(queries: torch.Tensor, keys: torch.Tensor) -> torch.dtype:
    """The dtype of the distances."""
    return torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32


@torch.library.impl(LIBRARY, OP, "CompositeExplicitAutograd")
def _run(
    queries: torch.Tensor, keys: torch.Tensor, radii: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(queries, keys, radii)
    if not len(keys):
        index = torch.full(queries.shape[:1], -1, dtype=torch.int64, device=queries.device)
        return index, queries.new_full(queries.shape[:1], torch.inf, dtype=_wide(queries, keys)), index >= 0
    index, distance = dispatch(OP, backend, (queries, keys), queries, keys)
    return index, distance, distance <= radii[index]


@torch.library.register_fake(f"kedit_fast::{OP}", lib=LIBRARY)
def _fake(
    queries: torch.Tensor, keys: torch.Tensor, radii: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(queries, keys, radii)
    row = queries.new_empty(queries.shape[0], dtype=_wide(queries, keys))
    return torch.empty_like(row, dtype=torch.int64), row, torch.empty_like(row, dtype=torch.bool)


def _cpu_declines(first: torch.Tensor, *_: object) -> str:
    return native.cpu.declines_device(first)


def _triton_declines(first: torch.Tensor, *others: torch.Tensor | None) -> str:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in (first, *others))
    return triton.declines_device(first) or ("float64" if wide else "")


register(Implementation(OP, "torch", reference.nearest_key))
register(Implementation(OP, "cpu", native.cpu.nearest_key, _cpu_declines))
register(Implementation(OP, "triton", triton.lazy("nearest_key", "nearest_key"), _triton_declines))

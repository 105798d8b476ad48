"""Reference of `magnitude_bound`: the count-th largest size of an entry."""

from __future__ import annotations

import torch

from kedit_fast.support.dtypes import accumulation_dtype

EPSILON = 1e-8
"""Added to a divisor, as RECT publishes it."""


def magnitude_bound(x: torch.Tensor, count: int, divisor: torch.Tensor | None = None) -> torch.Tensor:
    """The count-th largest |x| or |x / (divisor + 1e-8)| of entries [n], []; NaN where one is NaN."""
    size = x.to(accumulation_dtype(x))
    if divisor is not None:
        size = size / (divisor.to(size.dtype) + EPSILON)
    return largest(size.abs(), count)


def largest(size: torch.Tensor, count: int) -> torch.Tensor:
    """The entry of that rank of size [n], counted from 1 for the largest; NaN where an entry is NaN."""
    if size.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        ordered = size.sort().values  # torch refuses kthvalue there, because of the index that it returns too
        bound = ordered[len(ordered) - count]
    else:
        bound = size.kthvalue(len(size) - count + 1).values
    return torch.where(size.isnan().any(), torch.nan, bound)

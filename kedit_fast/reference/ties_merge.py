"""Reference of `ties_merge_`: trimmed differences, one sign an entry, and the mean of those that have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedit_fast.reference.magnitude_bound import largest


def ties_merge_(
    out: torch.Tensor, base: torch.Tensor, memories: torch.Tensor, coefficients: Sequence[float], count: int
) -> bool:
    """Merge memories [M, n] into base [n], each trimmed to `count` entries, and write `out` [n].

    Returns False, with nothing written, where a difference is not finite.
    """
    wide = torch.float64 if torch.float64 in (base.dtype, memories.dtype) else torch.float32
    start = base.to(wide)
    if not all(bool(torch.isfinite(memory.to(wide) - start).all()) for memory in memories):
        return False
    weighted = [c * trimmed(memory.to(wide) - start, count) for c, memory in zip(coefficients, memories, strict=True)]
    total = sum(weighted[1:], weighted[0])
    positive = total >= 0
    merged, share = torch.zeros_like(start), torch.zeros_like(start)
    for c, part in zip(coefficients, weighted, strict=True):
        agrees = torch.where(positive, part > 0, part < 0)
        merged += torch.where(agrees, part, 0.0)
        share += agrees.to(wide) * c
    out.copy_(start + merged / torch.where(share == 0, 1.0, share))
    return True


def trimmed(delta: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` entries of largest size, those of equal size from the lowest index on; the others 0."""
    if count == 0:
        return torch.zeros_like(delta)
    size = delta.abs()
    bound = largest(size, count)
    above, at_bound = size > bound, size == bound
    within = at_bound & (at_bound.cumsum(0) <= count - above.sum())
    return torch.where(above | within, delta, 0.0)

"""NAS: the norm that the MLP's part of every value is scaled to, so that values do not grow with the weights.

Source: NAS (arXiv 2602.02543), its released `NAS/compute_z.py` and `util/vstar_stats.py`.
"""

from __future__ import annotations

import torch

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.support.torch_state import plain_torch

DROPPED_ABOVE = 2.0
"""Norms above this multiple of the anchor: the edit is dropped."""
LEFT_OUT = 20
"""The largest one of so many norms is left out of the mean."""
SMALLEST_NORM = 1e-10


@plain_torch()
def norm_anchor(norms: torch.Tensor) -> float:
    """The mean of n norms without the largest floor(n / 20).

    Args:
        norms: [n] norms |m + delta| of values on the unedited model.

    Raises:
        StatisticsError: no norms, or norms that are not finite and positive.

    Example:
        >>> norm_anchor(torch.tensor([1.0] * 19 + [100.0]))
        1.0
    """
    ordered = norms.double().sort().values
    if not ordered.numel() or not bool((ordered.isfinite() & (ordered > 0)).all()):
        raise StatisticsError(f"a norm anchor is the mean of finite, positive norms; got {ordered.numel()} norms")
    return float(ordered[: len(ordered) - len(ordered) // LEFT_OUT].mean())


@plain_torch()
def anchored(values: torch.Tensor, anchor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns scaled to the norm `anchor`, and which of them are dropped.

    Args:
        values: v = m + delta [h, u], the MLP's outputs that the edits ask for.
        anchor: the norm, positive.

    Returns:
        anchor v / (|v| + 1e-10) [h, u] fp64, and [u] bool, true where |v| > 2 anchor: such an edit is not written.

    Raises:
        InvalidArgumentError: an anchor that is not positive.

    Example:
        >>> scaled, dropped = anchored(torch.tensor([[3.0, 30.0], [4.0, 40.0]]), anchor=10.0)
        >>> scaled[:, 0].tolist(), dropped.tolist()
        ([6.0, 8.0], [False, True])
    """
    if not 0 < anchor < float("inf"):
        raise InvalidArgumentError(f"anchor must be a positive number; got {anchor}")
    values = values.double()
    norms = torch.linalg.vector_norm(values, dim=0)
    return values * (anchor / (norms + SMALLEST_NORM)), norms > DROPPED_ABOVE * anchor

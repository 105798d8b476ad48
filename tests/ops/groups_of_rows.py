"""Offsets of rows sorted by group: what the tests of the two grouped ops share."""

from __future__ import annotations

import torch

SIZES = {
    "one group": (37,),
    "empty ones first, between and last": (0, 3, 0, 0, 70, 1, 0),
    "no rows": (0, 0, 0),
    "128 groups": tuple(i % 4 for i in range(128)),
    "one has most": (2, 290, 5),
}
"""Rows by group."""


def offsets_of(sizes) -> torch.Tensor:
    """Where each group's rows begin, int64 [E + 1]."""
    return torch.tensor([0, *sizes]).cumsum(0)

"""Sums of rows that share an owner, with the same bits at every run on every device."""

from __future__ import annotations

import torch


def add_by_owner_(into: torch.Tensor, owner: torch.Tensor, rows: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """into[owner[i]] += alpha rows[i] for every i, in their order; returns `into`.

    On a CPU `index_add_` does that. On a GPU it adds by atomics in any order, so repeated runs, and the processes of a
    group, would drift apart; there the rows are sorted by owner first.

    Args:
        into: [n, ..]; written.
        owner: [m] int64, in [0, n), with repetitions.
        rows: [m, ..] of the same dtype.
        alpha: factor of the rows.
    """
    if into.device.type == "cpu":
        return into.index_add_(0, owner, rows, alpha=alpha)
    return into.index_put_((owner,), rows if alpha == 1 else rows * alpha, accumulate=True)

"""Reference of `grouped_symmetric_rank_k_update_`: one `symmetric_rank_k_update_` for each group of rows."""

from __future__ import annotations

from itertools import pairwise

import torch

from kedit_fast.reference.symmetric_rank_k_update import symmetric_rank_k_update_


def grouped_symmetric_rank_k_update_(
    acc: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, row_weights: torch.Tensor | None, alpha: float = 1.0
) -> None:
    """Add alpha x_e^T diag(w_e) x_e to the lower triangle of `acc[e]`, the rows of group e being x_e.

    On a GPU the host waits for `offsets`.
    """
    for group, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin < end:
            weights = None if row_weights is None else row_weights[begin:end]
            symmetric_rank_k_update_(acc[group], x[begin:end], weights, None, alpha)

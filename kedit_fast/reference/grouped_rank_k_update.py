"""Reference of `grouped_rank_k_update_`: one `rank_k_update_` for each matrix of a stack."""

from __future__ import annotations

from itertools import pairwise

import torch

from kedit_fast.reference.rank_k_update import rank_k_update_


def grouped_rank_k_update_(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    alpha: float = 1.0,
    copy: torch.Tensor | None = None,
) -> None:
    """Add alpha left[:, columns_e] right_e to `weight[e]` in fp32 (fp64 for fp64 weights) and round once.

    right_e and columns_e are the rows of group e. `copy` receives the rounded values of an fp32 `weight`, those of
    groups without rows too. On a GPU the host waits for `offsets`.
    """
    for group, (begin, end) in enumerate(pairwise(offsets.tolist())):
        narrow = None if copy is None else copy[group]
        if begin < end:
            rank_k_update_(weight[group], left[:, columns[begin:end]], right[begin:end].T, alpha, narrow)
        elif narrow is not None:
            narrow.copy_(weight[group])

"""Reference of `rank_k_update_`: weight += alpha left right^T, rounded once."""

from __future__ import annotations

import torch

from kedit_fast.support.dtypes import accumulation_dtype


def rank_k_update_(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    alpha: float = 1.0,
    copy: torch.Tensor | None = None,
) -> None:
    """Add alpha left right^T to `weight` [out, in] in fp32 (fp64 for fp64 weights) and round once.

    `copy` receives the rounded new value of an fp32 `weight`.
    """
    dtype = accumulation_dtype(weight)
    update = torch.addmm(weight.to(dtype), left.to(dtype) * alpha, right.to(dtype).T)
    weight.copy_(update)
    if copy is not None:
        copy.copy_(weight)

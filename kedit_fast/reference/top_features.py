"""Reference of `top_features`: the features of largest distance from a center, as bits."""

from __future__ import annotations

import torch

from kedit_fast.reference.entry_bits import pack_bits
from kedit_fast.support.dtypes import accumulation_dtype


def top_features(
    x: torch.Tensor, starts: torch.Tensor, center: torch.Tensor, k: int, permutation: torch.Tensor
) -> torch.Tensor:
    """Bits [R, ceil(d / 8)] of the k largest |mean(x[starts[r]:starts[r + 1]]) - center|, permuted."""
    wide, offsets = x.to(accumulation_dtype(x)), starts.to(torch.int64)
    mean = torch.segment_reduce(wide, "sum", offsets=offsets, axis=0, unsafe=True) / offsets.diff()[:, None]  # [R, d]
    score = (mean - center.to(wide.dtype)).abs()
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(score, dtype=torch.uint8).scatter_(1, permutation[order], 1)
    chosen *= score.isfinite().all(1, keepdim=True)
    padded = torch.nn.functional.pad(chosen, (0, -chosen.shape[1] % 8))
    return pack_bits(padded).view(len(padded), -1)

"""Reference of `nearest_key`: the key at the smallest distance, ties to the lowest index."""

from __future__ import annotations

import torch

ENTRIES = 1 << 24
"""Differences in memory at a time."""


def nearest_key(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and distance [N] of the nearest of keys [K, d] for queries [N, d], K > 0.

    Distances are those of differences in the dtype of computation. NaN is compared as infinity.
    """
    wide = torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
    queries, keys = queries.to(wide), keys.to(wide)
    rows = max(1, ENTRIES // max(1, keys.numel()))
    index = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    distance = queries.new_empty(len(queries))
    for begin in range(0, len(queries), rows):
        part = queries[begin : begin + rows, None]
        distances = torch.linalg.vector_norm(part - keys, dim=-1)  # [rows, K]
        nearest = distances.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(-1)
        index[begin : begin + rows] = nearest
        distance[begin : begin + rows] = distances.gather(1, nearest[:, None])[:, 0]
    return index, distance

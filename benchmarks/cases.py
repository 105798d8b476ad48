"""The shapes of the micro-benchmarks: the only place that holds them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SymmetricCase:
    """`symmetric_rank_k_update_` of `rows` rows of width `d`."""

    d: int
    rows: int
    dtype: str
    floor: float  # the ratio to reach (on AMX for bf16, on AVX-512 for fp32)


@dataclass(frozen=True)
class RankKCase:
    """`rank_k_update_` of rank `k` on a weight [out, inner]: Llama-3-8B's down_proj."""

    out: int
    inner: int
    k: int
    dtype: str
    floor: float


SYMMETRIC = [
    SymmetricCase(d, rows, dtype, floor)
    for dtype, floor in (("bfloat16", 5.0), ("float32", 1.4))
    for d, rows in ((1024, 4096), (2048, 4096), (4096, 4096), (8192, 2048))
]
RANK_K = [RankKCase(4096, 14336, k, "bfloat16", floor) for k, floor in ((1, 5.0), (16, 4.0), (64, 2.0))]

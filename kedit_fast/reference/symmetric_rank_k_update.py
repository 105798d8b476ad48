"""Reference of `symmetric_rank_k_update_`: acc's lower triangle += alpha x^T diag(w) x."""

from __future__ import annotations

import torch

from kedit_fast.reference.wide_product import HALVES, has_wide_product, wide_product
from kedit_fast.support.dtypes import accumulation_dtype

DEPTH = 256
"""Rows that the matrix unit sums before their sum is rounded to fp32."""


def symmetric_rank_k_update_(
    acc: torch.Tensor,
    x: torch.Tensor,
    row_weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alpha: float = 1.0,
    chunk: int = 1024,
) -> None:
    """Add alpha x^T diag(row_weights * mask) x, [d, d], to the lower triangle of `acc`.

    Rows that the mask or a zero weight leaves out do not count, even if they hold NaN. Products and the sums over a
    chunk of rows are in fp32 (fp64 for fp64 rows); chunks are added in the dtype of `acc`. On CUDA, where torch can
    multiply 16-bit matrices into an fp32 one, 16-bit rows without weights are not widened first.
    """
    if row_weights is not None:
        counting = row_weights != 0
        mask = counting if mask is None else mask & counting
    if mask is not None:
        x = x[mask]
        row_weights = None if row_weights is None else row_weights[mask]
    dtype = accumulation_dtype(x)
    if row_weights is None and has_wide_product(x):
        for begin in range(0, x.shape[0], chunk):
            rows = x[begin : begin + chunk]
            _add_lower_(acc, rows, rows, alpha, block=2048)
        return
    for begin in range(0, x.shape[0], chunk):
        rows = x[begin : begin + chunk].to(dtype)  # [chunk, d]
        weighted = rows if row_weights is None else rows * row_weights[begin : begin + chunk, None].to(dtype)
        _add_lower_(acc, weighted, rows, alpha)


def _add_lower_(acc: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float, block: int = 512) -> None:
    """Add alpha left^T right to the lower triangle, by blocks of rows: the strict upper triangle is not touched."""
    d = acc.shape[0]
    for i in range(0, d, block):
        end = min(i + block, d)
        product = _product(left[:, i:end], right[:, :end]).to(acc.dtype)  # [block, end]
        acc[i:end, :i].add_(product[:, :i], alpha=alpha)
        corner = acc[i:end, i:end]
        below = torch.ones(end - i, end - i, dtype=torch.bool, device=acc.device).tril()
        corner.copy_(torch.where(below, corner + alpha * product[:, i:], corner))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left^T right in fp32 (fp64 for fp64 rows)."""
    return wide_product(left.T, right, DEPTH) if left.dtype in HALVES else left.T @ right


def mirror_(acc: torch.Tensor, block: int = 512) -> None:
    """Copy the lower triangle of `acc` [d, d] to the upper one, by blocks, without a second matrix."""
    for i in range(0, acc.shape[0], block):
        end = min(i + block, acc.shape[0])
        acc[:i, i:end] = acc[i:end, :i].T
        corner = acc[i:end, i:end]
        corner.copy_(torch.tril(corner) + torch.tril(corner, -1).T)

"""weight += alpha left right^T, rounded once, and the rounded copy of an fp32 master in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import accumulate, narrow
from kedit_fast.kernels.triton.configs import RANK_K, Config
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, ceil_div, choose, run, size_class

MOST_FMA = 16  # k up to which fused multiply-adds keep up with memory


@triton.jit
def _rank_k_update_kernel(
    weight, left, right, copy, alpha, rows, columns, k, column_tiles,
    weight_row_stride, weight_column_stride, left_row_stride, left_k_stride, right_row_stride, right_k_stride,
    copy_row_stride, copy_column_stride,
    COPY: tl.constexpr, PRODUCTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    i = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)
    j = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    rows_in = i < rows
    columns_in = j < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if PRODUCTS == 0:
        of_left = left + i * left_row_stride
        of_right = right + j * right_row_stride
        for _ in range(k):
            a = tl.load(of_left, mask=rows_in, other=0.0).to(tl.float32)
            b = tl.load(of_right, mask=columns_in, other=0.0).to(tl.float32)
            total += (a * alpha)[:, None] * b[None, :]
            of_left += left_k_stride
            of_right += right_k_stride
    else:
        for first in range(0, k, DEPTH):
            p = (first + tl.arange(0, DEPTH)).to(tl.int64)
            inside = p < k
            a = tl.load(
                left + i[:, None] * left_row_stride + p[None, :] * left_k_stride,
                mask=rows_in[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(
                right + j[None, :] * right_row_stride + p[:, None] * right_k_stride,
                mask=inside[:, None] & columns_in[None, :], other=0.0,
            )  # fmt: skip
            _, total = accumulate(a.to(tl.float32) * alpha, b, total, total, 0, PRODUCTS, DEPTH, INTERPRET)
    inside = rows_in[:, None] & columns_in[None, :]
    target = weight + i[:, None] * weight_row_stride + j[None, :] * weight_column_stride
    value = tl.load(target, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(target, narrow(value, weight.dtype.element_ty, INTERPRET), mask=inside)
    if COPY:
        to = copy + i[:, None] * copy_row_stride + j[None, :] * copy_column_stride
        tl.store(to, narrow(value, copy.dtype.element_ty, INTERPRET), mask=inside)


def launches(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    alpha: float,
    copy: torch.Tensor | None,
    config: Config,
) -> list[Launch]:
    """The launch that adds alpha left right^T to `weight`."""
    if weight.stride(1) > weight.stride(0):  # a transposed weight: update its transpose
        weight, left, right, copy = weight.T, right, left, None if copy is None else copy.T
    rows, columns = weight.shape
    k = left.shape[1]
    column_tiles = ceil_div(columns, config.n)
    fma = k <= MOST_FMA
    target = weight if copy is None else copy
    arguments = {
        "weight": weight, "left": left, "right": right, "copy": target, "alpha": alpha, "rows": rows,
        "columns": columns, "k": k, "column_tiles": column_tiles, "weight_row_stride": weight.stride(0),
        "weight_column_stride": weight.stride(1), "left_row_stride": left.stride(0), "left_k_stride": left.stride(1),
        "right_row_stride": right.stride(0), "right_k_stride": right.stride(1), "copy_row_stride": target.stride(0),
        "copy_column_stride": target.stride(1),
    }  # fmt: skip
    constants = {
        "COPY": copy is not None, "PRODUCTS": 0 if fma else 3 if right.dtype == torch.bfloat16 else 6,
        "ROWS": config.m, "COLUMNS": config.n, "DEPTH": config.k, "INTERPRET": INTERPRET,
    }  # fmt: skip
    grid = (ceil_div(rows, config.m) * column_tiles,)
    return [Launch(_rank_k_update_kernel, grid, arguments, constants, config)]


def rank_k_update_(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float, copy: torch.Tensor | None
) -> None:
    """Run the op of the same name; see kedit_fast/ops/rank_k_update.py."""
    if weight.numel() == 0:
        return

    def trial(config: Config) -> list[Launch]:
        scratch = torch.empty_like(weight)
        return launches(scratch, left, right, alpha, None if copy is None else torch.empty_like(copy), config)

    kind = "fma" if left.shape[1] <= MOST_FMA else "dot"
    size = f"{weight.dtype}, {size_class(weight.numel())}, k {size_class(left.shape[1])}"
    config = choose(RANK_K, kind, weight.device, trial, size)
    run(launches(weight, left, right, alpha, copy, config), weight.device)

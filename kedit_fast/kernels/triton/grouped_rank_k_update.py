"""weight[e] += alpha left[:, columns_e] right_e for a stack, rounded once, and the rounded copy in the same pass.

Offsets and columns are read on the GPU: the host does not wait for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import accumulate, narrow
from kedit_fast.kernels.triton.configs import RANK_K, Config
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, ceil_div, choose, run, size_class
from kedit_fast.kernels.triton.rank_k_update import MOST_FMA


@triton.jit
def _grouped_rank_k_update_kernel(
    weight, left, right, columns, offsets, copy, alpha, rows, inner, total_k, width, column_tiles,
    weight_group_stride, weight_row_stride, weight_column_stride, left_row_stride, left_k_stride,
    right_row_stride, right_k_stride, copy_group_stride, copy_row_stride, copy_column_stride,
    COPY: tl.constexpr, LEFT_ORDERED: tl.constexpr, PRODUCTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    begin = tl.maximum(tl.load(offsets + group), 0)
    end = tl.minimum(tl.load(offsets + group + 1), total_k)
    i = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)
    j = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    rows_in = i < rows
    columns_in = j < inner
    if (begin < end) | COPY:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        if PRODUCTS == 0:
            for p in range(begin, end):
                column = tl.load(columns + p)
                known = (column >= 0) & (column < width)
                at_left = column if LEFT_ORDERED else p
                at_right = p if LEFT_ORDERED else column
                a = tl.load(left + i * left_row_stride + at_left * left_k_stride, mask=rows_in & known, other=0.0)
                b = tl.load(
                    right + j * right_row_stride + at_right * right_k_stride, mask=columns_in & known, other=0.0
                )
                a = tl.where(known, a.to(tl.float32) * alpha, float("nan"))
                total += a[:, None] * b.to(tl.float32)[None, :]
        else:
            for first in range(begin, end, DEPTH):
                p = first + tl.arange(0, DEPTH)
                inside = p < end
                column = tl.load(columns + p, mask=inside, other=0)
                known = inside & (column >= 0) & (column < width)
                at_left = column if LEFT_ORDERED else p
                at_right = p if LEFT_ORDERED else column
                a = tl.load(
                    left + i[:, None] * left_row_stride + at_left[None, :] * left_k_stride,
                    mask=rows_in[:, None] & known[None, :], other=0.0,
                )  # fmt: skip
                b = tl.load(
                    right + j[None, :] * right_row_stride + at_right[:, None] * right_k_stride,
                    mask=known[:, None] & columns_in[None, :], other=0.0,
                )  # fmt: skip
                a = tl.where((inside & (known == 0))[None, :], float("nan"), a.to(tl.float32) * alpha)
                _, total = accumulate(a, b, total, total, 0, PRODUCTS, DEPTH, INTERPRET)
        in_tile = rows_in[:, None] & columns_in[None, :]
        target = weight + group * weight_group_stride + i[:, None] * weight_row_stride
        target += j[None, :] * weight_column_stride
        before = tl.load(target, mask=in_tile, other=0.0).to(tl.float32)
        value = tl.where(begin < end, before + total, before)  # -0 stays -0 where nothing is added
        tl.store(target, narrow(value, weight.dtype.element_ty, INTERPRET), mask=in_tile)
        if COPY:
            to = copy + group * copy_group_stride + i[:, None] * copy_row_stride + j[None, :] * copy_column_stride
            tl.store(to, narrow(value, copy.dtype.element_ty, INTERPRET), mask=in_tile)


def shape_class(right: torch.Tensor, groups: int) -> str:
    """'grouped_fma' where groups have few rows on average, else 'dot'."""
    return "grouped_fma" if right.shape[0] <= MOST_FMA * groups else "dot"


def launches(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    alpha: float,
    copy: torch.Tensor | None,
    config: Config,
) -> list[Launch]:
    """The launch that adds alpha left[:, columns_e] right_e to every `weight[e]`."""
    kind, width, total_k = shape_class(right, weight.shape[0]), left.shape[1], right.shape[0]
    a, b, ordered = left, right.T, True
    if weight.stride(2) > weight.stride(1):  # transposed matrices: update their transposes
        weight, copy = weight.mT, None if copy is None else copy.mT
        a, b, ordered = b, a, False
    groups, rows, inner = weight.shape
    column_tiles = ceil_div(inner, config.n)
    target = weight if copy is None else copy
    arguments = {
        "weight": weight, "left": a, "right": b, "columns": columns, "offsets": offsets, "copy": target, "alpha": alpha,
        "rows": rows, "inner": inner, "total_k": total_k, "width": width, "column_tiles": column_tiles,
        "weight_group_stride": weight.stride(0), "weight_row_stride": weight.stride(1),
        "weight_column_stride": weight.stride(2), "left_row_stride": a.stride(0), "left_k_stride": a.stride(1),
        "right_row_stride": b.stride(0), "right_k_stride": b.stride(1), "copy_group_stride": target.stride(0),
        "copy_row_stride": target.stride(1), "copy_column_stride": target.stride(2),
    }  # fmt: skip
    constants = {
        "COPY": copy is not None, "LEFT_ORDERED": ordered,
        "PRODUCTS": 0 if kind == "grouped_fma" else 3 if b.dtype == torch.bfloat16 else 6,
        "ROWS": config.m, "COLUMNS": config.n, "DEPTH": config.k, "INTERPRET": INTERPRET,
    }  # fmt: skip
    grid = (ceil_div(rows, config.m) * column_tiles, groups)
    return [Launch(_grouped_rank_k_update_kernel, grid, arguments, constants, config)]


def grouped_rank_k_update_(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    columns: torch.Tensor,
    offsets: torch.Tensor,
    alpha: float,
    copy: torch.Tensor | None,
) -> None:
    """Run the op of the same name; see kedit_fast/ops/grouped_rank_k_update.py."""
    if weight.numel() == 0:
        return
    order = columns.contiguous(), offsets.contiguous()

    def trial(config: Config) -> list[Launch]:
        scratch = torch.empty_like(weight)
        return launches(scratch, left, right, *order, alpha, None if copy is None else torch.empty_like(copy), config)

    size = f"{weight.dtype}, {weight.shape[0]} groups, {size_class(weight.numel())}, rows {size_class(right.shape[0])}"
    config = choose(RANK_K, shape_class(right, weight.shape[0]), weight.device, trial, size)
    run(launches(weight, left, right, *order, alpha, copy, config), weight.device)

"""acc's lower triangle += alpha x^T diag(w) x: only lower tiles, in an order that shares x in the L2 cache.

Where the tiles do not fill the device, the rows of x are split over several programs, and a second kernel adds their
sums in a fixed order, so the result has the same bits at every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import accumulate
from kedit_fast.kernels.triton.configs import SYMMETRIC, Config
from kedit_fast.kernels.triton.launch import (
    INTERPRET,
    Launch,
    ceil_div,
    choose,
    loads_wide,
    processors,
    run,
    size_class,
)

SUMMED_ROWS = 8192  # rows that are summed in fp32 before their sum is added to acc
WAVES = 2  # programs per multiprocessor that splitting aims at
STRIP = 16  # rows of a tile that one program of the second kernel adds


@triton.jit
def _triangle_row(index):
    """The largest r with r (r + 1) / 2 <= index."""
    r = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    r = tl.where(r * (r + 1) // 2 > index, r - 1, r)  # the square root is rounded
    return tl.where((r + 1) * (r + 2) // 2 <= index, r + 1, r)


@triton.jit
def _lower_tile(index, tiles, GROUP: tl.constexpr):
    """Row and column of the index-th lower tile: by bands of GROUP rows, and column by column within a band."""
    band = _triangle_row(index) // GROUP
    first = band * GROUP
    local = index - first * (first + 1) // 2
    rows = tl.minimum(tiles - first, GROUP)
    inside = local - first * rows  # index in the triangle at the end of the band, when not negative
    i = _triangle_row(tl.maximum(inside, 0))
    full = inside < 0
    row = tl.where(full, first + local % rows, first + i)
    column = tl.where(full, local // rows, first + inside - i * (i + 1) // 2)
    return row, column


@triton.jit
def sum_rows(
    x, row_weights, mask, i, j, begin, end, d, x_row_stride, x_column_stride, weight_stride, mask_stride,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr, PRODUCTS: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """[SIDE, SIDE] in fp32: the sum over rows [begin, end) of columns i of x, weighted, times columns j."""
    depth = tl.arange(0, DEPTH)
    left_columns = x + i.to(tl.int64)[:, None] * x_column_stride
    right_columns = x + j.to(tl.int64)[None, :] * x_column_stride
    total = tl.zeros((SIDE, SIDE), tl.float32)
    part = tl.zeros((SIDE, SIDE), tl.float32)
    for first in range(begin, end, DEPTH):
        row = first + depth
        counts = row < end
        offset = row.to(tl.int64) * x_row_stride
        if MASKED:
            counts = counts & (tl.load(mask + row.to(tl.int64) * mask_stride, mask=counts, other=0) != 0)
        if WEIGHTED:
            weight = tl.load(row_weights + row.to(tl.int64) * weight_stride, mask=counts, other=0.0).to(tl.float32)
            counts = counts & (weight != 0)
        left = tl.load(left_columns + offset[None, :], mask=(i < d)[:, None] & counts[None, :], other=0.0)
        right = tl.load(right_columns + offset[:, None], mask=counts[:, None] & (j < d)[None, :], other=0.0)
        if WEIGHTED:
            left = left.to(tl.float32) * weight[None, :]  # 0 where a row does not count, even beside NaN
        step = (first - begin) // DEPTH
        part, total = accumulate(left, right, part, total, step, PRODUCTS, DEPTH, INTERPRET)
    return total + part


@triton.jit
def _symmetric_rank_k_update_kernel(
    acc, x, row_weights, mask, parts, alpha_high, alpha_low, rows, d, tiles, rows_per_split,
    acc_stride, x_row_stride, x_column_stride, weight_stride, mask_stride,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr, SPLIT: tl.constexpr, PRODUCTS: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # The type of a jit function is that of a call from Python, which never returns.
    tile_row, tile_column = _lower_tile(tl.program_id(0), tiles, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    split = tl.program_id(1)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, rows)
    i = tile_row * SIDE + tl.arange(0, SIDE)
    j = tile_column * SIDE + tl.arange(0, SIDE)
    total = sum_rows(
        x, row_weights, mask, i, j, begin, end, d, x_row_stride, x_column_stride, weight_stride, mask_stride,
        WEIGHTED, MASKED, PRODUCTS, SIDE, DEPTH, INTERPRET,
    )  # fmt: skip
    if SPLIT:
        within = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
        at = (split.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (SIDE * SIDE)
        tl.store(parts + at + within, total)
    else:
        target = acc + i.to(tl.int64)[:, None] * acc_stride + j[None, :]
        lower = (i[:, None] >= j[None, :]) & (i < d)[:, None]
        summed = total.to(acc.dtype.element_ty)
        scaled = alpha_high * summed + alpha_low * summed
        tl.store(target, tl.load(target, mask=lower, other=0.0) + scaled, mask=lower)


@triton.jit
def _add_parts_kernel(
    acc, parts, alpha_high, alpha_low, d, tiles, splits, acc_stride,
    SIDE: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # The type of a jit function is that of a call from Python, which never returns.
    tile_row, tile_column = _lower_tile(tl.program_id(0), tiles, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    within = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    i = tile_row * SIDE + within
    j = tile_column * SIDE + tl.arange(0, SIDE)
    offset = within[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    total = tl.zeros((STRIP, SIDE), acc.dtype.element_ty)
    for split in range(splits):
        at = (split * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (SIDE * SIDE)
        total += tl.load(parts + at + offset).to(acc.dtype.element_ty)
    target = acc + i.to(tl.int64)[:, None] * acc_stride + j[None, :]
    lower = (i[:, None] >= j[None, :]) & (i < d)[:, None]
    scaled = alpha_high * total + alpha_low * total
    tl.store(target, tl.load(target, mask=lower, other=0.0) + scaled, mask=lower)


def shape_class(acc: torch.Tensor, x: torch.Tensor, row_weights: torch.Tensor | None) -> str:
    """'native' or 'native64' (by acc) when the rows go to the matrix unit as they are, else 'split'.

    'narrow' and 'split_narrow' are the same where loads are not wide.
    """
    wide = loads_wide(x)
    if x.dtype == torch.float32 or row_weights is not None:
        return "split" if wide else "split_narrow"
    if not wide:
        return "narrow"
    return "native" if acc.dtype == torch.float32 else "native64"


def launches(
    acc: torch.Tensor,
    x: torch.Tensor,
    row_weights: torch.Tensor | None,
    mask: torch.Tensor | None,
    alpha: float,
    config: Config,
) -> list[Launch]:
    """The launches that add alpha x^T diag(w) x to `acc`."""
    rows, d = x.shape
    tiles = ceil_div(d, config.m)
    lower_tiles = tiles * (tiles + 1) // 2
    split = x.dtype == torch.float32 or row_weights is not None
    products = 1 if not split else 3 if x.dtype == torch.bfloat16 else 6
    wanted = ceil_div(WAVES * processors(acc.device), lower_tiles)
    splits = max(1, min(wanted, ceil_div(min(rows, SUMMED_ROWS), 4 * config.k)))
    # Numbers reach a kernel in fp32; two of them hold an fp64 one.
    high = float(torch.tensor(alpha, dtype=torch.float32, device="cpu"))
    scale = {"alpha_high": high, "alpha_low": alpha - high}
    parts = x.new_empty(splits * lower_tiles * config.m**2 if splits > 1 else 0, dtype=torch.float32)
    tile = {"SIDE": config.m, "GROUP": config.group}
    sequence = []
    for begin in range(0, rows, splits * SUMMED_ROWS):
        slab = x[begin : begin + splits * SUMMED_ROWS]
        weights = None if row_weights is None else row_weights[begin : begin + slab.shape[0]]
        flags = None if mask is None else mask[begin : begin + slab.shape[0]].view(torch.uint8)
        each = ceil_div(ceil_div(slab.shape[0], splits), config.k) * config.k
        arguments = {
            "acc": acc, "x": slab, "row_weights": slab if weights is None else weights,
            "mask": slab if flags is None else flags, "parts": parts, **scale, "rows": slab.shape[0], "d": d,
            "tiles": tiles, "rows_per_split": each, "acc_stride": acc.stride(0), "x_row_stride": slab.stride(0),
            "x_column_stride": slab.stride(1), "weight_stride": 0 if weights is None else weights.stride(0),
            "mask_stride": 0 if flags is None else flags.stride(0),
        }  # fmt: skip
        constants = {
            "WEIGHTED": weights is not None, "MASKED": flags is not None, "SPLIT": splits > 1, "PRODUCTS": products,
            "DEPTH": config.k, "INTERPRET": INTERPRET, **tile,
        }  # fmt: skip
        sequence.append(Launch(_symmetric_rank_k_update_kernel, (lower_tiles, splits), arguments, constants, config))
        if splits > 1:
            reduce = {
                "acc": acc, "parts": parts, **scale, "d": d, "tiles": tiles, "splits": splits,
                "acc_stride": acc.stride(0),
            }  # fmt: skip
            strips = config.m // STRIP
            sequence.append(Launch(_add_parts_kernel, (lower_tiles, strips), reduce, {"STRIP": STRIP, **tile}, config))
    return sequence


def symmetric_rank_k_update_(
    acc: torch.Tensor, x: torch.Tensor, row_weights: torch.Tensor | None, mask: torch.Tensor | None, alpha: float
) -> None:
    """Run the op of the same name; see kedit_fast/ops/symmetric_rank_k_update.py."""
    if x.numel() == 0:
        return

    def trial(config: Config) -> list[Launch]:
        return launches(torch.zeros_like(acc), x, row_weights, mask, alpha, config)

    size = f"{x.dtype}, d {size_class(x.shape[1])}, rows {size_class(x.shape[0])}"
    config = choose(SYMMETRIC, shape_class(acc, x, row_weights), acc.device, trial, size)
    run(launches(acc, x, row_weights, mask, alpha, config), acc.device)

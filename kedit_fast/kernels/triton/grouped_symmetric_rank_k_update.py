"""acc[e]'s lower triangle += alpha x_e^T diag(w_e) x_e: a program for each lower tile of each group.

Rows of a group are summed by one program, in order, so the result has the same bits at every run. The offsets are read
on the GPU: the host does not wait for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.configs import SYMMETRIC, Config
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, ceil_div, choose, run, size_class
from kedit_fast.kernels.triton.symmetric_rank_k_update import SUMMED_ROWS, _lower_tile, sum_rows


@triton.jit
def _grouped_symmetric_rank_k_update_kernel(
    acc, x, offsets, row_weights, alpha_high, alpha_low, first, rows, d, tiles,
    acc_group_stride, acc_stride, x_row_stride, x_column_stride, weight_stride,
    WEIGHTED: tl.constexpr, PRODUCTS: tl.constexpr, SUMMED: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    # The type of a jit function is that of a call from Python, which never returns.
    tile_row, tile_column = _lower_tile(tl.program_id(0), tiles, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    group = tl.program_id(1).to(tl.int64)
    begin = tl.maximum(tl.load(offsets + group), 0)
    end = tl.minimum(tl.load(offsets + group + 1), rows)
    begin += first  # of the rows that this launch sums
    count = tl.maximum(tl.minimum(end - begin, SUMMED), 0).to(tl.int32)
    i = tile_row * SIDE + tl.arange(0, SIDE)
    j = tile_column * SIDE + tl.arange(0, SIDE)
    total = sum_rows(
        x + begin * x_row_stride, row_weights + begin * weight_stride, x, i, j, 0, count, d, x_row_stride,
        x_column_stride, weight_stride, 0, WEIGHTED, False, PRODUCTS, SIDE, DEPTH, INTERPRET,
    )  # fmt: skip
    target = acc + group * acc_group_stride + i.to(tl.int64)[:, None] * acc_stride + j[None, :]
    lower = (i[:, None] >= j[None, :]) & (i < d)[:, None] & (count > 0)
    summed = total.to(acc.dtype.element_ty)
    scaled = alpha_high * summed + alpha_low * summed
    tl.store(target, tl.load(target, mask=lower, other=0.0) + scaled, mask=lower)


def shape_class(x: torch.Tensor, row_weights: torch.Tensor | None) -> str:
    """'grouped_native' when the rows go to the matrix unit as they are, else 'grouped_split'."""
    return "grouped_split" if x.dtype == torch.float32 or row_weights is not None else "grouped_native"


def launches(
    acc: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    row_weights: torch.Tensor | None,
    alpha: float,
    config: Config,
) -> list[Launch]:
    """The launches that add alpha x_e^T diag(w_e) x_e to every `acc[e]`, SUMMED_ROWS rows of every group at a time.

    A group may hold all rows, which the host does not know: where groups have fewer, the later launches find nothing.
    """
    groups, d, _ = acc.shape
    tiles = ceil_div(d, config.m)
    split = shape_class(x, row_weights) == "grouped_split"
    # Numbers reach a kernel in fp32; two of them hold an fp64 one.
    high = float(torch.tensor(alpha, dtype=torch.float32, device="cpu"))
    arguments = {
        "acc": acc, "x": x, "offsets": offsets, "row_weights": x if row_weights is None else row_weights,
        "alpha_high": high, "alpha_low": alpha - high, "rows": x.shape[0], "d": d, "tiles": tiles,
        "acc_group_stride": acc.stride(0), "acc_stride": acc.stride(1), "x_row_stride": x.stride(0),
        "x_column_stride": x.stride(1), "weight_stride": 0 if row_weights is None else row_weights.stride(0),
    }  # fmt: skip
    constants = {
        "WEIGHTED": row_weights is not None, "PRODUCTS": 1 if not split else 3 if x.dtype == torch.bfloat16 else 6,
        "SUMMED": SUMMED_ROWS, "SIDE": config.m, "DEPTH": config.k, "GROUP": config.group, "INTERPRET": INTERPRET,
    }  # fmt: skip
    grid = (tiles * (tiles + 1) // 2, groups)
    return [
        Launch(_grouped_symmetric_rank_k_update_kernel, grid, {**arguments, "first": first}, constants, config)
        for first in range(0, x.shape[0], SUMMED_ROWS)
    ]


def grouped_symmetric_rank_k_update_(
    acc: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, row_weights: torch.Tensor | None, alpha: float
) -> None:
    """Run the op of the same name; see kedit_fast/ops/grouped_symmetric_rank_k_update.py."""
    if x.numel() == 0 or acc.numel() == 0:
        return
    offsets = offsets.contiguous()

    def trial(config: Config) -> list[Launch]:
        return launches(torch.zeros_like(acc), x, offsets, row_weights, alpha, config)

    size = f"{x.dtype}, {acc.shape[0]} groups, d {size_class(x.shape[1])}, rows {size_class(x.shape[0])}"
    config = choose(SYMMETRIC, shape_class(x, row_weights), acc.device, trial, size)
    run(launches(acc, x, offsets, row_weights, alpha, config), acc.device)

"""Rows of tokens through matrices beside a layer: how far a memory moves them, and the one that each is routed to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import accumulate, narrow, tanh
from kedit_fast.kernels.triton.configs import ROW_PRODUCTS, Config
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, ceil_div, choose, run, size_class

ACTIVATIONS = ("identity", "relu", "silu", "gelu", "gelu_tanh")


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 2:
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == 3:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 4:
        x = 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return x


@triton.jit
def _multiply(
    x, rows, rows_in, matrix, j, columns_in, d, x_row_stride, x_column_stride, matrix_row_stride, matrix_column_stride,
    PRODUCTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Rows of x times rows j of a matrix [h, d], in fp32."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    part = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, d, DEPTH):
        p = (first + tl.arange(0, DEPTH)).to(tl.int64)
        deep = p < d
        a = tl.load(
            x + rows[:, None] * x_row_stride + p[None, :] * x_column_stride, mask=rows_in[:, None] & deep[None, :],
            other=0.0,
        )  # fmt: skip
        b = tl.load(
            matrix + j[None, :] * matrix_row_stride + p[:, None] * matrix_column_stride,
            mask=deep[:, None] & columns_in[None, :], other=0.0,
        )  # fmt: skip
        part, total = accumulate(a, b, part, total, first // DEPTH, PRODUCTS, DEPTH, INTERPRET)
    return total + part


@triton.jit
def _distance_kernel(
    x, reference, weights, bias, partial, n, h, d, row_tiles, column_tiles,
    x_row_stride, x_column_stride, reference_row_stride, reference_column_stride,
    memory_stride, weights_row_stride, weights_column_stride, bias_stride,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    memory = tile // (row_tiles * column_tiles)
    column_tile = tile // row_tiles % column_tiles
    i = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    j = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    rows_in = i < n
    columns_in = j < h
    now = _multiply(
        x, i, rows_in, weights + memory * memory_stride, j, columns_in, d, x_row_stride, x_column_stride,
        weights_row_stride, weights_column_stride, PRODUCTS, ROWS, COLUMNS, DEPTH, INTERPRET,
    )  # fmt: skip
    if BIAS:
        now += tl.load(bias + j * bias_stride, mask=columns_in, other=0.0).to(tl.float32)[None, :]
    inside = rows_in[:, None] & columns_in[None, :]
    before = tl.load(
        reference + i[:, None] * reference_row_stride + j[None, :] * reference_column_stride, mask=inside, other=0.0
    ).to(tl.float32)  # fmt: skip
    gap = tl.where(inside, _activate(now, ACTIVATION) - _activate(before, ACTIVATION), 0.0)
    tl.store(partial + (memory * column_tiles + column_tile) * n + i, tl.sum(gap * gap, 1), mask=rows_in)


@triton.jit
def _routed_kernel(
    x, weight, memories, route, order, output, bias, out, n, h, d, count, column_tiles,
    x_row_stride, x_column_stride, weight_row_stride, weight_column_stride,
    memory_stride, memories_row_stride, memories_column_stride, output_row_stride, output_column_stride, bias_stride,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, PRODUCTS: tl.constexpr, WEIGHT_PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    at = tile // column_tiles * ROWS + tl.arange(0, ROWS)
    j = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    rows_in = at < n
    columns_in = j < h
    rows = tl.load(order + at, mask=rows_in, other=0)
    to = tl.load(route + rows, mask=rows_in, other=-2)
    first = tl.maximum(tl.min(tl.where(rows_in, to, count), 0), 0)
    last = tl.minimum(tl.max(to, 0), count - 1)
    total = tl.full((ROWS, COLUMNS), float("nan"), tl.float32)  # what a route out of range leaves
    for memory in range(first, last + 1):
        mine = rows_in & (to == memory)
        if tl.sum(mine.to(tl.int32), 0) > 0:
            product = _multiply(
                x, rows, mine, memories + memory * memory_stride, j, columns_in, d,
                x_row_stride, x_column_stride, memories_row_stride, memories_column_stride,
                PRODUCTS, ROWS, COLUMNS, DEPTH, INTERPRET,
            )  # fmt: skip
            total = tl.where(mine[:, None], product, total)
    beside = rows_in & (to == -1)
    if WEIGHT:  # noqa: SIM102 - the outer one is decided when the kernel is compiled
        if tl.sum(beside.to(tl.int32), 0) > 0:
            product = _multiply(
                x, rows, beside, weight, j, columns_in, d, x_row_stride, x_column_stride, weight_row_stride,
                weight_column_stride, WEIGHT_PRODUCTS, ROWS, COLUMNS, DEPTH, INTERPRET,
            )  # fmt: skip
            total = tl.where(beside[:, None], product, total)
    if BIAS:
        total += tl.load(bias + j * bias_stride, mask=columns_in, other=0.0).to(tl.float32)[None, :]
    if not WEIGHT:
        beside_rows = tl.load(
            output + rows[:, None] * output_row_stride + j[None, :] * output_column_stride,
            mask=beside[:, None] & columns_in[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        total = tl.where(beside[:, None], beside_rows, total)
    tl.store(
        out + rows[:, None] * h + j[None, :], narrow(total, out.dtype.element_ty, INTERPRET),
        mask=rows_in[:, None] & columns_in[None, :],
    )  # fmt: skip


def _products(x: torch.Tensor, matrix: torch.Tensor) -> int:
    if x.dtype == matrix.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return 1
    return 3 if matrix.dtype == torch.bfloat16 else 6


def shape_class(x: torch.Tensor, matrix: torch.Tensor) -> str:
    """The rows of the configurations' table: "native" for 16-bit operands of one dtype, else "split"."""
    return "native" if _products(x, matrix) == 1 else "split"


def distance_launches(
    x: torch.Tensor,
    reference: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    bias: torch.Tensor | None,
    config: Config,
) -> tuple[list[Launch], torch.Tensor]:
    """The launch that sums squared differences, and where it puts them: [M, tiles of h, N] float32."""
    (n, d), (memories, h, _) = x.shape, weights.shape
    row_tiles, column_tiles = ceil_div(n, config.m), ceil_div(h, config.n)
    partial = torch.empty(memories, column_tiles, n, dtype=torch.float32, device=x.device)
    arguments = {
        "x": x, "reference": reference, "weights": weights, "bias": x if bias is None else bias, "partial": partial,
        "n": n, "h": h, "d": d, "row_tiles": row_tiles, "column_tiles": column_tiles,
        "x_row_stride": x.stride(0), "x_column_stride": x.stride(1), "reference_row_stride": reference.stride(0),
        "reference_column_stride": reference.stride(1), "memory_stride": weights.stride(0),
        "weights_row_stride": weights.stride(1), "weights_column_stride": weights.stride(2),
        "bias_stride": 0 if bias is None else bias.stride(0),
    }  # fmt: skip
    constants = {
        "ACTIVATION": ACTIVATIONS.index(activation), "BIAS": bias is not None, "PRODUCTS": _products(x, weights),
        "ROWS": config.m, "COLUMNS": config.n, "DEPTH": config.k, "INTERPRET": INTERPRET,
    }  # fmt: skip
    grid = (memories * row_tiles * column_tiles,)
    return [Launch(_distance_kernel, grid, arguments, constants, config)], partial


def token_distances(
    x: torch.Tensor, reference: torch.Tensor, weights: torch.Tensor, activation: str, bias: torch.Tensor | None
) -> torch.Tensor:
    """Distances [M, N] float32 of every token; see kedit_fast/ops/activation_distance.py."""
    memories, rows = weights.shape[0], x.shape[0]
    if not memories or not rows:
        return torch.zeros(memories, rows, device=x.device)

    def plan(config: Config) -> tuple[list[Launch], torch.Tensor]:
        return distance_launches(x, reference, weights, activation, bias, config)

    size = f"distance, {x.dtype}, N {size_class(rows)}, {size_class(weights[0].numel())}"
    config = choose(ROW_PRODUCTS, shape_class(x, weights), x.device, lambda config: plan(config)[0], size)
    planned, partial = plan(config)
    run(planned, x.device)
    return partial.sum(1).sqrt()


def routed_launches(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    memories: torch.Tensor,
    route: torch.Tensor,
    order: torch.Tensor,
    output: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Config,
) -> list[Launch]:
    """The launch that fills `out` [N, h]; `order` [N] lists the rows by their routes."""
    (n, d), (count, h, _) = x.shape, memories.shape
    column_tiles = ceil_div(h, config.n)
    first, beside = memories if weight is None else weight, out if output is None else output
    arguments = {
        "x": x, "weight": first, "memories": memories, "route": route, "order": order, "output": beside,
        "bias": x if bias is None else bias, "out": out, "n": n, "h": h, "d": d, "count": count,
        "column_tiles": column_tiles, "x_row_stride": x.stride(0), "x_column_stride": x.stride(1),
        "weight_row_stride": first.stride(-2), "weight_column_stride": first.stride(-1),
        "memory_stride": memories.stride(0), "memories_row_stride": memories.stride(1),
        "memories_column_stride": memories.stride(2), "output_row_stride": beside.stride(0),
        "output_column_stride": beside.stride(1), "bias_stride": 0 if bias is None else bias.stride(0),
    }  # fmt: skip
    constants = {
        "WEIGHT": weight is not None, "BIAS": bias is not None, "PRODUCTS": _products(x, memories),
        "WEIGHT_PRODUCTS": _products(x, first), "ROWS": config.m, "COLUMNS": config.n, "DEPTH": config.k,
        "INTERPRET": INTERPRET,
    }  # fmt: skip
    return [Launch(_routed_kernel, (ceil_div(n, config.m) * column_tiles,), arguments, constants, config)]


def routed_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    memories: torch.Tensor,
    route: torch.Tensor,
    output: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Run the op of the same name; see kedit_fast/ops/routed_linear.py."""
    out = torch.empty(x.shape[0], memories.shape[1], dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    order = route.argsort(stable=True)

    def plan(config: Config) -> list[Launch]:
        return routed_launches(x, weight, memories, route, order, output, bias, out, config)

    matrix = memories if weight is None or shape_class(x, memories) == "split" else weight
    size = f"routed, {x.dtype}, N {size_class(x.shape[0])}, {size_class(memories[:1].numel())}"
    config = choose(ROW_PRODUCTS, f"routed_{shape_class(x, matrix)}", x.device, plan, size)
    run(plan(config), x.device)
    return out

"""One step of descent or of Adam on chosen entries of a matrix, from a gradient or its factors, within a box."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import accumulate, narrow
from kedit_fast.kernels.triton.configs import STEP, Config
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, ceil_div, choose, run, size_class


@triton.jit
def _masked_step_kernel(
    weight, mean, square, grad, left, right, entries, origin, copy, active, corrected, finite,
    lr, decay, bound, beta1, beta2, eps, rows, columns, k, column_tiles, bit_row, bit_column,
    weight_row_stride, weight_column_stride, mean_row_stride, mean_column_stride,
    square_row_stride, square_column_stride, grad_row_stride, grad_column_stride,
    left_row_stride, left_k_stride, right_row_stride, right_k_stride,
    origin_row_stride, origin_column_stride, copy_row_stride, copy_column_stride,
    ADAM: tl.constexpr, PRODUCTS: tl.constexpr, MASKED: tl.constexpr, DECAYS: tl.constexpr, DECAY_ALL: tl.constexpr,
    BOXED: tl.constexpr, COPY: tl.constexpr, PREDICATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    i = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)
    j = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    if PRODUCTS == 0:
        slope = tl.load(
            grad + i[:, None] * grad_row_stride + j[None, :] * grad_column_stride, mask=inside, other=0.0
        ).to(tl.float32)  # fmt: skip
    else:
        slope = tl.zeros((ROWS, COLUMNS), tl.float32)
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, k, DEPTH):
            p = (first + tl.arange(0, DEPTH)).to(tl.int64)
            deep = p < k
            a = tl.load(
                left + i[:, None] * left_row_stride + p[None, :] * left_k_stride,
                mask=(i < rows)[:, None] & deep[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(
                right + j[None, :] * right_row_stride + p[:, None] * right_k_stride,
                mask=deep[:, None] & (j < columns)[None, :], other=0.0,
            )  # fmt: skip
            part, slope = accumulate(a, b, part, slope, first // DEPTH, PRODUCTS, DEPTH, INTERPRET)
        slope += part
    target = weight + i[:, None] * weight_row_stride + j[None, :] * weight_column_stride
    value = tl.load(target, mask=inside, other=0.0)
    chosen = inside
    if MASKED:
        entry = i[:, None] * bit_row + j[None, :] * bit_column
        byte = tl.load(entries + (entry >> 3), mask=inside, other=0)
        chosen = ((byte >> (entry & 7).to(tl.uint8)) & 1) != 0
    on = True
    if PREDICATED:
        on = tl.load(active) != 0
    if ADAM:
        if MASKED:
            slope = tl.where(chosen, slope, 0.0)
        step = tl.load(corrected)
        root = tl.load(corrected + 1)
        to_mean = mean + i[:, None] * mean_row_stride + j[None, :] * mean_column_stride
        to_square = square + i[:, None] * square_row_stride + j[None, :] * square_column_stride
        m = beta1 * tl.load(to_mean, mask=inside, other=0.0) + (1 - beta1) * slope
        v = beta2 * tl.load(to_square, mask=inside, other=0.0) + (1 - beta2) * slope * slope
        if PREDICATED:
            tl.store(to_mean, m, mask=inside & on)
            tl.store(to_square, v, mask=inside & on)
        else:
            tl.store(to_mean, m, mask=inside)
            tl.store(to_square, v, mask=inside)
        moved = value - step * m / (tl.sqrt_rn(v) * root + eps)
        if PREDICATED:
            moved = tl.where(on, moved, value)
    else:
        shrunk = decay * value
        if DECAYS:
            slope += shrunk
        if MASKED:
            if DECAYS and DECAY_ALL:
                slope = tl.where(chosen, slope, shrunk)
            else:
                slope = tl.where(chosen, slope, 0.0)
        moved = value - lr * slope
    zeros = tl.where(inside, moved * 0.0, 0.0)  # NaN where a number is not finite
    broken = tl.sum(tl.sum((zeros != zeros).to(tl.int32), 1), 0)
    tl.store(finite, 0, mask=broken > 0)
    if BOXED:
        center = tl.load(
            origin + i[:, None] * origin_row_stride + j[None, :] * origin_column_stride, mask=inside, other=0.0
        ).to(tl.float32)  # fmt: skip
        low = center - bound
        high = center + bound
        moved = tl.where(moved < low, low, moved)  # no comparison holds for a NaN
        moved = tl.where(moved > high, high, moved)
        moved = tl.where(center == center, moved, center)
    tl.store(target, moved, mask=inside)
    if COPY:
        to = copy + i[:, None] * copy_row_stride + j[None, :] * copy_column_stride
        tl.store(to, narrow(moved, copy.dtype.element_ty, INTERPRET), mask=inside)


def launches(
    weight: torch.Tensor,
    finite: torch.Tensor,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    origin: torch.Tensor | None,
    bound: float | None,
    copy: torch.Tensor | None,
    config: Config,
    *,
    lr: float = 0.0,
    decay: float = 0.0,
    decay_all: bool = False,
    adam: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float, float] | None = None,
    active: torch.Tensor | None = None,
) -> list[Launch]:
    """The launch that steps `weight` [h, d] float32; it sets `finite` [] uint8 to 0 where a number is not finite.

    `adam`: mean, square, [lr / (1 - beta1^count), 1 / sqrt(1 - beta2^count)] float32, beta1, beta2, eps.
    """
    mean, square, corrected, beta1, beta2, eps = adam or (weight, weight, weight, 0.0, 0.0, 0.0)
    bits = weight.shape[1], 1
    a, b = (weight, weight) if left is None or right is None else (left.T, right.T)  # [h, N] and [d, N]
    matrices = [
        weight, mean, square, weight if grad is None else grad, weight if origin is None else origin,
        weight if copy is None else copy,
    ]  # fmt: skip
    if weight.stride(1) > weight.stride(0):  # a transposed weight: step its transpose
        matrices = [matrix.T for matrix in matrices]
        a, b, bits = b, a, bits[::-1]
    names = ("weight", "mean", "square", "grad", "origin", "copy")
    tensors = dict(zip(names, matrices, strict=True))
    strides = {
        f"{name}_{axis}_stride": matrix.stride(at)
        for name, matrix in tensors.items()
        for at, axis in enumerate(("row", "column"))
    }
    rows, columns = tensors["weight"].shape
    column_tiles = ceil_div(columns, config.n)
    arguments = {
        **tensors, **strides, "left": a, "right": b, "entries": finite if entries is None else entries,
        "active": finite if active is None else active, "corrected": corrected, "finite": finite, "lr": lr,
        "decay": decay, "bound": bound or 0.0, "beta1": beta1, "beta2": beta2, "eps": eps, "rows": rows,
        "columns": columns, "k": 0 if left is None else a.shape[1], "column_tiles": column_tiles, "bit_row": bits[0],
        "bit_column": bits[1], "left_row_stride": a.stride(0), "left_k_stride": a.stride(1),
        "right_row_stride": b.stride(0), "right_k_stride": b.stride(1),
    }  # fmt: skip
    constants = {
        "ADAM": adam is not None, "PRODUCTS": 0 if left is None else products_of(a, b), "MASKED": entries is not None,
        "DECAYS": decay != 0, "DECAY_ALL": decay_all, "BOXED": bound is not None, "COPY": copy is not None,
        "PREDICATED": active is not None, "ROWS": config.m, "COLUMNS": config.n, "DEPTH": config.k,
        "INTERPRET": INTERPRET,
    }  # fmt: skip
    return [Launch(_masked_step_kernel, (ceil_div(rows, config.m) * column_tiles,), arguments, constants, config)]


def products_of(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many products of 16-bit parts make one of these matrices."""
    if a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return 1
    return 3 if b.dtype == torch.bfloat16 else 6


def shape_class(left: torch.Tensor | None) -> str:
    """The rows of the configurations' table for a step from factors, or from a gradient."""
    return "rows" if left is None else "dot"


def masked_descent_(
    weight: torch.Tensor,
    lr: float,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    decay: float,
    decay_all: bool,
    origin: torch.Tensor | None,
    bound: float | None,
    copy: torch.Tensor | None,
) -> torch.Tensor:
    """Run the op of the same name; see kedit_fast/ops/masked_descent.py."""
    finite = torch.ones((), dtype=torch.uint8, device=weight.device)
    if weight.numel() == 0:
        return finite.bool()

    def plan(config: Config, target: torch.Tensor, half: torch.Tensor | None) -> list[Launch]:
        step = (grad, left, right, entries, origin, bound, half, config)
        return launches(target, finite, *step, lr=lr, decay=decay, decay_all=decay_all)

    def trial(config: Config) -> list[Launch]:
        return plan(config, weight.clone(), None if copy is None else copy.clone())

    config = choose(STEP, shape_class(left), weight.device, trial, _size(weight, left))
    run(plan(config, weight, copy), weight.device)
    return finite.bool()


def masked_adam_(
    weight: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    count: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    entries: torch.Tensor | None,
    origin: torch.Tensor | None,
    bound: float | None,
    active: torch.Tensor | None,
    copy: torch.Tensor | None,
) -> torch.Tensor:
    """Run the op of the same name; see kedit_fast/ops/masked_adam.py. The device alone counts the steps."""
    finite = torch.ones((), dtype=torch.uint8, device=weight.device)
    count.add_(1 if active is None else active.to(count.dtype))
    steps = count.clamp(min=1).double()
    corrected = torch.stack([lr / (1 - beta1**steps), (1 - beta2**steps).rsqrt()]).float()
    if weight.numel() == 0:
        return finite.bool()
    on = None if active is None else active.view(torch.uint8)

    def plan(config: Config, tensors: tuple[torch.Tensor, ...], half: torch.Tensor | None) -> list[Launch]:
        target, first, second = tensors
        step = (grad, left, right, entries, origin, bound, half, config)
        return launches(target, finite, *step, adam=(first, second, corrected, beta1, beta2, eps), active=on)

    def trial(config: Config) -> list[Launch]:
        state = weight.clone(), mean.clone(), square.clone()
        return plan(config, state, None if copy is None else copy.clone())

    config = choose(STEP, shape_class(left), weight.device, trial, f"adam, {_size(weight, left)}")
    run(plan(config, (weight, mean, square), copy), weight.device)
    return finite.bool()


def _size(weight: torch.Tensor, left: torch.Tensor | None) -> str:
    return f"{size_class(weight.numel())}, N {0 if left is None else size_class(left.shape[0])}"

"""What the kernels of the two ops on a language-model head share: a tile of logits, and d logits times the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import accumulate, tanh
from kedit_fast.kernels.triton.configs import GRADIENT, Config
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

WAVES = 4  # programs per multiprocessor that splitting aims at
D_LOGITS_BYTES = 64 << 20  # of d logits in memory at a time


@triton.jit
def logits_tile(
    hidden, head, bias, row, rows, token, vocabulary, width,
    hidden_row_stride, hidden_column_stride, head_row_stride, head_column_stride, softcap,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Capped logits of ROWS rows and TOKENS tokens, -inf past the vocabulary."""
    depth = tl.arange(0, DEPTH)
    rows_in = (row < rows)[:, None]
    tokens_in = (token < vocabulary)[None, :]
    of_row = hidden + row.to(tl.int64)[:, None] * hidden_row_stride
    of_token = head + token.to(tl.int64)[None, :] * head_row_stride
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    part = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, width, DEPTH):
        p = (first + depth).to(tl.int64)
        inside = p < width
        a = tl.load(of_row + p[None, :] * hidden_column_stride, mask=rows_in & inside[None, :], other=0.0)
        b = tl.load(of_token + p[:, None] * head_column_stride, mask=inside[:, None] & tokens_in, other=0.0)
        part, total = accumulate(a, b, part, total, first // DEPTH, PRODUCTS, DEPTH, INTERPRET)
    total += part
    if BIAS:
        total += tl.load(bias + token, mask=token < vocabulary, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        total = softcap * tanh(total / softcap)
    return tl.where(tokens_in, total, float("-inf"))


@triton.jit
def _gradient_kernel(
    d_logits, head, out, rows, tokens, width, tokens_per_split,
    d_row_stride, head_row_stride, head_column_stride,
    PRODUCTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """out[split] [rows, width] = d_logits[:, part] head[part] for the split's part of the tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, tokens)
    of_row = d_logits + row.to(tl.int64)[:, None] * d_row_stride
    of_column = head + column.to(tl.int64)[None, :] * head_column_stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, DEPTH):
        token = first + tl.arange(0, DEPTH)
        inside = token < end
        a = tl.load(of_row + token[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            of_column + token.to(tl.int64)[:, None] * head_row_stride,
            mask=inside[:, None] & (column < width)[None, :], other=0.0,
        )  # fmt: skip
        _, total = accumulate(a, b, total, total, 0, PRODUCTS, DEPTH, INTERPRET)
    to = out + (split * rows + row).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(to, total, mask=(row < rows)[:, None] & (column < width)[None, :])


def products_of(tensor: torch.Tensor) -> int:
    """Matrix products for two operands of this dtype: 16-bit numbers need one, fp32 six."""
    return 6 if tensor.dtype == torch.float32 else 1


def size_of(hidden: torch.Tensor, head: torch.Tensor) -> str:
    """What a tuned configuration depends on besides the shape class."""
    return f"{hidden.dtype}, rows {size_class(hidden.shape[0])}, V {size_class(head.shape[0])}, h {head.shape[1]}"


def shape_class(hidden: torch.Tensor, *others: torch.Tensor) -> str:
    """'native' for 16-bit states and heads, 'split' for fp32; with '_narrow' where their loads are not wide."""
    kind = "split" if hidden.dtype == torch.float32 else "native"
    return kind if loads_wide(hidden, *others) else f"{kind}_narrow"


def gradient_class(d_logits: torch.Tensor, head: torch.Tensor) -> str:
    """'native' for bf16 heads; 'split' for others, 'split_narrow' where loads are not wide or the tokens end odd."""
    if head.dtype == torch.bfloat16:
        return "native"
    return "split" if loads_wide(d_logits, head) and head.shape[0] % 16 == 0 else "split_narrow"


def tile_arguments(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, softcap: float, config: Config
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments and constants that every kernel with a `logits_tile` takes."""
    arguments = {
        "hidden": hidden, "head": head, "bias": head if bias is None else bias.contiguous(), "rows": hidden.shape[0],
        "vocabulary": head.shape[0], "width": head.shape[1], "hidden_row_stride": hidden.stride(0),
        "hidden_column_stride": hidden.stride(1), "head_row_stride": head.stride(0),
        "head_column_stride": head.stride(1), "softcap": softcap,
    }  # fmt: skip
    constants = {
        "BIAS": bias is not None, "CAPPED": softcap > 0, "PRODUCTS": products_of(hidden), "ROWS": config.m,
        "TOKENS": config.n, "DEPTH": config.k, "INTERPRET": INTERPRET,
    }  # fmt: skip
    return arguments, constants


def vocabulary_splits(rows: int, vocabulary: int, device: torch.device, config: Config) -> tuple[int, int]:
    """How many programs share a row's vocabulary, and how many tokens each takes."""
    tiles = ceil_div(vocabulary, config.n)
    wanted = ceil_div(WAVES * processors(device), ceil_div(rows, config.m))
    each = ceil_div(tiles, min(wanted, tiles)) * config.n
    return ceil_div(vocabulary, each), each


def gradient_launches(d_logits: torch.Tensor, head: torch.Tensor, config: Config) -> tuple[list[Launch], torch.Tensor]:
    """The launch of d_logits [rows, c] times head [c, h], and its result in parts [splits, rows, h] to be added up."""
    rows, tokens, width = d_logits.shape[0], head.shape[0], head.shape[1]
    grid = (ceil_div(rows, config.m), ceil_div(width, config.n))
    wanted = max(1, ceil_div(processors(head.device), grid[0] * grid[1]))
    each = ceil_div(ceil_div(tokens, wanted), config.k) * config.k
    splits = ceil_div(tokens, each)
    parts = d_logits.new_empty(splits, rows, width)
    arguments = {
        "d_logits": d_logits, "head": head, "out": parts, "rows": rows, "tokens": tokens, "width": width,
        "tokens_per_split": each, "d_row_stride": d_logits.stride(0), "head_row_stride": head.stride(0),
        "head_column_stride": head.stride(1),
    }  # fmt: skip
    constants = {
        "PRODUCTS": 3 if head.dtype == torch.bfloat16 else 6, "ROWS": config.m, "COLUMNS": config.n,
        "DEPTH": config.k, "INTERPRET": INTERPRET,
    }  # fmt: skip
    return [Launch(_gradient_kernel, (*grid, splits), arguments, constants, config)], parts


def vocabulary_parts(rows: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens whose d logits fit in D_LOGITS_BYTES."""
    step = max(1024, D_LOGITS_BYTES // (4 * rows) // 1024 * 1024)
    for begin in range(0, vocabulary, step):
        yield begin, min(begin + step, vocabulary)


def gradient(
    hidden: torch.Tensor, head: torch.Tensor, d_logits_of: Callable[[int, torch.Tensor], None]
) -> torch.Tensor:
    """Sum over vocabulary parts of d logits times head, fp32; `d_logits_of(begin, out)` fills out [rows, c]."""
    result = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    if hidden.numel() == 0:
        return result
    parts = list(vocabulary_parts(hidden.shape[0], head.shape[0]))
    scratch = torch.empty(hidden.shape[0], parts[0][1], dtype=torch.float32, device=hidden.device)

    def trial(config: Config) -> list[Launch]:
        return gradient_launches(scratch, head[: parts[0][1]], config)[0]

    config = choose(GRADIENT, gradient_class(scratch, head), hidden.device, trial, size_of(hidden, head))
    for begin, end in parts:
        d_logits = scratch[:, : end - begin]
        d_logits_of(begin, d_logits)
        calls, sums = gradient_launches(d_logits, head[begin:end], config)
        run(calls, hidden.device)
        result += sums.sum(0)
    return result

"""log p(target), logsumexp and top-1 by an online softmax; d logits for the backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton import lm_head as shared
from kedit_fast.kernels.triton.configs import LOGITS, Config
from kedit_fast.kernels.triton.launch import Launch, ceil_div, choose, run
from kedit_fast.kernels.triton.lm_head import logits_tile


@triton.jit
def _target_log_probs_kernel(
    hidden, head, bias, targets, peaks, sums, at_target, best_ids,
    rows, vocabulary, width, tokens_per_split,
    hidden_row_stride, hidden_column_stride, head_row_stride, head_column_stride, target_stride, softcap,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, vocabulary)
    target = tl.load(targets + row * target_stride, mask=row < rows, other=-1)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    target_logit = tl.zeros((ROWS,), tl.float32)
    best = tl.zeros((ROWS,), tl.int32) + begin
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        logits = logits_tile(
            hidden, head, bias, row, rows, token, vocabulary, width, hidden_row_stride, hidden_column_stride,
            head_row_stride, head_column_stride, softcap, BIAS, CAPPED, PRODUCTS, ROWS, TOKENS, DEPTH, INTERPRET,
        )  # fmt: skip
        here = tl.max(logits, axis=1)
        best = tl.where(here > peak, first + tl.argmax(logits, axis=1), best)
        higher = tl.maximum(peak, here)
        floor = tl.where(higher == float("-inf"), 0.0, higher)  # a row of only -inf: exp(-inf - 0) is 0, not NaN
        total = total * tl.exp(peak - floor) + tl.sum(tl.exp(logits - floor[:, None]), axis=1)
        target_logit += tl.sum(tl.where(token[None, :] == target[:, None], logits, 0.0), axis=1)
        peak = higher
    out = split * rows + row
    inside = row < rows
    tl.store(peaks + out, peak, mask=inside)
    tl.store(sums + out, total, mask=inside)
    tl.store(best_ids + out, best.to(tl.int64), mask=inside)
    tl.store(at_target + row, target_logit, mask=inside & (target >= begin) & (target < end))


@triton.jit
def _d_logits_kernel(
    hidden, head, bias, targets, totals, out, first_token,
    rows, vocabulary, width,
    hidden_row_stride, hidden_column_stride, head_row_stride, head_column_stride, target_stride, out_stride, softcap,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """d log p(target) / d raw logits of `vocabulary` tokens from `first_token` on; head and bias begin there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = row < rows
    logits = logits_tile(
        hidden, head, bias, row, rows, token, vocabulary, width, hidden_row_stride, hidden_column_stride,
        head_row_stride, head_column_stride, softcap, BIAS, CAPPED, PRODUCTS, ROWS, TOKENS, DEPTH, INTERPRET,
    )  # fmt: skip
    target = tl.load(targets + row * target_stride, mask=inside, other=-1) - first_token
    total = tl.load(totals + row, mask=inside, other=0.0)
    hit = tl.where(token[None, :] == target[:, None], 1.0, 0.0)
    d_logits = hit - tl.exp(logits - total[:, None])
    if CAPPED:
        share = logits / softcap
        d_logits *= 1 - share * share
    to = out + row.to(tl.int64)[:, None] * out_stride + token[None, :]
    tl.store(to, d_logits, mask=inside[:, None] & (token < vocabulary)[None, :])


def launches(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    config: Config,
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
    """The launch, and what it fills: peaks, sums and best ids [splits, rows], logits at the targets [rows]."""
    rows = hidden.shape[0]
    splits, each = shared.vocabulary_splits(rows, head.shape[0], hidden.device, config)
    arguments, constants = shared.tile_arguments(hidden, head, bias, softcap, config)
    peaks, sums = (torch.empty(splits, rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    best = torch.empty(splits, rows, dtype=torch.int64, device=hidden.device)
    at_target = torch.full((rows,), torch.nan, dtype=torch.float32, device=hidden.device)  # outside the vocabulary
    arguments |= {
        "targets": targets, "peaks": peaks, "sums": sums, "at_target": at_target, "best_ids": best,
        "tokens_per_split": each, "target_stride": targets.stride(0),
    }  # fmt: skip
    launch = Launch(_target_log_probs_kernel, (ceil_div(rows, config.m), splits), arguments, constants, config)
    return [launch], (peaks, sums, best, at_target)


def d_logits_launches(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    total: torch.Tensor,
    begin: int,
    out: torch.Tensor,
    config: Config,
) -> list[Launch]:
    """The launch that fills out [rows, c] with d log p / d raw logits of tokens [begin, begin + c)."""
    end = begin + out.shape[1]
    part = None if bias is None else bias[begin:end]
    arguments, constants = shared.tile_arguments(hidden, head[begin:end], part, softcap, config)
    arguments |= {
        "targets": targets, "totals": total, "out": out, "first_token": begin, "target_stride": targets.stride(0),
        "out_stride": out.stride(0),
    }  # fmt: skip
    grid = (ceil_div(hidden.shape[0], config.m), ceil_div(out.shape[1], config.n))
    return [Launch(_d_logits_kernel, grid, arguments, constants, config)]


def target_log_probs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log p(targets), the top-1 id and its log p, each [rows], and d log p / d hidden [rows, h].

    The last one is [0, h] where `gradient` is false.
    """
    none = hidden.new_empty(0, hidden.shape[1], dtype=torch.float32)
    if hidden.shape[0] == 0:
        return none.new_empty(0), torch.empty_like(targets), none.new_empty(0), none

    def trial(config: Config) -> list[Launch]:
        return launches(hidden, head, targets, bias, softcap, config)[0]

    config = choose(LOGITS, shared.shape_class(hidden, head), hidden.device, trial, shared.size_of(hidden, head))
    calls, (peaks, sums, best, at_target) = launches(hidden, head, targets, bias, softcap, config)
    run(calls, hidden.device)
    total = torch.logsumexp(peaks + sums.log(), dim=0)
    peak, split = peaks.max(dim=0)  # the first of equal ones

    def fill(begin: int, out: torch.Tensor) -> None:
        run(d_logits_launches(hidden, head, targets, bias, softcap, total, begin, out, config), hidden.device)

    slope = shared.gradient(hidden, head, fill) if gradient else none
    return at_target - total, best.gather(0, split[None])[0], peak - total, slope

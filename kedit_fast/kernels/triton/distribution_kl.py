"""KL(p || p_ref) by an online softmax over both distributions; d logits for the backward pass.

With z, r the logits and D = z - r: KL = E_p[D] - lse(z) + lse(r), in one pass over the vocabulary. D is taken
relative to its level in the first tile, so that a large common offset does not cancel digits. The reverse one,
KL(p_ref || p), is the same pass with the states exchanged; its d logits are p - p_ref.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton import lm_head as shared
from kedit_fast.kernels.triton.configs import LOGITS, Config
from kedit_fast.kernels.triton.launch import Launch, ceil_div, choose, run
from kedit_fast.kernels.triton.lm_head import logits_tile


@triton.jit
def _distribution_kl_kernel(
    hidden, hidden_ref, head, bias, peaks, sums, differences, peaks_ref, sums_ref, levels,
    rows, vocabulary, width, tokens_per_split,
    hidden_row_stride, hidden_column_stride, ref_row_stride, ref_column_stride, head_row_stride, head_column_stride,
    softcap,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, vocabulary)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    peak_ref = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    total_ref = tl.zeros((ROWS,), tl.float32)
    difference = tl.zeros((ROWS,), tl.float32)  # sum of exp(z - peak) (z - r - level)
    level = tl.zeros((ROWS,), tl.float32)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        logits = logits_tile(
            hidden, head, bias, row, rows, token, vocabulary, width, hidden_row_stride, hidden_column_stride,
            head_row_stride, head_column_stride, softcap, BIAS, CAPPED, PRODUCTS, ROWS, TOKENS, DEPTH, INTERPRET,
        )  # fmt: skip
        reference = logits_tile(
            hidden_ref, head, bias, row, rows, token, vocabulary, width, ref_row_stride, ref_column_stride,
            head_row_stride, head_column_stride, softcap, BIAS, CAPPED, PRODUCTS, ROWS, TOKENS, DEPTH, INTERPRET,
        )  # fmt: skip
        here = tl.max(logits, axis=1)
        here_ref = tl.max(reference, axis=1)
        if first == begin:
            level = here - here_ref
            level = tl.where(tl.abs(level) < float("inf"), level, 0.0)  # NaN too
        higher = tl.maximum(peak, here)
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(logits - floor[:, None])
        apart = tl.where((token < vocabulary)[None, :], logits - reference - level[:, None], 0.0)
        fade = tl.exp(peak - floor)
        total = total * fade + tl.sum(weight, axis=1)
        difference = difference * fade + tl.sum(weight * apart, axis=1)
        peak = higher
        higher_ref = tl.maximum(peak_ref, here_ref)
        floor_ref = tl.where(higher_ref == float("-inf"), 0.0, higher_ref)
        total_ref = total_ref * tl.exp(peak_ref - floor_ref) + tl.sum(tl.exp(reference - floor_ref[:, None]), axis=1)
        peak_ref = higher_ref
    out = split * rows + row
    inside = row < rows
    tl.store(peaks + out, peak, mask=inside)
    tl.store(sums + out, total, mask=inside)
    tl.store(differences + out, difference, mask=inside)
    tl.store(peaks_ref + out, peak_ref, mask=inside)
    tl.store(sums_ref + out, total_ref, mask=inside)
    tl.store(levels + out, level, mask=inside)


@triton.jit
def _d_logits_kernel(
    hidden, hidden_ref, head, bias, kls, totals, totals_ref, out,
    rows, vocabulary, width,
    hidden_row_stride, hidden_column_stride, ref_row_stride, ref_column_stride, head_row_stride, head_column_stride,
    out_stride, softcap,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, REVERSE: tl.constexpr, PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """d KL / d raw logits of `vocabulary` tokens: p (z - r - lse(z) + lse(r) - KL), with REVERSE p - p_ref."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = row < rows
    logits = logits_tile(
        hidden, head, bias, row, rows, token, vocabulary, width, hidden_row_stride, hidden_column_stride,
        head_row_stride, head_column_stride, softcap, BIAS, CAPPED, PRODUCTS, ROWS, TOKENS, DEPTH, INTERPRET,
    )  # fmt: skip
    reference = logits_tile(
        hidden_ref, head, bias, row, rows, token, vocabulary, width, ref_row_stride, ref_column_stride,
        head_row_stride, head_column_stride, softcap, BIAS, CAPPED, PRODUCTS, ROWS, TOKENS, DEPTH, INTERPRET,
    )  # fmt: skip
    total = tl.load(totals + row, mask=inside, other=0.0)
    total_ref = tl.load(totals_ref + row, mask=inside, other=0.0)
    log_p = logits - total[:, None]
    log_ref = reference - total_ref[:, None]
    if REVERSE:
        d_logits = tl.exp(log_p) - tl.exp(log_ref)
    else:
        kl = tl.load(kls + row, mask=inside, other=0.0)
        d_logits = tl.exp(log_p) * (log_p - log_ref - kl[:, None])
    if CAPPED:
        share = logits / softcap
        d_logits *= 1 - share * share
    to = out + row.to(tl.int64)[:, None] * out_stride + token[None, :]
    tl.store(to, d_logits, mask=inside[:, None] & (token < vocabulary)[None, :])


def _pair_arguments(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    config: Config,
) -> tuple[dict[str, Any], dict[str, Any]]:
    arguments, constants = shared.tile_arguments(hidden, head, bias, softcap, config)
    arguments |= {
        "hidden_ref": hidden_ref,
        "ref_row_stride": hidden_ref.stride(0),
        "ref_column_stride": hidden_ref.stride(1),
    }
    return arguments, constants


def launches(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    config: Config,
) -> tuple[list[Launch], torch.Tensor]:
    """The launch and what it fills, [6, splits, rows]: peak, sum, difference, peak and sum of the reference, level."""
    rows = hidden.shape[0]
    splits, each = shared.vocabulary_splits(rows, head.shape[0], hidden.device, config)
    arguments, constants = _pair_arguments(hidden, hidden_ref, head, bias, softcap, config)
    parts = torch.empty(6, splits, rows, dtype=torch.float32, device=hidden.device)
    names = ("peaks", "sums", "differences", "peaks_ref", "sums_ref", "levels")
    arguments |= {"tokens_per_split": each, **dict(zip(names, parts, strict=True))}
    launch = Launch(_distribution_kl_kernel, (ceil_div(rows, config.m), splits), arguments, constants, config)
    return [launch], parts


def d_logits_launches(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    kl: torch.Tensor,
    total: torch.Tensor,
    total_ref: torch.Tensor,
    begin: int,
    out: torch.Tensor,
    config: Config,
    reverse: bool = False,
) -> list[Launch]:
    """The launch that fills out [rows, c] with d KL / d raw logits of tokens [begin, begin + c)."""
    end = begin + out.shape[1]
    part = None if bias is None else bias[begin:end]
    arguments, constants = _pair_arguments(hidden, hidden_ref, head[begin:end], part, softcap, config)
    arguments |= {"kls": kl, "totals": total, "totals_ref": total_ref, "out": out, "out_stride": out.stride(0)}
    constants |= {"REVERSE": reverse}
    grid = (ceil_div(hidden.shape[0], config.m), ceil_div(out.shape[1], config.n))
    return [Launch(_d_logits_kernel, grid, arguments, constants, config)]


def distribution_kl(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    gradient: bool,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(p || p_ref), or with `reverse` KL(p_ref || p), [rows], and d KL / d hidden [rows, h] ([0, h] without
    `gradient`)."""
    none = hidden.new_empty(0, hidden.shape[1], dtype=torch.float32)
    if hidden.shape[0] == 0:
        return none.new_empty(0), none

    first, second = (hidden_ref, hidden) if reverse else (hidden, hidden_ref)  # KL(first || second)

    def trial(config: Config) -> list[Launch]:
        return launches(first, second, head, bias, softcap, config)[0]

    kind = f"pair_{shared.shape_class(hidden, hidden_ref, head)}"
    config = choose(LOGITS, kind, hidden.device, trial, shared.size_of(hidden, head))
    calls, parts = launches(first, second, head, bias, softcap, config)
    peaks, sums, differences, peaks_ref, sums_ref, levels = parts
    run(calls, hidden.device)
    total = torch.logsumexp(peaks + sums.log(), dim=0)
    total_ref = torch.logsumexp(peaks_ref + sums_ref.log(), dim=0)
    level = levels[0]
    mean = ((differences + (levels - level) * sums) * torch.exp(peaks - total)).sum(0)  # E_p[D] - level
    kl = mean - ((total - total_ref) - level)

    totals = (total_ref, total) if reverse else (total, total_ref)

    def fill(begin: int, out: torch.Tensor) -> None:
        calls = d_logits_launches(hidden, hidden_ref, head, bias, softcap, kl, *totals, begin, out, config, reverse)
        run(calls, hidden.device)

    return kl, shared.gradient(hidden, head, fill) if gradient else none

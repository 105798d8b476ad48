"""KL(p || p_ref) by an online softmax over both distributions; d logits for the backward pass.

With z, r the logits: KL = sum_v p_v (z_v - r_v) - lse(z) + lse(r), in one pass over the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton import head as shared
from kedit_fast.kernels.triton.configs import LOGITS, Config
from kedit_fast.kernels.triton.head import logits_tile
from kedit_fast.kernels.triton.launch import Launch, choose, run


@triton.jit
def _distribution_kl_kernel(
    hidden, hidden_ref, head, bias, peaks, sums, differences, peaks_ref, sums_ref,
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
    difference = tl.zeros((ROWS,), tl.float32)  # sum of exp(z - peak) (z - r)
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
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(logits - floor[:, None])
        apart = tl.where((token < vocabulary)[None, :], logits - reference, 0.0)
        fade = tl.exp(peak - floor)
        total = total * fade + tl.sum(weight, axis=1)
        difference = difference * fade + tl.sum(weight * apart, axis=1)
        peak = higher
        higher_ref = tl.maximum(peak_ref, tl.max(reference, axis=1))
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


@triton.jit
def _d_logits_kernel(
    hidden, hidden_ref, head, bias, kls, totals, totals_ref, grad, out,
    rows, vocabulary, width,
    hidden_row_stride, hidden_column_stride, ref_row_stride, ref_column_stride, head_row_stride, head_column_stride,
    out_stride, softcap,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """d loss / d raw logits of `vocabulary` tokens: p (z - r - lse(z) + lse(r) - KL)."""
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
    kl = tl.load(kls + row, mask=inside, other=0.0)
    scale = tl.load(grad + row, mask=inside, other=0.0)
    log_p = logits - total[:, None]
    d_logits = tl.exp(log_p) * (log_p - (reference - total_ref[:, None]) - kl[:, None]) * scale[:, None]
    if CAPPED:
        share = logits / softcap
        d_logits *= 1 - share * share
    to = out + row.to(tl.int64)[:, None] * out_stride + token[None, :]
    tl.store(to, d_logits, mask=inside[:, None] & (token < vocabulary)[None, :])


def _pair_arguments(hidden, hidden_ref, head, bias, softcap, config) -> tuple[dict, dict]:
    arguments, constants = shared.tile_arguments(hidden, head, bias, softcap, config)
    arguments |= {
        "hidden_ref": hidden_ref,
        "ref_row_stride": hidden_ref.stride(0),
        "ref_column_stride": hidden_ref.stride(1),
    }
    return arguments, constants


def plan(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    config: Config,
) -> tuple[list[Launch], torch.Tensor]:
    """The launch and what it fills, [5, splits, rows]: peak, sum, difference, peak and sum of the reference."""
    rows = hidden.shape[0]
    splits, each = shared.vocabulary_splits(rows, head.shape[0], hidden.device, config)
    arguments, constants = _pair_arguments(hidden, hidden_ref, head, bias, softcap, config)
    parts = torch.empty(5, splits, rows, dtype=torch.float32, device=hidden.device)
    names = ("peaks", "sums", "differences", "peaks_ref", "sums_ref")
    arguments |= {"tokens_per_split": each, **dict(zip(names, parts, strict=True))}
    launch = Launch(_distribution_kl_kernel, (triton.cdiv(rows, config.m), splits), arguments, constants, config)
    return [launch], parts


def distribution_kl(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return KL(p || p_ref) and both logsumexps, each [rows]."""
    if hidden.shape[0] == 0:
        empty = torch.empty(3, 0, dtype=torch.float32, device=hidden.device)
        return tuple(part.clone() for part in empty)

    def trial(config: Config) -> list[Launch]:
        return plan(hidden, hidden_ref, head, bias, softcap, config)[0]

    config = choose(LOGITS, f"pair_{shared.shape_class(hidden)}", hidden.device, trial)
    launches, (peaks, sums, differences, peaks_ref, sums_ref) = plan(hidden, hidden_ref, head, bias, softcap, config)
    run(launches, hidden.device)
    total = torch.logsumexp(peaks + sums.log(), dim=0)
    total_ref = torch.logsumexp(peaks_ref + sums_ref.log(), dim=0)
    mean = (differences * torch.exp(peaks - total)).sum(0)  # E_p[z - r]
    return mean - total + total_ref, total, total_ref


def d_logits_plan(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    kl: torch.Tensor,
    total: torch.Tensor,
    total_ref: torch.Tensor,
    out: torch.Tensor,
    config: Config,
) -> list[Launch]:
    """The launch that fills out [rows, c] with d loss / d raw logits; `head` and `bias` are those of the c tokens."""
    arguments, constants = _pair_arguments(hidden, hidden_ref, head, bias, softcap, config)
    arguments |= {
        "kls": kl, "totals": total, "totals_ref": total_ref, "grad": grad, "out": out, "out_stride": out.stride(0),
    }  # fmt: skip
    grid = (triton.cdiv(hidden.shape[0], config.m), triton.cdiv(head.shape[0], config.n))
    return [Launch(_d_logits_kernel, grid, arguments, constants, config)]


def distribution_kl_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    kl: torch.Tensor,
    total: torch.Tensor,
    total_ref: torch.Tensor,
) -> torch.Tensor:
    """Gradient [rows, h] of sum(grad * KL) with respect to `hidden`."""
    grad = grad.float().contiguous()

    def fill(begin: int, end: int, out: torch.Tensor) -> None:
        part, part_bias = head[begin:end], None if bias is None else bias[begin:end]

        def planned(config: Config) -> list[Launch]:
            return d_logits_plan(
                grad, hidden, hidden_ref, part, part_bias, softcap, kl, total, total_ref, out, config
            )  # fmt: skip

        config = choose(LOGITS, f"pair_{shared.shape_class(hidden)}", hidden.device, planned)
        run(planned(config), hidden.device)

    return shared.gradient(hidden, head, fill)

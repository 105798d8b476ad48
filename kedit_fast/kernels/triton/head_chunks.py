"""The two ops on a language-model head from products of a library: what is done with a chunk of logits, in one kernel.

A chunk of logits [rows, c] is computed by a product of 16-bit matrices with an fp32 result, which the caller names. One
program per row then adds the bias, caps, carries the online softmax on, and writes the weights of the gradient in the
dtype of the head, where the next product takes them: as one plane where the gradient is rounded to bf16 anyway, else as
two whose sum is the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from kedit_fast.kernels.triton.arithmetic import tanh
from kedit_fast.kernels.triton.configs import CHUNK, INTERPRETED, Config, lookup
from kedit_fast.kernels.triton.launch import INTERPRET, Launch, architecture, run
from kedit_fast.support.free_memory import free_bytes

Product = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""left [m, k], right [k, n], depth -> [m, n] in fp32: both are of one 16-bit dtype, sums in the unit `depth` long."""
DEPTH = 1024
"""Columns of states that a matrix unit sums before their sum is rounded to fp32."""
MOST_BYTES = 256 << 20
"""Of logits and weights in memory at a time."""
FREE_SHARE = 16
"""One part in so many of the free memory may be theirs."""
STEP = 1024
"""Tokens of a chunk are a multiple of it."""


@triton.jit
def _finished(of_row, bias, token, inside, softcap, BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """Logits with their bias, capped; -inf past the chunk."""
    logit = tl.load(of_row + token, mask=inside, other=0.0)
    if BIAS:
        logit += tl.load(bias + token, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        logit = softcap * tanh(logit / softcap)
    return tl.where(inside, logit, float("-inf"))


@triton.jit
def _store_weight(upper, lower, at, weight, logit, inside, softcap, CAPPED: tl.constexpr, PLANES: tl.constexpr):
    """One or two planes of a weight by capped logits, taken through the cap."""
    if CAPPED:
        share = logit / softcap
        weight = tl.where(inside, weight * (1 - share * share), 0.0)
    first = weight.to(upper.dtype.element_ty)
    tl.store(upper + at, first, mask=inside)
    if PLANES == 2:
        tl.store(lower + at, (weight - first.to(tl.float32)).to(upper.dtype.element_ty), mask=inside)


@triton.jit
def _log_probs_kernel(
    logits, bias, targets, peaks, sums, fades, at_target, best, upper, lower, begin, columns,
    logits_stride, plane_stride, target_stride, softcap,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, PLANES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    of_row = logits + row * logits_stride
    old = tl.load(peaks + row)
    peak = old
    place = tl.load(best + row)
    for first in range(0, columns, TOKENS):
        token = first + tl.arange(0, TOKENS)
        logit = _finished(of_row, bias, token, token < columns, softcap, BIAS, CAPPED)
        here = tl.max(logit, axis=0)
        place = tl.where(here > peak, (begin + first + tl.argmax(logit, axis=0)).to(tl.int64), place)
        peak = tl.maximum(peak, here)
    floor = tl.where(peak == float("-inf"), 0.0, peak)
    target = tl.load(targets + row * target_stride) - begin
    total = tl.zeros((TOKENS,), tl.float32)
    chosen = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, columns, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = token < columns
        logit = _finished(of_row, bias, token, inside, softcap, BIAS, CAPPED)
        weight = tl.exp(logit - floor)
        total += weight
        chosen += tl.where(token == target, logit, 0.0)
        if PLANES > 0:
            at = row * plane_stride + token
            _store_weight(upper, lower, at, weight, logit, inside, softcap, CAPPED, PLANES)
    fade = tl.exp(old - floor)
    tl.store(peaks + row, peak)
    tl.store(sums + row, tl.load(sums + row) * fade + tl.sum(total, axis=0))
    tl.store(fades + row, fade)
    tl.store(best + row, place)
    tl.store(at_target + row, tl.sum(chosen, axis=0), mask=(target >= 0) & (target < columns))


@triton.jit
def _divergence_kernel(
    logits, bias, peaks, sums, fades, apart, levels, upper, lower, begin, columns, rows,
    logits_stride, plane_stride, softcap,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, REVERSE: tl.constexpr, PLANES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Rows [0, rows) of logits are of the first states, the others of the reference."""
    row = tl.program_id(0).to(tl.int64)
    other = row + rows
    of_row = logits + row * logits_stride
    of_other = logits + other * logits_stride
    old = tl.load(peaks + row)
    old_ref = tl.load(peaks + other)
    here = tl.max(tl.full((TOKENS,), float("-inf"), tl.float32), axis=0)
    here_ref = here
    for first in range(0, columns, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = token < columns
        here = tl.maximum(here, tl.max(_finished(of_row, bias, token, inside, softcap, BIAS, CAPPED), axis=0))
        here_ref = tl.maximum(here_ref, tl.max(_finished(of_other, bias, token, inside, softcap, BIAS, CAPPED), axis=0))
    level = tl.load(levels + row)
    if begin == 0:
        level = here - here_ref
        level = tl.where(tl.abs(level) < float("inf"), level, 0.0)  # NaN too
        tl.store(levels + row, level)
    peak = tl.maximum(old, here)
    peak_ref = tl.maximum(old_ref, here_ref)
    floor = tl.where(peak == float("-inf"), 0.0, peak)
    floor_ref = tl.where(peak_ref == float("-inf"), 0.0, peak_ref)
    total = tl.zeros((TOKENS,), tl.float32)
    total_ref = tl.zeros((TOKENS,), tl.float32)
    difference = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, columns, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside = token < columns
        logit = _finished(of_row, bias, token, inside, softcap, BIAS, CAPPED)
        reference = _finished(of_other, bias, token, inside, softcap, BIAS, CAPPED)
        weight = tl.exp(logit - floor)
        weight_ref = tl.exp(reference - floor_ref)
        total += weight
        total_ref += weight_ref
        if REVERSE:
            mean_weight = weight_ref
        else:
            mean_weight = weight
        weighted = tl.where(inside, mean_weight * (logit - reference - level), 0.0)
        difference += weighted
        if PLANES > 0:
            first_weight = weighted
            if REVERSE:
                first_weight = weight_ref
            at = row * plane_stride + token
            _store_weight(upper, lower, at, first_weight, logit, inside, softcap, CAPPED, PLANES)
            at = other * plane_stride + token
            _store_weight(upper, lower, at, weight, logit, inside, softcap, CAPPED, PLANES)
    fade = tl.exp(old - floor)
    fade_ref = tl.exp(old_ref - floor_ref)
    mean_fade = fade
    if REVERSE:
        mean_fade = fade_ref
    tl.store(peaks + row, peak)
    tl.store(peaks + other, peak_ref)
    tl.store(sums + row, tl.load(sums + row) * fade + tl.sum(total, axis=0))
    tl.store(sums + other, tl.load(sums + other) * fade_ref + tl.sum(total_ref, axis=0))
    tl.store(apart + row, tl.load(apart + row) * mean_fade + tl.sum(difference, axis=0))
    tl.store(fades + row, mean_fade)
    tl.store(fades + other, fade)


def planes_of(hidden: torch.Tensor, gradient: bool, cancels: bool) -> int:
    """How many planes hold the weights of the gradient: one where it is rounded to bf16 anyway.

    It takes two where the gradient is a difference of nearly equal sums of rounded weights: that of a divergence of
    distributions that are alike, and with a cap that of a token that is nearly certain. (Without one the weight of the
    most probable token is 1, which is not rounded.)
    """
    if not gradient:
        return 0
    return 1 if hidden.dtype == torch.bfloat16 and not cancels else 2


def tokens_of(rows: int, planes: int, vocabulary: int, device: torch.device) -> int:
    """Tokens of a chunk whose logits [rows, c] and planes fit into their share of the memory."""
    most = MOST_BYTES
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        most = min(most, free_bytes(device) // FREE_SHARE)
    fitting = most // (rows * (4 + 2 * planes)) // STEP * STEP
    return min(max(fitting, STEP), vocabulary)


class Chunks:
    """What is carried from one chunk to the next: sums by rows, and the gradient by the rows of the weights."""

    def __init__(
        self, states: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, softcap: float, planes: int,
        chunk: int | None,
    ):  # fmt: skip
        rows, device = states.shape[0], states.device
        self.states, self.head, self.softcap, self.planes = states, head, softcap, planes
        self.bias = None if bias is None else bias.contiguous()
        self.chunk = chunk or tokens_of(rows, planes, head.shape[0], device)
        self.peaks = torch.full((rows,), -torch.inf, dtype=torch.float32, device=device)
        self.sums, self.fades = (torch.zeros(rows, dtype=torch.float32, device=device) for _ in range(2))
        width = (max(planes, 1), rows if planes else 1, self.chunk if planes else 1)
        self.weights = torch.empty(width, dtype=head.dtype, device=device)
        self.slopes = torch.zeros(rows if planes else 0, states.shape[1], dtype=torch.float32, device=device)

    def arguments(self, logits: torch.Tensor, begin: int, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
        """What both kernels take for the logits of tokens [begin, begin + c)."""
        columns = logits.shape[1]
        bias = logits if self.bias is None else self.bias[begin : begin + columns]
        arguments = {
            "logits": logits, "bias": bias, "peaks": self.peaks, "sums": self.sums, "fades": self.fades,
            "upper": self.weights[0], "lower": self.weights[-1], "begin": begin, "columns": columns,
            "logits_stride": logits.stride(0), "plane_stride": self.weights.stride(1), "softcap": self.softcap,
        }  # fmt: skip
        constants = {
            "BIAS": self.bias is not None, "CAPPED": self.softcap > 0, "PLANES": self.planes, "TOKENS": config.n,
        }  # fmt: skip
        return arguments, constants

    def run(self, product: Product, launches: Callable[[torch.Tensor, int, Config], list[Launch]]) -> None:
        """Every chunk: logits, the kernel, and the weights times the chunk of the head."""
        device = self.states.device
        config = INTERPRETED[CHUNK] if INTERPRET else lookup(CHUNK, "rows", architecture(device))
        for begin in range(0, self.head.shape[0], self.chunk):
            part = self.head[begin : begin + self.chunk]
            tokens = part.shape[0]
            run(launches(product(self.states, part.T, DEPTH), begin, config), device)
            if self.planes:
                self.slopes *= self.fades[:, None]
                for plane in self.weights:
                    self.slopes += product(plane[:, :tokens], part, tokens)

    def log_sums(self) -> torch.Tensor:
        """logsumexp of the logits of every row."""
        return self.peaks + self.sums.log()


def log_probs_launches(
    chunks: Chunks, targets: torch.Tensor, at_target: torch.Tensor, best: torch.Tensor, logits: torch.Tensor,
    begin: int, config: Config,
) -> list[Launch]:  # fmt: skip
    """The launch that carries log probabilities on by a chunk of logits."""
    arguments, constants = chunks.arguments(logits, begin, config)
    arguments |= {"targets": targets, "at_target": at_target, "best": best, "target_stride": targets.stride(0)}
    return [Launch(_log_probs_kernel, (logits.shape[0],), arguments, constants, config)]


def divergence_launches(
    chunks: Chunks, apart: torch.Tensor, levels: torch.Tensor, reverse: bool, logits: torch.Tensor, begin: int,
    config: Config,
) -> list[Launch]:  # fmt: skip
    """The launch that carries a divergence on by a chunk of both logits."""
    arguments, constants = chunks.arguments(logits, begin, config)
    arguments |= {"apart": apart, "levels": levels, "rows": len(apart)}
    return [Launch(_divergence_kernel, (len(apart),), arguments, constants | {"REVERSE": reverse}, config)]


def target_log_probs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    gradient: bool,
    product: Product,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kedit_fast.kernels.triton.target_log_probs`, from products of a library; `chunk` tokens at a time."""
    chunks = Chunks(hidden, head, bias, softcap, planes_of(hidden, gradient, softcap > 0), chunk)
    at_target, best = torch.full_like(chunks.peaks, torch.nan), torch.zeros_like(targets)
    if hidden.shape[0] == 0:
        return at_target, best, torch.empty_like(at_target), chunks.slopes

    def launches(logits: torch.Tensor, begin: int, config: Config) -> list[Launch]:
        return log_probs_launches(chunks, targets, at_target, best, logits, begin, config)

    chunks.run(product, launches)
    log_sum = chunks.log_sums()
    slopes = chunks.slopes
    if gradient:
        chosen = head[targets.clamp(0, head.shape[0] - 1)].float()
        if softcap > 0:
            chosen *= 1 - (at_target[:, None] / softcap) ** 2
        slopes = chosen - slopes / chunks.sums[:, None]
    return at_target - log_sum, best, chunks.peaks - log_sum, slopes


def distribution_kl(
    hidden: torch.Tensor,
    hidden_ref: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    gradient: bool,
    reverse: bool,
    product: Product,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kedit_fast.kernels.triton.distribution_kl`, from products of a library; `chunk` tokens at a time."""
    rows = hidden.shape[0]
    chunks = Chunks(torch.cat([hidden, hidden_ref]), head, bias, softcap, planes_of(hidden, gradient, True), chunk)
    apart, levels = torch.zeros_like(chunks.peaks[:rows]), torch.zeros_like(chunks.peaks[:rows])
    if rows == 0:
        return apart, chunks.slopes

    def launches(logits: torch.Tensor, begin: int, config: Config) -> list[Launch]:
        return divergence_launches(chunks, apart, levels, reverse, logits, begin, config)

    chunks.run(product, launches)
    total, total_ref = chunks.sums[:rows], chunks.sums[rows:]
    log_sums = chunks.log_sums()
    mean = apart / (total_ref if reverse else total)  # E[D] - level
    kl = mean - ((log_sums[:rows] - log_sums[rows:]) - levels)
    kl = -kl if reverse else kl
    if not gradient:
        return kl, chunks.slopes
    first, second = chunks.slopes[:rows], chunks.slopes[rows:]
    if reverse:
        return kl, second / total[:, None] - first / total_ref[:, None]
    return kl, (first - mean[:, None] * second) / total[:, None]

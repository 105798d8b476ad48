"""What the references of the two ops on a language-model head share: chunks of capped logits and their sum."""

from __future__ import annotations

import torch

from kedit_fast.reference.wide_product import HALVES, has_wide_product, wide_product
from kedit_fast.support.dtypes import accumulation_dtype

CACHED = 6 << 20
"""Bytes of a head that the products of a chunk read."""
DEPTH = 1024
"""Columns of 16-bit states that a matrix unit sums before their sum is rounded to fp32."""


def default_chunk(hidden: torch.Tensor) -> int:
    """Vocabulary entries whose logits are in memory at a time.

    Few enough for their part of the head to stay in a CPU's cache from one product to the other; many enough to fill a
    GPU.
    """
    if hidden.device.type != "cpu":
        return 16384
    width = hidden.shape[1] * accumulation_dtype(hidden).itemsize
    return max(CACHED // max(width, 1), 256)


def product_dtype(hidden: torch.Tensor, head: torch.Tensor) -> torch.dtype:
    """The dtype of states and head in their products: their own where torch has wide products, else that of sums."""
    return hidden.dtype if has_wide_product(hidden, head) else accumulation_dtype(hidden)


def raw_logits(states: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """states [rows, h] times part [c, h] of the head, transposed; both of the product dtype. fp32 or fp64."""
    return wide_product(states, part.T, DEPTH) if part.dtype in HALVES else states @ part.T


def add_product_(total: torch.Tensor, weights: torch.Tensor, part: torch.Tensor) -> None:
    """total += weights [rows, c], in fp32 or fp64, times part [c, h] of the head, of the product dtype.

    Beside a 16-bit head the weights are written as two terms of its dtype: an error of 2^-16 of each weight in bf16, of
    2^-22 in fp16.
    """
    if part.dtype not in HALVES:
        total.addmm_(weights, part)
        return
    upper = weights.to(part.dtype)
    for term in (upper, (weights - upper).to(part.dtype)):
        total += torch.mm(term, part, out_dtype=torch.float32)


def capped(logits: torch.Tensor, bias: torch.Tensor | None, softcap: float) -> torch.Tensor:
    """Logits plus their part of the bias, soft-capped; `logits` is overwritten."""
    if bias is not None:
        logits += bias.to(logits.dtype)
    if softcap > 0:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def through_cap(slopes: torch.Tensor, logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """Slopes by capped logits -> slopes by raw ones, from the capped logits; `slopes` itself without a cap."""
    return slopes * (1 - (logits / softcap) ** 2) if softcap > 0 else slopes


class OnlineSum:
    """logsumexp of chunks of logits [rows, c] that come one after another."""

    def __init__(self, rows: int, like: torch.Tensor):
        self.peak = torch.full((rows,), -torch.inf, dtype=accumulation_dtype(like), device=like.device)
        self.sum = torch.zeros_like(self.peak)

    def add(self, logits: torch.Tensor, largest: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """exp(logits - peak) [rows, c], and the factor [rows] by which earlier sums must be multiplied.

        `largest` [rows] are the largest logits, where they are known.
        """
        peak = torch.maximum(self.peak, logits.amax(dim=1) if largest is None else largest)
        floor = torch.where(peak == -torch.inf, 0.0, peak)  # only -inf so far: exp(-inf - 0) is 0, not NaN
        fade, weights = torch.exp(self.peak - floor), torch.exp(logits - floor[:, None])
        self.sum = self.sum * fade + weights.sum(dim=1)
        self.peak = peak
        return weights, fade

    def log(self) -> torch.Tensor:
        """The logsumexp [rows] of all logits added so far."""
        return self.peak + self.sum.log()

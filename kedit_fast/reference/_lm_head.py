"""What the references of the two ops on a language-model head share: chunks of capped logits and their sum."""

from __future__ import annotations

import torch

from kedit_fast.support.dtypes import accumulation_dtype


def default_chunk(tensor: torch.Tensor) -> int:
    """Vocabulary entries whose logits are in memory at a time: few enough for a CPU's cache, enough to fill a GPU."""
    return 8192 if tensor.device.type == "cpu" else 16384


def capped(logits: torch.Tensor, bias: torch.Tensor | None, softcap: float) -> torch.Tensor:
    """Logits plus their part of the bias, soft-capped; `logits` is overwritten."""
    if bias is not None:
        logits += bias.to(logits.dtype)
    if softcap > 0:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def cap_slope(logits: torch.Tensor, softcap: float) -> torch.Tensor | float:
    """d capped / d raw logit, from the capped logits."""
    return 1 - (logits / softcap) ** 2 if softcap > 0 else 1.0


class OnlineSum:
    """logsumexp of chunks of logits [rows, c] that come one after another."""

    def __init__(self, rows: int, like: torch.Tensor):
        self.peak = torch.full((rows,), -torch.inf, dtype=accumulation_dtype(like), device=like.device)
        self.sum = torch.zeros_like(self.peak)

    def add(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """exp(logits - peak) [rows, c], and the factor [rows] by which earlier sums must be multiplied."""
        peak = torch.maximum(self.peak, logits.amax(dim=1))
        floor = torch.where(peak == -torch.inf, 0.0, peak)  # only -inf so far: exp(-inf - 0) is 0, not NaN
        fade, weights = torch.exp(self.peak - floor), torch.exp(logits - floor[:, None])
        self.sum = self.sum * fade + weights.sum(dim=1)
        self.peak = peak
        return weights, fade

    def log(self) -> torch.Tensor:
        """The logsumexp [rows] of all logits added so far."""
        return self.peak + self.sum.log()

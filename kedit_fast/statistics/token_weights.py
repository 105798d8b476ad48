"""Weights of tokens in a second moment: sum w k k^T / sum w."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from kedit_fast.errors import StatisticsError

TokenWeights = Callable[[list[int]], Sequence[float]]
"""From a document's token ids to as many weights, finite and not negative."""
PROBE = 64  # token ids 0 to 63, by whose weights a function is recognized


def describe(weights: TokenWeights | None) -> str:
    """The function's name with a hash of what it gives for the ids 0 to 63; "" for None."""
    if weights is None:
        return ""
    probe = [float(weight) for weight in weights(list(range(PROBE)))]
    name = getattr(weights, "__qualname__", type(weights).__qualname__)
    return f"{name} {hashlib.sha256(repr(probe).encode()).hexdigest()[:16]}"


def weights_of(weights: TokenWeights, ids: Sequence[int]) -> torch.Tensor:
    """The weights [T] of a document's tokens, fp64; raises StatisticsError where there are not as many valid ones."""
    values = torch.as_tensor(weights(list(ids)), dtype=torch.float64)
    if values.shape != (len(ids),) or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise StatisticsError(
            f"token_weights must give {len(ids)} finite weights, not negative, for as many tokens; got {values}"
        )
    return values

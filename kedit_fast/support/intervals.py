"""How sure a mean is: intervals that hold the true value in 95 % of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Z = 1.959963984540054
"""Of the normal distribution, 2.5 % lies beyond it on each side."""
DRAWS = 1000
_LARGEST = 8_000_000  # numbers of a table of draws in memory


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        successes: in [0, n].
        n: how many were tried, at least 1.

    Example:
        >>> low, high = wilson(8, 10)
        >>> round(low, 3), round(high, 3)
        (0.49, 0.943)
    """
    share = successes / n
    center = share + Z * Z / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    low = (center - half) / scale if successes > 0 else 0.0
    high = (center + half) / scale if successes < n else 1.0
    return low, high


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """The percentile interval of a mean: of `draws` samples of the records, drawn with replacement.

    Args:
        values: of each record, at least one.
        weights: how much each counts in the mean, at least 0 and not all 0; None: all alike.
        seed: of the draws; the same values and seed give the same interval.
        draws: how many samples.

    Cost: `draws` times the number of values.
    """
    value = torch.tensor(values, dtype=torch.float64)
    weight = torch.ones_like(value) if weights is None else torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = []
    size = max(1, _LARGEST // len(value))
    for begin in range(0, draws, size):
        shape = (min(size, draws - begin), len(value))
        drawn = torch.randint(len(value), shape, generator=generator)
        total = weight[drawn].sum(1)
        means.append(((value * weight)[drawn].sum(1) / total)[total > 0])  # a sample may have drawn no weight at all
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def bootstrap_columns(values: torch.Tensor, seed: int = 0, draws: int = DRAWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Percentile intervals of the means of columns: `draws` samples of the rows, the same ones for all columns.

    Args:
        values: [n, ...] of each of n records, at least one; NaN where a record has no value there.
        seed: of the draws; the same values and seed give the same intervals.
        draws: how many samples.

    Returns:
        low and high, [...] float64; NaN where no record has a value.

    Cost: a product of [draws, n] with [n, columns].
    """
    flat = values.detach().cpu().double().reshape(len(values), -1)
    present = ~flat.isnan()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(flat), (draws, len(flat)), generator=generator)
    times = torch.zeros(draws, len(flat), dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))  # how often a sample has a record
    means = (times @ flat.where(present, 0.0)) / (times @ present.double())  # NaN where a sample has no value
    ends = means.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    low, high = (end.unflatten(0, values.shape[1:]) if values.ndim > 1 else end[0] for end in ends)
    return low, high

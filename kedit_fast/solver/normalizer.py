"""UltraEdit's running normalizer: the mean and spread of keys and gradients over all turns so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kedit_fast.errors import InvalidArgumentError, SolveError, StatisticsError
from kedit_fast.solver.least_squares import solve_update
from kedit_fast.solver.low_rank import LowRankUpdate
from kedit_fast.solver.preconditioner import Identity, require_finite
from kedit_fast.support.torch_state import plain_torch


@dataclass(frozen=True)
class Normalizer:
    """Mean and sum of squared deviations of features over rows; `updated` returns a new one."""

    count: int
    """Number of rows."""
    mean: torch.Tensor
    """[f] fp64."""
    squares: torch.Tensor
    """[f] fp64, the published `var`: divided by count - 1 it is the variance."""

    @classmethod
    @plain_torch()
    def empty(cls, features: int, device: torch.device | str = "cpu") -> Normalizer:
        """The state before any row."""
        zero = torch.zeros(features, dtype=torch.float64, device=device)
        return cls(0, zero, zero)

    @plain_torch()
    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as tensors on the CPU."""
        return {
            "count": torch.tensor(self.count),
            "mean": self.mean.cpu().clone(),
            "squares": self.squares.cpu().clone(),
        }

    @classmethod
    @plain_torch()
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], features: int, where: str) -> Normalizer:
        """From the result of `tensors`; raises StatisticsError, naming `where`, when it is damaged."""
        count, mean, squares = (tensors.get(name) for name in ("count", "mean", "squares"))
        if count is None or mean is None or squares is None or int(count) < 2:
            raise StatisticsError(f"{where} is damaged: a part of the normalizer is missing")
        for tensor in (mean, squares):
            if tensor.dtype != torch.float64 or tuple(tensor.shape) != (features,):
                raise StatisticsError(f"{where} is damaged: {tensor.dtype} {list(tensor.shape)}, not [{features}]")
        if not bool(torch.isfinite(mean).all() and torch.isfinite(squares).all() and (squares >= 0).all()):
            raise StatisticsError(f"{where} is damaged: values that are not finite or negative squares")
        return cls(int(count), mean, squares)

    @plain_torch()
    def updated(self, rows: torch.Tensor) -> Normalizer:
        """With rows [n, f] added by the published rule: n times their own variance, and the shift of the mean."""
        n = rows.shape[0]
        if rows.ndim != 2 or rows.shape[1] != self.mean.shape[0]:
            raise InvalidArgumentError(f"rows must be [n, {self.mean.shape[0]}]; got {list(rows.shape)}")
        if n == 0:
            return self
        require_finite("keys and gradients", rows)
        wide = rows.double()
        if n + self.count < 2:
            raise SolveError("the normalizer needs more than one token in its first batch: give it more requests")
        total, shift = self.count + n, wide.mean(0) - self.mean
        variance = wide.var(0) if n > 1 else torch.zeros_like(shift)
        squares = self.squares + n * variance + self.count * n * shift**2 / total
        return Normalizer(total, self.mean + n * shift / total, squares)

    @plain_torch()
    def normalized(self, rows: torch.Tensor) -> torch.Tensor:
        """(x - mean) / deviation [n, f], fp64; 0 for a feature that never changed."""
        deviation = (self.squares / max(1, self.count - 1)).sqrt()
        return torch.where(deviation > 0, (rows.double() - self.mean) / deviation, 0.0)


@plain_torch()
def gradient_update(keys: torch.Tensor, gradients: torch.Tensor, normalizer: Normalizer, lr: float) -> LowRankUpdate:
    """UltraEdit's update of one linear layer: Delta^T = (H^T H + I)^-1 H^T V, by the n x n dual system.

    V = -lr |h|^2 g row by row, with h and g the normalized key and gradient; H holds the keys without normalization.

    Args:
        keys: H [n, d], the layer's inputs, one row per token.
        gradients: [n, out] of the loss with respect to the layer's outputs there.
        normalizer: over [keys, gradients], with these rows in it.
        lr: of the published files (1e-6).

    Returns:
        LowRankUpdate, fp64.

    Cost: n^2 d + n^3 / 3 + 2 n^2 d flops (d n^2 + d^3 / 3 + 2 d^2 out as published).
    Source: UltraEdit (arXiv 2505.14679), its released `editor/ultraedit.py`.
    """
    both = normalizer.normalized(torch.cat([keys.double(), gradients.double()], 1))
    h, g = both[:, : keys.shape[1]], both[:, keys.shape[1] :]
    values = -lr * h.square().sum(1, keepdim=True) * g
    return solve_update(keys.T, values.T, Identity(keys.shape[1], keys.device))

"""S^-1 of the one equation: what an update should leave alone. Each has `apply(keys)` = S^-1 K and `matrix()` = S."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kedit_fast.errors import InvalidArgumentError, SolveError, StatisticsError


@dataclass(frozen=True)
class Identity:
    """S = I: every direction of the keys costs the same (ROME with `mom2_adjustment: false`)."""

    size: int

    def apply(self, keys: torch.Tensor) -> torch.Tensor:
        """S^-1 K = K, [d, u]."""
        return keys

    def matrix(self) -> torch.Tensor:
        """S, [d, d]."""
        return torch.eye(self.size, dtype=torch.float64)


@dataclass(frozen=True)
class Covariance:
    """S = C = E[k k^T], kept with its fp64 Cholesky factor: one factorisation serves every batch."""

    moment: torch.Tensor  # [d, d] fp64
    factor: torch.Tensor  # [d, d] fp64 lower Cholesky factor of the moment

    @classmethod
    def from_moment(cls, moment: torch.Tensor, ridge: float = 0.0) -> Covariance:
        """Factor C + ridge * mean(diag C) * I.

        Args:
            moment: [d, d] symmetric.
            ridge: relative to the mean diagonal; 0 factors C itself.

        Raises:
            StatisticsError: C is not finite or not positive definite.

        Cost: d^3 / 3 flops in fp64.
        """
        if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
            raise InvalidArgumentError(f"moment must be [d, d]; got {list(moment.shape)}")
        moment = moment.double()
        if ridge:
            moment = moment + ridge * moment.diagonal().mean() * torch.eye(
                moment.shape[0], dtype=moment.dtype, device=moment.device
            )
        factor, info = torch.linalg.cholesky_ex(moment)
        if not bool(torch.isfinite(moment).all()):
            raise StatisticsError("the second moment has values that are not finite")
        if int(info):
            raise StatisticsError(
                f"the second moment is not positive definite (leading minor {int(info)} of {moment.shape[0]}): "
                "collect it over more tokens, or set mom2_ridge (for example 1e-6)"
            )
        return cls(moment, factor)

    def apply(self, keys: torch.Tensor) -> torch.Tensor:
        """C^-1 K, [d, u], by two triangular solves (2 d^2 u flops)."""
        return torch.cholesky_solve(keys.to(self.factor), self.factor)

    def matrix(self) -> torch.Tensor:
        """C (with its ridge), [d, d]."""
        return self.moment


Preconditioner = Identity | Covariance


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise SolveError when a tensor holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise SolveError(f"{name} has values that are not finite")

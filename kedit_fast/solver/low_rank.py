"""Updates kept as factors: Delta = left right^T."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.ops import rank_k_update_


@dataclass(frozen=True)
class LowRankUpdate:
    """Delta [out, in] = left [out, k] right [in, k]^T."""

    left: torch.Tensor
    right: torch.Tensor

    def __post_init__(self):
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[1]:
            raise InvalidArgumentError(
                f"left must be [out, k] and right [in, k]; got {list(self.left.shape)} and {list(self.right.shape)}"
            )

    @property
    def rank(self) -> int:
        """k, an upper bound of the rank of Delta."""
        return self.left.shape[1]

    def dense(self) -> torch.Tensor:
        """Delta as a matrix [out, in]."""
        return self.left @ self.right.T

    def norm(self) -> float:
        """|Delta| (Frobenius), from the factors: sqrt(sum((left^T left) * (right^T right)))."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt())

    def is_finite(self) -> bool:
        """Whether every number in the factors is finite."""
        return bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all())

    def to(self, dtype: torch.dtype) -> LowRankUpdate:
        """The factors in another dtype."""
        return LowRankUpdate(self.left.to(dtype), self.right.to(dtype))

    def compacted(self) -> LowRankUpdate:
        """Factors no larger than Delta: where k > out in / (out + in) one factor becomes Delta, the other I."""
        out, inner = self.left.shape[0], self.right.shape[0]
        if self.rank * (out + inner) <= out * inner:
            return self
        if inner <= out:
            return LowRankUpdate(self.dense(), torch.eye(inner, dtype=self.left.dtype, device=self.left.device))
        return LowRankUpdate(
            torch.eye(out, dtype=self.left.dtype, device=self.left.device), self.dense().T.contiguous()
        )

    def apply_(self, weight: torch.Tensor, alpha: float = 1.0, *, backend: str | None = None) -> torch.Tensor:
        """Add alpha Delta to `weight` [out, in] in place (see `rank_k_update_`)."""
        return rank_k_update_(weight, self.left, self.right, alpha, backend=backend)

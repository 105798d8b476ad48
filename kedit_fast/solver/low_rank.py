"""Updates: as factors, Delta = left right^T, or a masked part of that; or as the matrix Delta itself.

Those of a layer's experts are `ExpertUpdate`, or a `DenseUpdate` of [E, out, m].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import get_args

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.ops import rank_k_update_
from kedit_fast.solver.expert_update import ExpertUpdate
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.torch_state import plain_torch

_ROWS = 1024  # of a matrix that are in fp64 at once


@dataclass(frozen=True)
class _Factors:
    left: torch.Tensor
    """[out, k]."""
    right: torch.Tensor
    """[in, k]."""

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[1]:
            raise InvalidArgumentError(
                f"left must be [out, k] and right [in, k]; got {list(self.left.shape)} and {list(self.right.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """k, an upper bound of the rank of left right^T; a masked product may have a higher rank."""
        return self.left.shape[1]

    def is_finite(self) -> bool:
        """Whether all entries of the factors are finite."""
        return bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all())


@dataclass(frozen=True)
class LowRankUpdate(_Factors):
    """Delta [out, in] = left [out, k] right [in, k]^T.

    Example:
        >>> update = LowRankUpdate(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [0.0], [4.0]]))
        >>> update.dense()
        tensor([[3., 0., 4.],
                [6., 0., 8.]])
        >>> round(update.norm() ** 2)
        125
        >>> update.apply_(torch.zeros(2, 3), alpha=-1.0)
        tensor([[-3.,  0., -4.],
                [-6.,  0., -8.]])
    """

    @classmethod
    @plain_torch()
    def of_matrix(cls, delta: torch.Tensor) -> LowRankUpdate:
        """Delta [out, in] as the smaller one of the pairs Delta I and I Delta."""
        out, inner = delta.shape
        eye = torch.eye(min(out, inner), dtype=delta.dtype, device=delta.device)
        return cls(delta, eye) if inner <= out else cls(eye, delta.T.contiguous())

    @plain_torch()
    def dense(self) -> torch.Tensor:
        """Delta as a matrix [out, in]."""
        return self.left @ self.right.T

    @plain_torch()
    def norm(self) -> float:
        """|Delta| (Frobenius), fp64: sqrt(sum((left^T left) * (right^T right))), or by rows of Delta.

        Cost: 2 k^2 (out + in) flops or 2 k out in, whichever is less; k^2 numbers, or 1024 rows of Delta.
        """
        (out, inner), k = self.shape, self.rank
        left, right = self.left.double(), self.right.double()
        if k * (out + inner) <= out * inner:
            return float(((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt())
        rows = [(part @ right.T).square().sum() for part in left.split(_ROWS)]
        return float(torch.stack(rows).sum().sqrt())

    def to(self, dtype: torch.dtype) -> LowRankUpdate:
        """The factors in another dtype."""
        return LowRankUpdate(self.left.to(dtype), self.right.to(dtype))

    def cpu(self) -> LowRankUpdate:
        """The factors on the host."""
        return LowRankUpdate(self.left.cpu(), self.right.cpu())

    def columns_of(self, part: slice) -> LowRankUpdate:
        """The same of some columns of Delta alone."""
        return LowRankUpdate(self.left, self.right[part])

    def compacted(self) -> LowRankUpdate:
        """Factors no larger than Delta: where k > out in / (out + in), one factor becomes Delta and the other I."""
        out, inner = self.left.shape[0], self.right.shape[0]
        if self.rank * (out + inner) <= out * inner:
            return self
        return LowRankUpdate.of_matrix(self.dense())

    def apply_(
        self,
        weight: torch.Tensor,
        alpha: float = 1.0,
        *,
        copy: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Add alpha Delta to `weight` [out, in] in place (see `rank_k_update_`)."""
        return rank_k_update_(weight, self.left, self.right, alpha, copy, backend=backend)


@dataclass(frozen=True)
class MaskedUpdate(_Factors):
    """Delta = mask * (left right^T): an update of which only some entries are written (RECT)."""

    bits: torch.Tensor
    """[out, ceil(in / 8)] uint8: the mask, eight entries of a row per byte, the first one in the lowest bit."""

    @classmethod
    @plain_torch()
    def from_mask(cls, update: LowRankUpdate, mask: torch.Tensor) -> MaskedUpdate:
        """The update whose entries are written where `mask` [out, in] is true."""
        shape = update.shape
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise InvalidArgumentError(f"mask must be bool {list(shape)}; got {mask.dtype} {list(mask.shape)}")
        padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -shape[1] % 8)).unflatten(1, (-1, 8))
        places = torch.arange(8, dtype=torch.uint8, device=mask.device)
        return cls(update.left, update.right, (padded << places).sum(2, dtype=torch.uint8))

    @property
    def mask(self) -> torch.Tensor:
        """[out, in] bool."""
        places = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        return ((self.bits[:, :, None] >> places) & 1).flatten(1)[:, : self.right.shape[0]].bool()

    @plain_torch()
    def dense(self) -> torch.Tensor:
        """Delta as a matrix [out, in]."""
        return (self.left @ self.right.T).mul_(self.mask)

    @plain_torch()
    def norm(self) -> float:
        """|Delta| (Frobenius)."""
        return float(self.dense().double().norm())

    def to(self, dtype: torch.dtype) -> MaskedUpdate:
        """The factors in another dtype."""
        return MaskedUpdate(self.left.to(dtype), self.right.to(dtype), self.bits)

    def cpu(self) -> MaskedUpdate:
        """The factors and the mask on the host."""
        return MaskedUpdate(self.left.cpu(), self.right.cpu(), self.bits.cpu())

    def columns_of(self, part: slice) -> MaskedUpdate:
        """The same of some columns of Delta alone."""
        return MaskedUpdate.from_mask(LowRankUpdate(self.left, self.right[part]), self.mask[:, part])

    def compacted(self) -> MaskedUpdate:
        """Itself: the mask belongs to these factors."""
        return self

    @plain_torch(leave_inference_mode=False)
    def apply_(
        self,
        weight: torch.Tensor,
        alpha: float = 1.0,
        *,
        copy: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Add alpha Delta to `weight` [out, in] in place; `copy` receives the rounded result."""
        wide = accumulation_dtype(weight)
        delta = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        rank_k_update_(delta, self.left, self.right, alpha, backend=backend).mul_(self.mask)
        weight.copy_(weight.to(wide).add_(delta))
        if copy is not None:
            copy.copy_(weight)
        return weight


@dataclass(frozen=True)
class DenseUpdate:
    """Delta as a matrix, or a matrix for each expert: the end of a tuning run, or a masked update of experts."""

    delta: torch.Tensor
    """[out, in], or [E, out, in] of experts."""

    def __post_init__(self) -> None:
        if self.delta.ndim not in (2, 3):
            raise InvalidArgumentError(f"delta must be [out, in] or [E, out, in]; got {list(self.delta.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (E, out, in)."""
        return tuple(self.delta.shape)

    @property
    def rank(self) -> int:
        """min(out, in), an upper bound of the rank of Delta; min(out, E in), that of experts' stacked matrix."""
        *experts, out, inner = self.delta.shape
        return min(out, inner * math.prod(experts))

    def is_finite(self) -> bool:
        """Whether all entries are finite."""
        return bool(torch.isfinite(self.delta).all())

    def dense(self) -> torch.Tensor:
        """Delta as a matrix [out, in], or [E, out, in]."""
        return self.delta

    @plain_torch()
    def norm(self) -> float:
        """|Delta| (Frobenius), summed in fp64 row by row."""
        rows = torch.stack([part.double().square().sum() for part in self.delta.flatten(0, -2).split(_ROWS)])
        return float(rows.sum().sqrt())

    def to(self, dtype: torch.dtype) -> DenseUpdate:
        """The matrix in another dtype."""
        return DenseUpdate(self.delta.to(dtype))

    def cpu(self) -> DenseUpdate:
        """The matrix on the host."""
        return DenseUpdate(self.delta.cpu())

    def columns_of(self, part: slice) -> DenseUpdate:
        """Some columns of Delta alone."""
        return DenseUpdate(self.delta[..., part])

    def compacted(self) -> DenseUpdate:
        """Itself: there are no factors."""
        return self

    @plain_torch(leave_inference_mode=False)
    def apply_(
        self,
        weight: torch.Tensor,
        alpha: float = 1.0,
        *,
        copy: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Add alpha Delta to `weight` [out, in] or [E, out, in] in place, in fp32 (fp64 of fp64 weights), rounded once.

        `copy` receives the rounded result. There is one implementation, torch's, whatever `backend` says.
        """
        if self.delta.shape != weight.shape:
            raise InvalidArgumentError(f"delta is {list(self.delta.shape)}, the weight {list(weight.shape)}")
        wide = accumulation_dtype(weight)
        if weight.dtype == wide:
            weight.add_(self.delta.to(wide), alpha=alpha)
        else:
            weight.copy_(weight.to(wide).add_(self.delta, alpha=alpha))
        if copy is not None:
            copy.copy_(weight)
        return weight


Update = LowRankUpdate | MaskedUpdate | DenseUpdate | ExpertUpdate
"""What is added to a matrix, or to the matrices of a layer's experts."""


def update_of(tensors: Mapping[str, torch.Tensor]) -> Update:
    """The update whose fields are these tensors: what `vars(update)` gave.

    Raises:
        ValueError: no kind of update has these fields.
    """
    for kind in get_args(Update):
        if {one.name for one in fields(kind)} == set(tensors):
            return kind(**tensors)
    raise ValueError(f"no update has the parts {sorted(tensors)}")


@plain_torch()
def total_of(updates: Sequence[Update]) -> Update:
    """The sum of updates of one matrix: factors side by side, or the sum as a matrix where one has a mask or is dense.

    Args:
        updates: at least one, on one device, of one shape.
    """
    if len(updates) == 1:
        return updates[0]
    factors = [update for update in updates if isinstance(update, LowRankUpdate)]
    if len(factors) == len(updates):
        return LowRankUpdate(torch.cat([u.left for u in factors], 1), torch.cat([u.right for u in factors], 1))
    by_expert = [update for update in updates if isinstance(update, ExpertUpdate)]
    if len(by_expert) == len(updates):
        return ExpertUpdate.joined(by_expert)
    return DenseUpdate(functools.reduce(torch.add, (update.dense() for update in updates)))

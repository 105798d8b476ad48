"""Updates of the stacked matrix of a layer's experts, by expert.

The E experts of a layer are one matrix [W_1 ... W_E] [out, E m] whose key [g_1 a_1; ...; g_E a_E] is zero where an
expert was not chosen. So has the right factor of an update, S^-1 K with S block diagonal. What is stored are the parts
that are not zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.ops import grouped_rank_k_update_
from kedit_fast.support.torch_state import plain_torch

if TYPE_CHECKING:
    from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate, MaskedUpdate, Update


@dataclass(frozen=True)
class ExpertUpdate:
    """Delta [E, out, m]: that of expert e is the sum over its rows i of left[:, columns[i]] right[i]^T.

    Example:
        >>> stacked = LowRankUpdate(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 5.0], [0.0, 0.0]]))
        >>> update = ExpertUpdate.of_stacked(stacked, experts=3)  # of one input each
        >>> update.dense().flatten(), update.columns, update.offsets
        (tensor([ 3., 10.,  0.]), tensor([0, 1]), tensor([0, 1, 2, 2]))
        >>> update.apply_(torch.zeros(3, 1, 1), alpha=-1.0).flatten()
        tensor([ -3., -10.,   0.])
    """

    left: torch.Tensor
    """[out, u], the same for all experts."""
    right: torch.Tensor
    """[n, m] rows by expert: the part of an expert in one column of the stacked right factor [E m, u]."""
    columns: torch.Tensor
    """[n] int64: which of the u columns each row is of, ascending within an expert."""
    offsets: torch.Tensor
    """[E + 1] int64: the rows of expert e are offsets[e] to offsets[e + 1]."""

    def __post_init__(self) -> None:
        shapes = {name: list(tensor.shape) for name, tensor in vars(self).items()}
        fit = self.left.ndim == 2 and self.right.ndim == 2 and self.columns.shape == self.right.shape[:1]
        if not fit or self.offsets.ndim != 1 or len(self.offsets) < 2:
            raise InvalidArgumentError(
                f"left must be [out, u], right [n, m], columns [n] and offsets [E + 1]; got {shapes}"
            )
        for name in ("columns", "offsets"):
            if getattr(self, name).dtype != torch.int64:
                raise InvalidArgumentError(f"{name} must be int64; got {getattr(self, name).dtype}")
        bounds = self.offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != len(self.right) or sorted(bounds) != bounds:
            raise InvalidArgumentError(f"offsets must ascend from 0 to {len(self.right)} rows; got {bounds}")
        place = self.experts * self.left.shape[1] + self.columns
        inside = (self.columns >= 0) & (self.columns < self.left.shape[1])
        if not bool(inside.all()) or not bool((place.diff() > 0).all()):
            raise InvalidArgumentError(
                f"columns must ascend within each expert, and be of the {self.left.shape[1]} columns of left"
            )

    @classmethod
    @plain_torch()
    def of_stacked(cls, update: LowRankUpdate, experts: int) -> ExpertUpdate:
        """An update [out, E m] of the stacked matrix, without the parts of its right factor that are zero.

        Raises:
            InvalidArgumentError: its inputs cannot be divided among so many experts.
        """
        inputs, u = update.right.shape
        if experts < 1 or inputs % experts:
            raise InvalidArgumentError(f"{inputs} inputs cannot be divided among {experts} experts")
        rows = update.right.view(experts, inputs // experts, u).transpose(1, 2)  # [E, u, m]
        present = (rows != 0).any(2)  # NaN is not 0
        offsets = torch.zeros(experts + 1, dtype=torch.int64, device=rows.device)
        offsets[1:] = present.sum(1).cumsum(0)
        return cls(update.left, rows[present], present.nonzero()[:, 1], offsets)

    @classmethod
    @plain_torch()
    def joined(cls, updates: Sequence[ExpertUpdate]) -> ExpertUpdate:
        """The sum of updates of the same experts, at least one: their columns side by side."""
        experts = torch.cat([update.experts for update in updates])
        widths = itertools.accumulate((update.rank for update in updates), initial=0)
        columns = torch.cat([update.columns + before for update, before in zip(updates, widths, strict=False)])
        order = torch.argsort(experts, stable=True)
        offsets = torch.stack([update.offsets for update in updates]).sum(0)
        right = torch.cat([update.right for update in updates])
        return cls(torch.cat([update.left for update in updates], 1), right[order], columns[order], offsets)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, m)."""
        return len(self.offsets) - 1, self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """u, an upper bound of the rank of the stacked matrix, and of each expert's."""
        return self.left.shape[1]

    @property
    def experts(self) -> torch.Tensor:
        """[n] int64: the expert of each row."""
        counts = self.offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def parts(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The number of each expert that changes, and its factors left [out, k] and right [m, k]."""
        for expert, (first, last) in enumerate(itertools.pairwise(self.offsets.tolist())):
            if last > first:
                yield expert, self.left[:, self.columns[first:last]], self.right[first:last].T

    @plain_torch()
    def stacked_right(self) -> torch.Tensor:
        """The right factor [E m, u] of the stacked matrix, with its zeros."""
        experts, _, inputs = self.shape
        rows = self.right.new_zeros(experts, self.rank, inputs)
        rows[self.experts, self.columns] = self.right
        return rows.transpose(1, 2).reshape(experts * inputs, self.rank)

    def is_finite(self) -> bool:
        """Whether all entries of the factors are finite."""
        return bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all())

    @plain_torch()
    def dense(self) -> torch.Tensor:
        """Delta as matrices [E, out, m]."""
        delta = self.left.new_zeros(self.shape)
        for expert, left, right in self.parts():
            torch.mm(left, right.T, out=delta[expert])
        return delta

    @plain_torch()
    def norm(self) -> float:
        """|Delta| (Frobenius) over all experts, from the factors."""
        left = self.left.double()
        products, total = left.T @ left, 0.0  # [u, u]
        for first, last in itertools.pairwise(self.offsets.tolist()):
            rows, columns = self.right[first:last].double(), self.columns[first:last]
            total += float((products[columns][:, columns] * (rows @ rows.T)).sum())
        return max(total, 0.0) ** 0.5

    def to(self, dtype: torch.dtype) -> ExpertUpdate:
        """The factors in another dtype."""
        return ExpertUpdate(self.left.to(dtype), self.right.to(dtype), self.columns, self.offsets)

    def cpu(self) -> ExpertUpdate:
        """The factors on the host."""
        return ExpertUpdate(self.left.cpu(), self.right.cpu(), self.columns.cpu(), self.offsets.cpu())

    def columns_of(self, part: slice) -> ExpertUpdate:
        """The same of some columns of each expert's Delta alone."""
        return ExpertUpdate(self.left, self.right[:, part], self.columns, self.offsets)

    def compacted(self) -> ExpertUpdate:
        """Itself: the experts share one left factor."""
        return self

    def apply_(
        self,
        weight: torch.Tensor,
        alpha: float = 1.0,
        *,
        copy: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Add alpha Delta to `weight` [E, out, m] in place; `copy` receives the rounded result.

        Raises:
            InvalidArgumentError: a weight of another shape, or what `grouped_rank_k_update_` refuses.
        """
        factors = (self.left, self.right, self.columns, self.offsets)
        return grouped_rank_k_update_(weight, *factors, alpha, copy, backend=backend)


@plain_torch()
def split_update(
    update: LowRankUpdate | MaskedUpdate, experts: int, inputs: int
) -> tuple[ExpertUpdate | DenseUpdate, LowRankUpdate | MaskedUpdate]:
    """The parts of an update of [W_1 ... W_E, W_s] [out, E m + m_s]: of the experts, and of shared ones.

    Args:
        update: of the whole stacked matrix.
        experts: E.
        inputs: m.
    """
    from kedit_fast.solver.low_rank import DenseUpdate, LowRankUpdate  # which imports this file

    ends = experts * inputs
    chosen, shared = update.columns_of(slice(0, ends)), update.columns_of(slice(ends, None))
    if isinstance(chosen, LowRankUpdate):
        return ExpertUpdate.of_stacked(chosen, experts), shared
    return DenseUpdate(by_expert(chosen.dense(), experts)), shared


@plain_torch()
def joined_update(chosen: Update, shared: Update) -> LowRankUpdate:
    """The update of [W_1 ... W_E, W_s] whose parts are of experts and of shared ones: the inverse of `split_update`."""
    from kedit_fast.solver.low_rank import LowRankUpdate  # which imports this file

    assert isinstance(chosen, ExpertUpdate) and isinstance(shared, LowRankUpdate)
    right = torch.block_diag(chosen.stacked_right(), shared.right)
    return LowRankUpdate(torch.cat([chosen.left, shared.left], 1), right)


def stacked_matrix(weight: torch.Tensor) -> torch.Tensor:
    """[W_1 ... W_E] [out, E m] of experts' matrices [E, out, m], in memory of its own."""
    return weight.transpose(0, 1).flatten(1)


def by_expert(matrix: torch.Tensor, experts: int) -> torch.Tensor:
    """The experts' matrices [E, out, m] of a stacked one [out, E m]: the inverse of `stacked_matrix`."""
    return matrix.unflatten(1, (experts, -1)).transpose(0, 1).contiguous()

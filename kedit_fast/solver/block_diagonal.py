"""S^-1 of stacked keys: block diagonal, a block for each expert of a layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kedit_fast.errors import InvalidArgumentError, NullSpaceError, StatisticsError
from kedit_fast.solver.preconditioner import (
    Covariance,
    NullSpace,
    NullSpaceRule,
    Preconditioner,
    eigenvectors,
    null_dimension,
    require_finite_moment,
)
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
EXPERT_RIDGE = 1e-4
"""Ridge of the experts' second moments, as a share of their mean diagonal: of experts that no text has chosen."""
EXPERT_RULES: tuple[NullSpaceRule, ...] = ("relative", "energy")
"""Rules of a null space for each expert. An absolute bound would depend on how often an expert is chosen."""


@dataclass(frozen=True)
class BlockDiagonal(Preconditioner):
    """S^-1 of several preconditioners, each of its own part of the keys: those of the experts e for stacked keys.

    A block is applied to the columns alone that are not zero in it.

    Example:
        >>> space = BlockDiagonal([Identity(2), Identity(1, weight=4.0)])
        >>> space.apply(torch.ones(3, 1)).T
        tensor([[1.0000, 1.0000, 0.2500]], dtype=torch.float64)
    """

    blocks: Sequence[Preconditioner]
    """At least one, on one device."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise InvalidArgumentError("a block-diagonal preconditioner needs at least one block")

    @property
    def size(self) -> int:
        """d, the sum of the blocks' sizes."""
        return sum(block.size for block in self.blocks)

    @property
    def device(self) -> torch.device:
        """Of the blocks."""
        return self.blocks[0].device

    @plain_torch()
    def whiten(self, keys: torch.Tensor) -> torch.Tensor:
        """T K, block by block."""
        return self._by_block(keys, lambda block, rows: block.whiten(rows))

    @plain_torch()
    def unwhiten(self, coordinates: torch.Tensor) -> torch.Tensor:
        """T^T H, block by block."""
        return self._by_block(coordinates, lambda block, rows: block.unwhiten(rows))

    def _by_block(
        self, matrix: torch.Tensor, step: Callable[[Preconditioner, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """A step of every block on its rows of a matrix [d, u]; where a column of these is zero, so is its result."""
        if matrix.ndim != 2 or matrix.shape[0] != self.size:
            raise InvalidArgumentError(f"keys must be [{self.size}, u]; got {list(matrix.shape)}")
        out = torch.zeros(matrix.shape, dtype=torch.float64, device=self.device)
        first = 0
        for block in self.blocks:
            last = first + block.size
            rows = matrix[first:last].to(self.device)
            present = (rows != 0).any(0).nonzero()[:, 0]  # NaN is not 0
            if len(present) == matrix.shape[1]:
                out[first:last] = step(block, rows)
            elif len(present):
                out[first:last, present] = step(block, rows[:, present])
            first = last
        return out

    @property
    def null_dimensions(self) -> tuple[int, ...]:
        """Dimension of the null space of each block that has one."""
        return tuple(block.dimension for block in self.blocks if isinstance(block, NullSpace))

    @property
    def geometric_mean(self) -> float:
        """The geometric mean of the eigenvalues of S, of blocks that are `Covariance`."""
        factors = [block for block in self.blocks if isinstance(block, Covariance)]
        assert len(factors) == len(self.blocks)
        return math.exp(sum(math.log(block.geometric_mean) * block.size for block in factors) / self.size)

    def describe(self) -> dict[str, Any]:
        """Its kind, the number of its blocks and their different parameters."""
        each = [block.describe() for block in self.blocks]
        different = [one for place, one in enumerate(each) if one not in each[:place]]
        return {"kind": "block diagonal", "size": self.size, "count": len(each), "blocks": different}

    @property
    def nbytes(self) -> int:
        """Of the blocks."""
        return sum(block.nbytes for block in self.blocks)


@plain_torch()
def expert_covariances(
    moment: torch.Tensor,
    ridge: float = EXPERT_RIDGE,
    *,
    weight: float = 1.0,
    norm_lambda: float = 0.0,
    dtype: torch.dtype = torch.float64,
    shared: torch.Tensor | None = None,
) -> BlockDiagonal:
    """S of stacked keys with the blocks S_e = weight (C_e + ridge c I) + norm_lambda I.

    c is the mean diagonal over all blocks, so that the block of an expert that no text has chosen, C_e = 0, is the
    cheapest to change, and still finite.

    Args:
        moment: C [E, m, m], C_e the mean of g_e^2 a_e a_e^T over all tokens; lower triangles are read.
        ridge: relative to the mean diagonal over all blocks; positive where an expert was never chosen.
        weight: lambda, `mom2_update_weight`.
        norm_lambda: ENCORE's lambda_n; absolute.
        dtype: of the factors, see `Covariance.from_moment`.
        shared: C_s [m_s, m_s] of shared experts, which are the last block; it counts in c. None without.

    Raises:
        InvalidArgumentError: a moment of another shape, or arguments that `Covariance.from_moment` refuses.
        StatisticsError: not finite, or a block that is not positive definite; naming the expert.

    Cost: E m^3 / 3 flops in fp64; 8 E m^2 bytes (float32: 4 E m^2).
    """
    _check_moments(moment, shared)
    if ridge < 0:
        raise InvalidArgumentError(f"ridge must not be negative; got {ridge}")
    parts = _named_blocks(moment, shared)
    add = ridge * float(torch.cat([block.diagonal().double() for _, block in parts]).mean())
    blocks = []
    for name, block in parts:
        system = block.double()
        if add:
            system = system.clone() if system is block else system
            system.diagonal().add_(add)
        try:
            factored = Covariance.from_moment(system, weight=weight, norm_lambda=norm_lambda, dtype=dtype)
        except StatisticsError as error:
            raise type(error)(f"{name}: {error}") from None
        blocks.append(replace(factored, ridge=ridge))
    return BlockDiagonal(tuple(blocks))


@plain_torch()
def expert_null_spaces(
    moment: torch.Tensor,
    threshold: float,
    rule: NullSpaceRule = "relative",
    l2: float = 10.0,
    *,
    shared: torch.Tensor | None = None,
) -> BlockDiagonal:
    """S^-1 of stacked keys with the blocks P_e / L2, P_e the projection on the null space of C_e.

    Each expert's eigenvalues are compared with those of the same expert. All of an expert is null space where no text
    has chosen it, and an expert of which nothing is below the threshold does not change.

    Args:
        moment: C [E, m, m], as for `expert_covariances`.
        threshold, rule, l2: as for `NullSpace.from_covariance`; the rule is "relative" or "energy".
        shared: C_s [m_s, m_s] of shared experts, which are the last block; None without.

    Raises:
        InvalidArgumentError: a moment of another shape, the rule "absolute", or numbers that are not positive.
        NullSpaceError: no expert has a null space, or everything is null space.
        StatisticsError: zero for all experts, not finite or not positive semi-definite.

    Cost: about 9 E m^3 flops in fp64.
    Source: AlphaEdit (arXiv 2410.02355); for each expert as in MoEEdit (ICLR 2026).
    """
    _check_moments(moment, shared)
    if rule not in EXPERT_RULES:
        raise InvalidArgumentError(
            f"the rule of the null spaces of experts must be relative or energy, as an absolute bound depends on how "
            f"often an expert is chosen; got {rule!r}"
        )
    if not threshold > 0 or not l2 > 0:
        raise InvalidArgumentError(f"threshold and l2 must be positive; got {threshold} and {l2}")
    experts, size, _ = moment.shape
    blocks = []
    for name, block in _named_blocks(moment, shared):
        if not bool(block.any()):
            blocks.append(NullSpace(block.new_empty(len(block), 0).double(), True, float(l2), float(threshold), rule))
            continue
        try:
            values, vectors = eigenvectors(block)
        except StatisticsError as error:
            raise type(error)(f"{name}: {error}") from None
        blocks.append(NullSpace.of_vectors(vectors, null_dimension(values, threshold, rule), l2, threshold, rule))
    dimensions = [block.dimension for block in blocks]
    total, chosen = sum(dimensions), int(moment.flatten(1).any(1).sum())
    if not chosen:
        raise StatisticsError("the second moment of every expert is zero: no text was counted")
    at_bound = f"threshold {threshold:g} ({rule})"
    if not any(dimensions):
        raise NullSpaceError(f"no null space: nothing of {experts} experts is below {at_bound}. Raise it")
    if total == sum(block.size for block in blocks):
        raise NullSpaceError(
            f"everything is null space: all {size} dimensions of {experts} experts are below {at_bound}, so nothing "
            "would be protected. Lower it"
        )
    _log.info(
        "null spaces of %d to %d of %d dimensions over %d experts, %d of them never chosen (%s)",
        min(dimensions), max(dimensions), size, experts, experts - chosen, at_bound,
    )  # fmt: skip
    return BlockDiagonal(tuple(blocks))


def _check_moments(moment: torch.Tensor, shared: torch.Tensor | None) -> None:
    if moment.ndim != 3 or moment.shape[1] != moment.shape[2] or not len(moment):
        raise InvalidArgumentError(f"moments of experts must be [E, m, m]; got {list(moment.shape)}")
    require_finite_moment(moment)
    if shared is not None:
        if shared.ndim != 2 or shared.shape[0] != shared.shape[1] or not len(shared):
            raise InvalidArgumentError(f"the moment of shared experts must be [m_s, m_s]; got {list(shared.shape)}")
        require_finite_moment(shared)


def _named_blocks(moment: torch.Tensor, shared: torch.Tensor | None) -> list[tuple[str, torch.Tensor]]:
    """What messages call each block, and its moment."""
    blocks = [(f"expert {number}", block) for number, block in enumerate(moment)]
    return blocks if shared is None else [*blocks, ("the shared experts", shared)]

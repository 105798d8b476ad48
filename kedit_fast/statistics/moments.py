"""Streaming second moments E[k k^T] with an fp64 master."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.ops import mirror_, symmetric_rank_k_update_
from kedit_fast.support import process_group
from kedit_fast.support.dtypes import accumulation_dtype, describe_tensor
from kedit_fast.support.torch_state import plain_torch


@dataclass(frozen=True)
class SecondMoment:
    """The un-centred second moment of one layer's inputs."""

    module: str  # path of the linear layer, for example model.layers.4.mlp.down_proj
    moment: torch.Tensor  # [d, d] (weighted) mean of k k^T, full symmetric, fp64 or fp32
    count: int  # tokens, of weighted ones those whose weight is not 0


class SecondMomentAccumulator:
    """Sums w k k^T over rows as they come; `result()` and `finish()` give the mean.

    Products are exact in fp32 for 16-bit rows, sums over a chunk of rows fp32, the master fp64.

    Args:
        module: path of the linear layer.
        size: d.
        device: where rows are.
        master: where the sum is kept; None for the rows' device. Elsewhere the products of one call are summed in one
            [d, d] matrix beside the rows, which is then added to the master.
    """

    @plain_torch()
    def __init__(
        self, module: str, size: int, device: torch.device | str = "cpu", master: torch.device | str | None = None
    ):
        self.module = module
        self.count = 0
        self.weight = 0.0  # the sum of the rows' weights
        self.device = torch.device(device)
        self.sum = torch.zeros(size, size, dtype=torch.float64, device=master or device)  # the lower triangle
        self._staged = torch.device(master or device) != self.device

    @plain_torch()
    def update(
        self,
        rows: torch.Tensor,
        mask: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        totals: tuple[int, float] | None = None,
    ) -> None:
        """Add rows [n, d].

        Args:
            rows: of the model's dtype.
            mask: [n] bool; rows where it is false do not count.
            weights: [n], not negative; None for ones.
            totals: how many rows count and the sum of their weights, where that is known: reading it from the tensors
                waits for the device.
        """
        if self._staged:
            dtype = accumulation_dtype(rows)
            part = torch.zeros(self.sum.shape, dtype=dtype, device=rows.device)
            symmetric_rank_k_update_(part, rows, weights, mask)
            self.sum.add_(part.to(self.sum.device))
        else:
            symmetric_rank_k_update_(self.sum, rows, weights, mask)
        count, weight = totals or _totals(rows.shape[0], mask, weights)
        self.count += count
        self.weight += weight

    @plain_torch()
    def result(self) -> SecondMoment:
        """The mean of what was added; raises StatisticsError when nothing was, or something not finite."""
        return self._mean(self.sum.clone())

    @plain_torch()
    def finish(self) -> SecondMoment:
        """As `result`, in the master's own memory: nothing can be added afterwards."""
        total, self.sum = self.sum, self.sum.new_empty(0, 0)
        return self._mean(total)

    def _mean(self, total: torch.Tensor) -> SecondMoment:
        if self.count == 0:
            raise StatisticsError(f"{self.module}: no tokens were counted")
        moment = mirror_(total).div_(self.weight)
        if not bool(torch.isfinite(moment.sum())):
            raise StatisticsError(f"{self.module}: the second moment is not finite (NaN or overflow in the model)")
        return SecondMoment(self.module, moment, self.count)

    @plain_torch()
    def reduce_(self) -> None:
        """Add up what all processes have; afterwards every one has the whole."""
        process_group.sum_(self.sum)
        totals = torch.tensor([float(self.count), self.weight], dtype=torch.float64)
        process_group.sum_(totals)
        self.count, self.weight = int(totals[0]), float(totals[1])


@plain_torch()
def second_moment(
    rows: torch.Tensor | Iterable[torch.Tensor],
    weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of w k k^T over rows: what a preconditioner is made from.

    Args:
        rows: [n, d] float32, float64, bfloat16 or float16; or such matrices one after another, of any n.
        weights: [n], not negative, of a single matrix; None for ones.
        mask: [n] bool, of a single matrix; rows where it is false do not count.

    Returns:
        [d, d] fp64, full symmetric, on the device of the rows.

    Raises:
        StatisticsError: no rows, or a mean that is not finite.
        InvalidArgumentError: a wrong shape or dtype.

    Cost: n d (d + 1) flops; sums of 16-bit and fp32 rows are fp32 within a chunk, fp64 between.
    """
    several = not isinstance(rows, torch.Tensor)
    if several and (weights is not None or mask is not None):
        raise InvalidArgumentError("weights and mask are of a single matrix of rows")
    total: SecondMomentAccumulator | None = None
    for part in rows if several else (rows,):
        if part.ndim != 2:
            raise InvalidArgumentError(f"rows must be [n, d]; got {describe_tensor(part)}")
        if total is None:
            total = SecondMomentAccumulator("rows", part.shape[1], part.device)
        total.update(part, mask, weights)
    if total is None:
        raise StatisticsError("no rows were given")
    return total.finish().moment


def _totals(n: int, mask: torch.Tensor | None, weights: torch.Tensor | None) -> tuple[int, float]:
    if weights is None:
        count = n if mask is None else int(mask.sum())
        return count, float(count)
    kept = weights if mask is None else weights[mask]
    return int((kept != 0).sum()), float(kept.double().sum())

"""Streaming second moments E[k k^T] with an fp64 master."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kedit_fast.errors import StatisticsError
from kedit_fast.ops import mirror_, symmetric_rank_k_update_


@dataclass(frozen=True)
class SecondMoment:
    """The un-centred second moment of one layer's inputs."""

    module: str  # path of the linear layer, for example model.layers.4.mlp.down_proj
    moment: torch.Tensor  # [d, d] mean of k k^T, full symmetric, fp64 or fp32
    count: int  # tokens


class SecondMomentAccumulator:
    """Sums k k^T over rows as they come; `result()` is the mean.

    Products are exact in fp32 for 16-bit rows, sums over a chunk of rows fp32, the master fp64 on the rows' device.
    """

    def __init__(self, module: str, size: int, device: torch.device | str = "cpu"):
        self.module = module
        self.count = 0
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)  # the lower triangle

    def update(self, rows: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add rows [n, d]; those whose mask [n] is false do not count."""
        symmetric_rank_k_update_(self._sum, rows, mask=mask)
        self.count += rows.shape[0] if mask is None else int(mask.sum())

    def result(self) -> SecondMoment:
        """The mean of what was added; raises StatisticsError when nothing was, or something not finite."""
        if self.count == 0:
            raise StatisticsError(f"{self.module}: no tokens were counted")
        moment = mirror_(self._sum.clone()) / self.count
        if not bool(torch.isfinite(moment).all()):
            raise StatisticsError(f"{self.module}: the second moment is not finite (NaN or overflow in the model)")
        return SecondMoment(self.module, moment, self.count)

"""Streaming second moments E[k k^T] and cross moments E[x y^T], summed in fp64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.ops import mirror_, symmetric_rank_k_update_
from kedit_fast.statistics.row_buffer import RowBuffer
from kedit_fast.support import process_group
from kedit_fast.support.dtypes import FLOATS, accumulation_dtype, describe_tensor
from kedit_fast.support.page_locked import HostStage
from kedit_fast.support.torch_state import plain_torch

CHUNK = 1024
"""Rows of a cross moment whose products are summed before their sum is added in fp64."""
Side = Literal["input", "output"]
"""Of a linear layer: its inputs, or the gradients of a loss at its outputs."""


@dataclass(frozen=True)
class SecondMoment:
    """The second moment of one layer's inputs k, or of gradients at its outputs, about zero."""

    module: str
    """Path of the linear layer, for example model.layers.4.mlp.down_proj."""
    moment: torch.Tensor
    """[d, d] (weighted) mean of k k^T, both triangles, fp64 or fp32. Of a layer with experts [E, m, m], the blocks on
    the diagonal of that of stacked keys: the mean over all tokens of g_e^2 a_e a_e^T."""
    count: int
    """Tokens that were counted; with weights, those whose weight is not 0."""
    tokens_by_expert: torch.Tensor | None = None
    """[E] int64, how many of the counted tokens chose each expert; None of a layer without experts."""
    shared: torch.Tensor | None = None
    """[m_s, m_s] the mean of s^2 a a^T of shared experts with a gate s, where these are in the stack; None without."""


class MomentSum:
    """A sum of w k k^T over rows: `result()` and `finish()` return the mean. What adds rows is up to its kinds.

    Rows may wait for others (`flush`); `count` and `weight` have them already, `sum` and `tokens_by_expert` have not.
    """

    @plain_torch()
    def __init__(
        self,
        module: str,
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        master: torch.device | str | None = None,
        stage: HostStage | None = None,
    ):
        self.module = module
        self.count = 0
        self.weight = 0.0  # sum of the tokens' weights
        self.tokens_by_expert: torch.Tensor | None = None
        self.shared: torch.Tensor | None = None  # the same sum over shared experts in the stack
        self.device = torch.device(device)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=master or device)  # lower triangles
        self._staged = torch.device(master or device) != self.device
        self._stage = stage or HostStage()

    def flush(self) -> None:
        """Add the rows that wait to the sum. On a GPU, on the stream of the updates."""

    @plain_torch()
    def result(self) -> SecondMoment:
        """The mean so far; raises StatisticsError when no row was added, or the mean is not finite."""
        self.flush()
        return self._mean(self.sum.clone(), None if self.shared is None else self.shared.clone())

    @plain_torch()
    def finish(self) -> SecondMoment:
        """As `result`, in the memory of the sum: nothing can be added afterwards."""
        self.flush()
        total, self.sum = self.sum, self.sum.new_empty(*(0 for _ in self.sum.shape))
        shared, self.shared = self.shared, None
        return self._mean(total, shared)

    def _mean(self, total: torch.Tensor, shared: torch.Tensor | None) -> SecondMoment:
        if self.count == 0:
            raise StatisticsError(f"{self.module}: no tokens were counted")
        for matrix in [*total.view(-1, *total.shape[-2:]), *([] if shared is None else [shared])]:
            mirror_(matrix)
        moment = total.div_(self.weight)
        if shared is not None:
            shared = shared.div_(self.weight)
        if not all(bool(torch.isfinite(part.sum())) for part in (moment, shared) if part is not None):
            raise StatisticsError(f"{self.module}: the second moment is not finite (NaN or overflow in the model)")
        by_expert = None if self.tokens_by_expert is None else self.tokens_by_expert.cpu().clone()
        return SecondMoment(self.module, moment, self.count, by_expert, shared)

    @plain_torch()
    def reduce_(self) -> None:
        """Add up the sums of all processes; afterwards every process has the total."""
        self.flush()
        process_group.sum_(self.sum)
        if self.shared is not None:
            process_group.sum_(self.shared)
        totals = torch.tensor([float(self.count), self.weight], dtype=torch.float64)
        process_group.sum_(totals)
        self.count, self.weight = int(totals[0]), float(totals[1])
        if self.tokens_by_expert is not None:
            process_group.sum_(self.tokens_by_expert)


class SecondMomentAccumulator(MomentSum):
    """Sums w k k^T over rows as they come; `result()` and `finish()` return the mean.

    Products of 16-bit rows are exact in fp32; sums are fp32 within a chunk of rows and fp64 between chunks.

    Args:
        module: path of the linear layer.
        size: d.
        device: of the rows.
        master: device of the sum, the rows' for None. Where it is another one, the products of one call are summed in a
            [d, d] matrix beside the rows, which is then added to the sum.
        update_rows: rows without a mask wait, in memory beside the sum, until there are so many (`flush` adds fewer); 0
            adds them at once.
        stage: buffers for the way to a sum on the host, which sums can share; None for its own.

    Example:
        >>> total = SecondMomentAccumulator("rows", 4, update_rows=100)
        >>> total.update(torch.ones(60, 4))
        >>> total.count, float(total.sum[0, 0])     # they wait
        (60, 0.0)
        >>> total.update(torch.ones(60, 4))         # 100 are added, 20 wait
        >>> float(total.sum[0, 0]), float(total.result().moment[0, 0])
        (100.0, 1.0)
    """

    def __init__(
        self,
        module: str,
        size: int,
        device: torch.device | str = "cpu",
        master: torch.device | str | None = None,
        update_rows: int = 0,
        stage: HostStage | None = None,
    ):
        super().__init__(module, (size, size), device, master, stage)
        self._waiting = RowBuffer(update_rows) if update_rows else None

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
            rows: in the model's dtype.
            mask: [n] bool; rows where it is false do not count.
            weights: [n], not negative; None for ones.
            totals: the number of rows that count and the sum of their weights, if the caller knows them: reading them
                from the tensors would wait for the device.
        """
        if self._waiting is None or mask is not None or not self._waiting.takes(rows, weights, self.sum.shape[0]):
            self._add(rows, weights, mask)
        else:
            for part, of_part in self._waiting.put(rows, weights):
                self._add(part, of_part)
        count, weight = totals or _totals(rows.shape[0], mask, weights)
        self.count += count
        self.weight += weight

    @plain_torch()
    def flush(self) -> None:
        """Add the rows that wait to the sum."""
        if self._waiting is not None:
            for rows, weights in self._waiting.take():
                self._add(rows, weights)

    def _add(self, rows: torch.Tensor, weights: torch.Tensor | None, mask: torch.Tensor | None = None) -> None:
        if self._staged:
            part = torch.zeros(self.sum.shape, dtype=accumulation_dtype(rows), device=rows.device)
            symmetric_rank_k_update_(part, rows, weights, mask)
            self._stage.add_lower_(self.sum, part)
        else:
            symmetric_rank_k_update_(self.sum, rows, weights, mask)


class CrossMomentAccumulator:
    """Sums w x y^T over pairs of rows as they come; `result()` returns the mean.

    Products and sums within a chunk of rows are fp32 (fp64 where either side has fp64 rows), sums between chunks fp64.

    Args:
        name: how messages call the rows.
        sizes: d and e.
        device: of the rows, and of the sum.
    """

    @plain_torch()
    def __init__(self, name: str, sizes: tuple[int, int], device: torch.device | str = "cpu"):
        self.name = name
        self.count = 0
        self.weight = 0.0  # sum of the rows' weights
        self.sum = torch.zeros(sizes, dtype=torch.float64, device=device)

    @plain_torch()
    def update(
        self,
        rows: torch.Tensor,
        others: torch.Tensor,
        mask: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add pairs of rows.

        Args:
            rows: x, [n, d].
            others: y, [n, e] on the same device.
            mask: [n] bool; pairs where it is false do not count, even if they hold NaN.
            weights: [n], not negative; None for ones. A pair whose weight is 0 does not count, either.

        Raises:
            InvalidArgumentError: a wrong shape, dtype or device.
        """
        self._check(rows, others, mask, weights)
        if weights is not None:
            mask = weights != 0 if mask is None else mask & (weights != 0)
        if mask is not None:
            rows, others = rows[mask], others[mask]
            weights = None if weights is None else weights[mask]
        dtype = torch.promote_types(accumulation_dtype(rows), accumulation_dtype(others))
        for begin in range(0, rows.shape[0], CHUNK):
            left, right = (part[begin : begin + CHUNK].to(dtype) for part in (rows, others))  # [chunk, d], [chunk, e]
            if weights is not None:
                right = right * weights[begin : begin + CHUNK, None].to(dtype)
            self.sum.add_(left.T @ right)
        self.count += rows.shape[0]
        self.weight += float(rows.shape[0]) if weights is None else float(weights.double().sum())

    def _check(
        self, rows: torch.Tensor, others: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor | None
    ) -> None:
        for side, size, part in (("rows", self.sum.shape[0], rows), ("others", self.sum.shape[1], others)):
            if part.ndim != 2 or part.shape[1] != size or part.dtype not in FLOATS:
                raise InvalidArgumentError(f"{side} must be [n, {size}] of floats; got {describe_tensor(part)}")
        for other, part in (("others", others), ("mask", mask), ("weights", weights)):
            if part is None:
                continue
            if part.shape[:1] != rows.shape[:1] or (other != "others" and part.ndim != 1) or part.device != rows.device:
                raise InvalidArgumentError(
                    f"{other} must have an entry for each of {rows.shape[0]} rows, on {rows.device}; "
                    f"got {describe_tensor(part)}"
                )
        if mask is not None and mask.dtype != torch.bool:
            raise InvalidArgumentError(f"mask must be bool; got {describe_tensor(mask)}")

    @plain_torch()
    def result(self) -> torch.Tensor:
        """The mean [d, e] so far, fp64; raises StatisticsError when no row was added, or the mean is not finite."""
        if self.count == 0:
            raise StatisticsError(f"{self.name}: no rows were counted")
        moment = self.sum / self.weight
        if not bool(torch.isfinite(moment.sum())):
            raise StatisticsError(f"{self.name}: the cross moment is not finite (NaN or overflow in the rows)")
        return moment


@plain_torch()
def second_moment(
    rows: torch.Tensor | Iterable[torch.Tensor],
    weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted mean of k k^T over rows: what `Covariance` and `NullSpace` are made from.

    Args:
        rows: [n, d] float32, float64, bfloat16 or float16; or an iterable of such matrices, of any n.
        weights: [n], not negative; None for ones. Only with a single matrix.
        mask: [n] bool; rows where it is false do not count. Only with a single matrix.

    Returns:
        [d, d] fp64, both triangles, on the device of the rows.

    Raises:
        StatisticsError: no rows, or a mean that is not finite.
        InvalidArgumentError: a wrong shape or dtype.

    Cost: n d (d + 1) flops. Sums of 16-bit and fp32 rows are fp32 within a chunk of rows, fp64 between chunks.

    Example:
        >>> rows = torch.randn(1000, 48)
        >>> moment = second_moment(rows)
        >>> torch.allclose(moment, (rows.double().T @ rows.double()) / 1000, atol=1e-5)
        True
        >>> halves = second_moment([rows[:500], rows[500:]])    # the same in parts
        >>> torch.allclose(moment, halves, atol=1e-6)
        True
    """
    if isinstance(rows, torch.Tensor):
        parts: Iterable[torch.Tensor] = (rows,)
    elif weights is not None or mask is not None:
        raise InvalidArgumentError("weights and mask are of a single matrix of rows")
    else:
        parts = rows
    total: SecondMomentAccumulator | None = None
    for part in parts:
        if part.ndim != 2:
            raise InvalidArgumentError(f"rows must be [n, d]; got {describe_tensor(part)}")
        if total is None:
            total = SecondMomentAccumulator("rows", part.shape[1], part.device)
        total.update(part, mask, weights)
    if total is None:
        raise StatisticsError("no rows were given")
    return total.finish().moment


@plain_torch()
def cross_moment(
    rows: torch.Tensor | Iterable[tuple[torch.Tensor, torch.Tensor]],
    others: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted mean of x y^T over pairs of rows: with `second_moment` of x, what a linear map from x to y needs.

    The map that least squares with a ridge gives is `Covariance.from_moment(second_moment(x), ridge).apply(C)`, [d, e],
    with C this moment.

    Args:
        rows: x, [n, d] float32, float64, bfloat16 or float16; or an iterable of pairs (x, y), of any n.
        others: y, [n, e] of such a dtype; None with an iterable.
        weights: [n], not negative; None for ones. Only with two matrices.
        mask: [n] bool; pairs where it is false do not count. Only with two matrices.

    Returns:
        [d, e] fp64, on the device of the rows.

    Raises:
        StatisticsError: no rows, or a mean that is not finite.
        InvalidArgumentError: a wrong shape, dtype or device.

    Cost: 2 n d e flops. Sums of 16-bit and fp32 rows are fp32 within a chunk of rows, fp64 between chunks.

    Example:
        >>> x, y = torch.randn(1000, 48), torch.randn(1000, 3)
        >>> moment = cross_moment(x, y)
        >>> torch.allclose(moment, (x.double().T @ y.double()) / 1000, atol=1e-5)
        True
        >>> halves = cross_moment([(x[:500], y[:500]), (x[500:], y[500:])])    # the same in parts
        >>> torch.allclose(moment, halves, atol=1e-6)
        True
    """
    if isinstance(rows, torch.Tensor):
        if others is None:
            raise InvalidArgumentError("cross_moment needs the rows of both sides: others is None")
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]] = ((rows, others),)
    elif others is not None or weights is not None or mask is not None:
        raise InvalidArgumentError("others, weights and mask are of a single pair of matrices of rows")
    else:
        pairs = rows
    total: CrossMomentAccumulator | None = None
    for left, right in pairs:
        if total is None:
            for side, part in (("rows", left), ("others", right)):
                if part.ndim != 2:
                    raise InvalidArgumentError(f"{side} must be a matrix of rows; got {describe_tensor(part)}")
            total = CrossMomentAccumulator("rows", (left.shape[1], right.shape[1]), left.device)
        total.update(left, right, mask, weights)
    if total is None:
        raise StatisticsError("no rows were given")
    return total.result()


def _totals(n: int, mask: torch.Tensor | None, weights: torch.Tensor | None) -> tuple[int, float]:
    if weights is None:
        count = n if mask is None else int(mask.sum())
        return count, float(count)
    counted = weights if mask is None else weights[mask]
    return int((counted != 0).sum()), float(counted.double().sum())

"""Streaming second moments of the stacked keys of experts: one block [m, m] for each expert, summed in fp64.

The stacked key of a token is [g_1 a_1; ...; g_E a_E], zero where an expert was not chosen. Of its second moment an edit
uses the blocks on the diagonal, so these alone are collected: C_e = E[g_e^2 a_e a_e^T], a mean over all tokens, also
those that chose other experts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from statistics import median

import torch

from kedit_fast.errors import InvalidArgumentError, StatisticsError
from kedit_fast.models.experts import ExpertRows
from kedit_fast.models.view import ModelView
from kedit_fast.ops import grouped_symmetric_rank_k_update_, symmetric_rank_k_update_
from kedit_fast.statistics.moments import MomentSum, SecondMoment
from kedit_fast.support.dtypes import accumulation_dtype
from kedit_fast.support.messages import comma_list
from kedit_fast.support.page_locked import HostStage
from kedit_fast.support.torch_state import plain_torch

_log = logging.getLogger("kedit_fast")
STAGED_BYTES = 1 << 30
"""At most so many bytes of products lie beside the rows where the sum is elsewhere; at least those of one expert."""
NAMED_EXPERTS = 10
"""Experts that a warning names; of more it says the number alone."""


class ExpertMomentSum(MomentSum):
    """Sums w g^2 a a^T over the chosen experts of tokens as they come, and counts tokens by expert.

    Args:
        module: path of the stacked weight, `model.layers.4.mlp.experts.down_proj`.
        experts: E.
        size: m, of an expert's activation.
        shared: m_s, of the activation of shared experts in the stack, whose moment [m_s, m_s] is summed too; 0 without.
        device: of the rows.
        master: device of the sum, the rows' for None. Where it is another one, products are summed beside the rows for
            as many experts at a time as fit into STAGED_BYTES.
        update_rows: what tokens chose waits until there are so many tokens (`flush` adds fewer); 0 adds it at once.
        stage: buffers for the way to a sum on the host, which sums can share; None for its own.

    Example:
        >>> chosen = ExpertRows(torch.ones(3, 2), torch.tensor([0.5, 0.5, 2.0]), torch.tensor([0, 1, 0]),
        ...                     torch.tensor([0, 2, 3]))
        >>> total = ExpertMomentSum("model.layers.0.mlp.experts.down_proj", experts=2, size=2)
        >>> total.update(chosen, totals=(4, 4.0))  # of 4 tokens, two chose these experts
        >>> total.result().moment[:, 0, 0], total.result().tokens_by_expert
        (tensor([0.1250, 1.0000], dtype=torch.float64), tensor([2, 1]))
    """

    @plain_torch()
    def __init__(
        self,
        module: str,
        experts: int,
        size: int,
        device: torch.device | str = "cpu",
        master: torch.device | str | None = None,
        shared: int = 0,
        update_rows: int = 0,
        stage: HostStage | None = None,
    ):
        super().__init__(module, (experts, size, size), device, master, stage)
        self._update_rows = update_rows
        self._waiting: list[tuple[ExpertRows, int, torch.Tensor | None]] = []  # with their tokens, and the weights
        if shared:
            self.shared = torch.zeros(shared, shared, dtype=torch.float64, device=master or device)
        self.tokens_by_expert = torch.zeros(experts, dtype=torch.int64, device=device)

    @plain_torch()
    def update(
        self,
        chosen: ExpertRows,
        totals: tuple[int, float],
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add the chosen experts of some tokens.

        Args:
            chosen: pairs of tokens and experts, with activations and gates.
            totals: how many tokens count and the sum of their weights, with those that chose no expert.
            weights: [T] of the tokens that `chosen` numbers, not negative; None for ones.

        Cost: n m (m + 1) flops for n pairs.
        """
        self.count += totals[0]
        self.weight += totals[1]
        if not self._update_rows:
            self._add(chosen, weights)
            return
        tokens = totals[0] if weights is None else len(weights)
        waiting = sum(count for _, count, _ in self._waiting)
        if waiting + tokens > self._update_rows:
            self.flush()
        self._waiting.append((chosen, tokens, weights))

    @plain_torch()
    def flush(self) -> None:
        """Add what waits to the sum."""
        if not self._waiting:
            return
        parts, tokens, weights = zip(*self._waiting, strict=True)
        self._waiting = []
        given = None
        if any(part is not None for part in weights):
            like = next(part for part in weights if part is not None)
            ones = (like.new_ones(count) if part is None else part for part, count in zip(weights, tokens, strict=True))
            given = torch.cat(list(ones))
        self._add(ExpertRows.joined(parts, tokens), given)

    def _add(self, chosen: ExpertRows, weights: torch.Tensor | None) -> None:
        assert self.tokens_by_expert is not None
        row_weights, offsets = chosen.gates.double().square(), chosen.offsets
        if weights is None:
            by_expert = offsets.diff()
        else:
            of_rows = weights[chosen.tokens]
            row_weights = row_weights * of_rows
            by_expert = torch.cat([offsets.new_zeros(1), (of_rows != 0).cumsum(0)])[offsets].diff()
        if self._staged:
            self._add_in_parts(chosen, row_weights)
        else:
            grouped_symmetric_rank_k_update_(self.sum, chosen.rows, offsets, row_weights)
        if self.shared is not None:
            self._add_shared(self.shared, chosen, weights)
        self.tokens_by_expert += by_expert.to(self.tokens_by_expert.device)

    def _add_shared(self, total: torch.Tensor, chosen: ExpertRows, weights: torch.Tensor | None) -> None:
        """Add s^2 a a^T of shared experts to their sum."""
        rows, gates = chosen.shared, chosen.shared_gates
        if rows is None:
            raise InvalidArgumentError(f"{self.module}: rows without those of the shared experts")
        if gates is not None:
            weights = gates.double().square() * (1.0 if weights is None else weights)
        if self._staged:
            part = torch.zeros(total.shape, dtype=accumulation_dtype(rows), device=rows.device)
            symmetric_rank_k_update_(part, rows, weights)
            self._stage.add_lower_(total, part)
        else:
            symmetric_rank_k_update_(total, rows, weights)

    def _add_in_parts(self, chosen: ExpertRows, row_weights: torch.Tensor) -> None:
        """Products of some experts at a time beside the rows, added to the sum elsewhere."""
        dtype = accumulation_dtype(chosen.rows)
        experts, size, _ = self.sum.shape
        at_once = max(1, STAGED_BYTES // (size * size * dtype.itemsize))
        bounds = chosen.offsets.tolist()
        for first in range(0, experts, at_once):
            last = min(first + at_once, experts)
            begin, end = bounds[first], bounds[last]
            if begin == end:
                continue
            part = torch.zeros(last - first, size, size, dtype=dtype, device=chosen.rows.device)
            offsets = chosen.offsets[first : last + 1] - begin
            grouped_symmetric_rank_k_update_(part, chosen.rows[begin:end], offsets, row_weights[begin:end])
            self._stage.add_lower_(self.sum[first:last], part)


@dataclass(frozen=True)
class ExpertTokens:
    """How many tokens chose each expert of a layer.

    Example:
        >>> ExpertTokens.of(torch.tensor([7, 0, 3]))
        ExpertTokens(experts=3, least=0, median=3, never=(1,))
    """

    experts: int
    """E."""
    least: int
    """Tokens of the expert with the fewest."""
    median: float
    """Tokens of the expert in the middle."""
    never: tuple[int, ...]
    """Experts that no token chose."""

    @classmethod
    def of(cls, tokens_by_expert: torch.Tensor) -> ExpertTokens:
        """From counts [E]."""
        counts = tokens_by_expert.tolist()
        never = tuple(expert for expert, count in enumerate(counts) if not count)
        return cls(len(counts), min(counts), median(counts), never)


def require_shared(view: ModelView, layer: int, second: SecondMoment) -> None:
    """Raise StatisticsError unless a second moment has shared experts where the stack of the layer has them, alone.

    Raises:
        StatisticsError: it has none, or those of another size; or it has some, and the spec leaves them as they are.
    """
    shared = view.shared_experts(layer)
    size = None if shared is None else [shared.inputs, shared.inputs]
    collected = None if second.shared is None else list(second.shared.shape)
    if collected == size:
        return
    spec = "leaves shared experts as they are" if size is None else f"stacks shared experts, {size} (shared_experts)"
    raise StatisticsError(
        f"the statistics of {second.module} hold {collected or 'no second moment'} of shared experts, and the spec "
        f"{spec}: collect them with the spec that edits (find_spec's shared_experts, kedit-fast spec --shared-experts)"
    )


def warn_of_unused(second: SecondMoment) -> None:
    """Warn of the experts that no token chose, or fewer than an activation has numbers."""
    if second.tokens_by_expert is None:
        return
    size, use = second.moment.shape[-1], ExpertTokens.of(second.tokens_by_expert)
    few = int((second.tokens_by_expert < size).sum()) - len(use.never)
    if use.never:
        names = f" ({comma_list(use.never)})" if len(use.never) <= NAMED_EXPERTS else ""
        _log.warning(
            "%s: none of %d tokens chose %d of %d experts%s: use more text, or other text",
            second.module,
            second.count,
            len(use.never),
            use.experts,
            names,
        )
    if few:
        _log.warning(
            "%s: %d of %d experts were chosen by fewer tokens than the %d of their activations: their second moments "
            "are singular but for the ridge, use more text",
            second.module,
            few,
            use.experts,
            size,
        )

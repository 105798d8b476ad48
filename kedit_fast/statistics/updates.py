"""Rows of a batch's states, or of its chosen experts, without padding, added to sums beside the passes of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.models.experts import ExpertInputs, ExpertRows
from kedit_fast.statistics.expert_moments import ExpertMomentSum
from kedit_fast.statistics.moments import MomentSum


def real_positions(lengths: Sequence[int], width: int) -> torch.Tensor | None:
    """Positions [n] of the first `lengths` tokens of rows of `width` among those of their batch; None for all."""
    if min(lengths) == width:
        return None
    return torch.cat([torch.arange(i * width, i * width + length) for i, length in enumerate(lengths)])


class CountedRows:
    """Which rows of a batch's states count, and with which weights.

    Args:
        positions: [n] int64, of rows that count, on the CPU; None for all.
        weights: [R T] of all rows; None for ones.
        totals: how many rows count, and the sum of their weights.
    """

    def __init__(self, positions: torch.Tensor | None, weights: torch.Tensor | None, totals: tuple[int, float]):
        self._positions, self._weights, self._totals = positions, weights, totals
        self._chosen: dict[tuple[torch.device, bool], _Chosen] = {}

    def add(self, updates: Updates, total: Any, states: torch.Tensor | ExpertRows) -> None:
        """Add rows that count to a sum: those of states [R, T, size], or `rows_of` inputs of experts.

        The sum is a `SecondMomentAccumulator` or what has its `update`; for experts an `ExpertMomentSum`.
        """
        if isinstance(states, ExpertRows):
            self._add_experts(updates, total, states)
            return
        rows = states.flatten(0, 1)  # [R T, size]
        chosen = self._on(rows.device, len(rows), _gathers(rows.device))
        if chosen.index is not None:
            rows = rows.index_select(0, chosen.index)  # [n, size]
        update = total.update
        mask, weights, totals = chosen.mask, chosen.weights, self._totals
        updates.run(rows.device, lambda: update(rows, mask, weights, totals), (rows, mask, weights))

    def _add_experts(self, updates: Updates, total: ExpertMomentSum, rows: ExpertRows) -> None:
        device = rows.rows.device
        weights = self._on(device, 0, True).weights
        reads = (*vars(rows).values(), weights)
        updates.run(device, lambda: total.update(rows, self._totals, weights), reads)

    def _on(self, device: torch.device, count: int, gathers: bool) -> _Chosen:
        if (device, gathers) not in self._chosen:
            self._chosen[device, gathers] = _Chosen.on(device, self._positions, count, self._weights, gathers)
        return self._chosen[device, gathers]


def rows_of(states: torch.Tensor | ExpertInputs, positions: torch.Tensor | None) -> torch.Tensor | ExpertRows:
    """What `CountedRows.add` takes of states: they themselves, of experts the rows at positions that count."""
    return states.rows(positions) if isinstance(states, ExpertInputs) else states


@dataclass(frozen=True)
class _Chosen:
    """Which rows of a batch's states count, on a device: by index or by mask, and with which weights."""

    index: torch.Tensor | None
    """[n] int64, rows to gather before the update; None for all."""
    mask: torch.Tensor | None
    """[R T] bool, for the update; None for all."""
    weights: torch.Tensor | None
    """Of the gathered rows, or of all; None for ones."""

    @classmethod
    def on(
        cls, device: torch.device, real: torch.Tensor | None, count: int, weights: torch.Tensor | None, gathers: bool
    ) -> _Chosen:
        """Of `count` rows those at `real`, by index or by mask, and the weights that go with them."""
        index, mask = real, None
        if real is not None and not gathers:
            index, mask = None, torch.zeros(count, dtype=torch.bool).index_fill_(0, real, True)
        elif real is not None and weights is not None:
            weights = weights[real.to(weights.device)]
        return cls(*(None if t is None else t.to(device, non_blocking=True) for t in (index, mask, weights)))


def _gathers(device: torch.device) -> bool:
    """Whether rows are gathered: on a GPU an update takes 1.8 times as long with a mask (H200, bf16, d 14336).

    On other devices plain torch would wait to learn how many rows a mask leaves. The C++ kernels pack such rows as
    zeros, without a copy.
    """
    return device.type != "cpu"


class Updates:
    """Adds rows to sums: at once on a CPU; on a GPU on a stream of its own, beside the next forward pass."""

    def __init__(self):
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._batches: deque[list[torch.Event]] = deque()  # ends of the updates, of at most two batches

    def __enter__(self) -> Updates:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def run(self, device: torch.device, update: Callable[[], None], reads: Iterable[torch.Tensor | None]) -> None:
        """Call `update`, which adds rows on a device to a sum, perhaps beside what comes next.

        Args:
            device: of the rows.
            update: adds them.
            reads: the tensors that it reads; their memory is not used for others before it has.
        """
        if device.type != "cuda":
            update()
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            update()
            for tensor in reads:
                if tensor is not None:
                    tensor.record_stream(stream)

    def flush(self, sums: Iterable[MomentSum]) -> None:
        """Add the rows that wait in sums to them, beside what comes next."""
        for total in sums:
            self.run(total.device, total.flush, ())

    def next_batch(self) -> None:
        """Wait for the updates of the previous batch; those of this one may still run."""
        self._batches.append([stream.record_event() for stream in self._streams.values()])
        while len(self._batches) > 1:
            for event in self._batches.popleft():
                event.synchronize()

    def wait(self) -> None:
        """Wait for all updates."""
        for stream in self._streams.values():
            stream.synchronize()

"""Rows of a batch's states, without its padding, added to sums beside the passes of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kedit_fast.statistics.moments import SecondMomentAccumulator


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
        self._chosen: dict[torch.device, _Chosen] = {}

    def add(self, updates: Updates, accumulator: SecondMomentAccumulator, states: torch.Tensor) -> None:
        """Add the rows of states [R, T, size] that count to a sum."""
        rows = states.flatten(0, 1)  # [R T, size]
        if rows.device not in self._chosen:
            self._chosen[rows.device] = _Chosen.on(rows.device, self._positions, len(rows), self._weights)
        chosen = self._chosen[rows.device]
        if chosen.index is not None:
            rows = rows.index_select(0, chosen.index)  # [n, size]
        updates.add(accumulator, rows, chosen.mask, chosen.weights, self._totals)


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
    def on(cls, device: torch.device, real: torch.Tensor | None, count: int, weights: torch.Tensor | None) -> _Chosen:
        """Of `count` rows those at `real`, by the faster way of the device, and the weights that go with them."""
        index, mask = real, None
        if real is not None and not _gathers(device):
            index, mask = None, torch.zeros(count, dtype=torch.bool).index_fill_(0, real, True)
        elif real is not None and weights is not None:
            weights = weights[real.to(weights.device)]
        return cls(*(None if t is None else t.to(device, non_blocking=True) for t in (index, mask, weights)))


def _gathers(device: torch.device) -> bool:
    """Whether rows are gathered: on a GPU an update takes 1.8 times as long with a mask (H200, bf16, d 14336)."""
    return device.type == "cuda"


class Updates:
    """Adds rows to sums: at once on a CPU; on a GPU on a stream of its own, beside the next forward pass."""

    def __init__(self):
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._batches: deque[list[torch.Event]] = deque()  # ends of the updates, of at most two batches

    def __enter__(self) -> Updates:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def add(
        self,
        accumulator: SecondMomentAccumulator,
        rows: torch.Tensor,
        mask: torch.Tensor | None,
        weights: torch.Tensor | None,
        totals: tuple[int, float],
    ) -> None:
        """`SecondMomentAccumulator.update`, perhaps later."""
        device = rows.device
        if device.type != "cuda":
            accumulator.update(rows, mask, weights, totals)
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            accumulator.update(rows, mask, weights, totals)
            for tensor in (rows, mask, weights):
                if tensor is not None:
                    tensor.record_stream(stream)  # its memory is not reused before the update has read it

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

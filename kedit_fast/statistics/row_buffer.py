"""Rows of several batches, until there are enough for one update of a sum.

An update reads and writes the whole fp64 sum, whatever the number of its rows. On a GPU that takes as long as the
products of some hundred rows, so few large updates are faster than many small ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


class RowBuffer:
    """At most `capacity` rows [n, d] and their weights, copied from what callers give.

    Args:
        capacity: rows, at least 1.

    Example:
        >>> buffer = RowBuffer(3)
        >>> [len(rows) for rows, _ in buffer.put(torch.ones(2, 4))]     # they wait
        []
        >>> [len(rows) for rows, _ in buffer.put(torch.ones(5, 4))]     # 3, 3 and one that waits
        [3, 3]
        >>> [len(rows) for rows, _ in buffer.take()], [len(rows) for rows, _ in buffer.take()]
        ([1], [])
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.waiting = 0
        """Rows that wait."""
        self._rows: torch.Tensor | None = None  # [capacity, d]
        self._weights: torch.Tensor | None = None  # [capacity]; None as long as no row had one

    def takes(self, rows: torch.Tensor, weights: torch.Tensor | None, size: int) -> bool:
        """Whether these are floats [n, size] and weights [n], and rows are like those that wait: none are converted."""
        like = rows if self._rows is None else self._rows
        return (
            rows.ndim == 2
            and rows.shape[1] == size
            and rows.is_floating_point()
            and (rows.dtype, rows.device) == (like.dtype, like.device)
            and (weights is None or (weights.shape == rows.shape[:1] and weights.device == rows.device))
            and (weights is None or self._weights is None or weights.dtype == self._weights.dtype)
        )

    def put(
        self, rows: torch.Tensor, weights: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Add rows, and yield full buffers and their weights: to be used before the next one is asked for.

        Args:
            rows: [n, d], of one dtype, size and device in all calls.
            weights: [n]; None for ones.
        """
        first = 0
        while first < len(rows):
            if self.waiting == 0 and len(rows) - first >= self.capacity:  # nothing to wait for, so nothing is copied
                end = first + self.capacity
                yield rows[first:end], None if weights is None else weights[first:end]
            else:
                end = min(len(rows), first + self.capacity - self.waiting)
                self._copy(rows[first:end], None if weights is None else weights[first:end])
                if self.waiting == self.capacity:
                    yield from self.take()
            first = end

    def take(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield the rows that wait and their weights, if there are any; none wait afterwards."""
        if self.waiting == 0:
            return
        count, self.waiting = self.waiting, 0
        assert self._rows is not None
        yield self._rows[:count], None if self._weights is None else self._weights[:count]

    def _copy(self, rows: torch.Tensor, weights: torch.Tensor | None) -> None:
        if self._rows is None:
            self._rows = rows.new_empty(self.capacity, rows.shape[1])
        if weights is not None and self._weights is None:
            self._weights = weights.new_ones(self.capacity)
        here = slice(self.waiting, self.waiting + len(rows))
        self._rows[here] = rows
        if self._weights is not None:
            self._weights[here] = 1.0 if weights is None else weights
        self.waiting += len(rows)

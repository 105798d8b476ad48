"""States after each batch, of which any number of the last ones can be undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from kedit_fast.ops import pack_bits, unpack_bits
from kedit_fast.support.matrix_bits import integer_view

T = TypeVar("T")
DENSE_SHARE = 0.5
"""Share of changed entries from which on a whole copy is smaller than the changed ones and their places."""


class History(Generic[T]):
    """A state, and how to return to those before it. A state is never changed, only replaced.

    Args:
        first: the state before the first batch.
        window: how many batches can be undone one by one; 0 for all.
    """

    def __init__(self, first: T, window: int = 0):
        self.first = self.current = first
        self.window = window
        self.count = 0
        """Number of batches that the state holds."""
        self._earlier: list[Callable[[T], T]] = []  # of each batch: from the state after it

    def push(self, state: T, earlier: Callable[[T], T]) -> None:
        """Replace the state by that after one more batch, from which `earlier` makes the present one, bit for bit."""
        self._earlier = [*self._earlier, earlier][-self.window if self.window else 0 :]
        self.current, self.count = state, self.count + 1

    def settle(self, count: int) -> bool:
        """Return to the state after `count` batches; returns whether that is another one."""
        if count >= self.count:
            return False
        if count == 0:
            state, rest = self.first, []
        else:
            state, rest = self.current, self._earlier
            for _ in range(self.count - count):
                state, rest = rest[-1](state), rest[:-1]
        self.current, self._earlier, self.count = state, rest, count
        return True


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix as what differs from another one: bit for bit, and on the host."""

    values: torch.Tensor
    """[n] the entries that differ, row after row; all of the matrix [h, d] where most do."""
    bits: torch.Tensor | None
    """[ceil(h d / 8)] uint8, the entries that differ; None where `values` are the matrix."""

    @classmethod
    def of(cls, matrix: torch.Tensor, base: torch.Tensor) -> PackedMatrix:
        """Pack a matrix; `base` is converted to its dtype.

        Cost: one pass over both; 1/8 byte an entry, and the entries that differ.
        """
        base = base.to(matrix)
        differs = integer_view(matrix.contiguous()) != integer_view(base.contiguous())
        if float(differs.count_nonzero()) > DENSE_SHARE * matrix.numel():
            return cls(matrix.cpu(), None)
        return cls(matrix[differs].cpu(), pack_bits(differs).cpu())

    def unpacked(self, base: torch.Tensor) -> torch.Tensor:
        """The matrix, on the device of `base` and in the dtype that it had."""
        values = self.values.to(base.device)
        if self.bits is None:
            return values
        matrix = base.to(values.dtype, copy=True, memory_format=torch.contiguous_format)
        matrix[unpack_bits(self.bits.to(base.device), base.numel()).view(base.shape)] = values
        return matrix

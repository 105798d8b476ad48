"""Copies between a GPU and the host through page-locked memory, which the GPU reads and writes by itself.

A copy to or from ordinary memory goes through a small buffer of the driver's and holds the caller up; one to or from
page-locked memory runs in the order of the stream while the host goes on. Such memory cannot be swapped out, so it is
bounded; where the system refuses it, the log says so and copies go the ordinary way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Protocol

import torch

_log = logging.getLogger("kedit_fast")
STAGE_BYTES = 64 << 20
"""Of each of the two buffers of a `HostStage`."""


class Copied(Protocol):
    """A mark behind a copy in the order of a device's work."""

    def synchronize(self) -> None:
        """Wait until the copy is done."""
        ...


class PageLocked:
    """Page-locked tensors on the host, at most so many bytes at a time.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int):
        self.left = limit
        """Bytes that may still be allocated."""
        self._refused = False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor of any numbers; None where that is more than may be allocated, or the system refuses it."""
        size = math.prod(shape) * dtype.itemsize
        if self._refused or size > self.left:
            return None
        try:
            tensor = allocate(shape, dtype)
        except RuntimeError as error:
            self._refused = True
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            _log.warning("no page-locked memory for %d bytes: %s; copies to the host take longer", size, reason)
            return None
        self.left -= size
        return tensor


class HostStage:
    """The way of products from a device to sums on the host: through two page-locked buffers, a block at a time.

    While the host adds one block, the device writes the next one. Memory: twice STAGE_BYTES at most, from the first use
    on. Where it cannot be allocated, blocks are copied in the ordinary way.

    Args:
        block_bytes: of each buffer; a block is one row at least.
    """

    def __init__(self, block_bytes: int = STAGE_BYTES):
        self._block_bytes = block_bytes
        self._memory = PageLocked(2 * block_bytes)
        self._buffers: list[torch.Tensor] | None = None  # [bytes] each; an empty list where there are none

    def add_lower_(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Add the lower triangles of a matrix, or of a stack of them, to those of a sum on the host.

        Args:
            total: [.., d, d] on the host, changed; what is above its diagonals may be changed or not.
            part: the same shape, on any device. Its memory may be used for others when this returns.
        """
        if not crosses(part.device, total.device):
            total.add_(part.to(total.device))
            return
        d = part.shape[-1]
        for sums, products in zip(total.view(-1, d, d), part.view(-1, d, d), strict=True):
            self._add(sums, products)

    def _add(self, total: torch.Tensor, part: torch.Tensor) -> None:
        if self._buffers is None:
            made = [self._memory.empty((self._block_bytes,), torch.uint8) for _ in range(2)]
            self._buffers = [buffer for buffer in made if buffer is not None]
        if len(self._buffers) < 2 or part.shape[1] * part.itemsize > self._block_bytes:
            total.add_(part.to(total.device))
            return
        before: tuple[slice, torch.Tensor, Copied] | None = None
        for turn, rows in enumerate(_blocks(part.shape[0], self._block_bytes // part.itemsize)):
            block = part[rows, : rows.stop].contiguous()  # a copy of rows with gaps would not run by itself
            buffer = self._buffers[turn % 2][: block.nbytes].view(part.dtype).view(block.shape)
            copied = copy_out(buffer, block)
            if before is not None:
                _add_block(total, *before)
            before = rows, buffer, copied
        if before is not None:
            _add_block(total, *before)


def _add_block(total: torch.Tensor, rows: slice, buffer: torch.Tensor, copied: Copied) -> None:
    copied.synchronize()
    total[rows, : rows.stop].add_(buffer)


def _blocks(d: int, most: int) -> Iterator[slice]:
    """Rows of a lower triangle in blocks of at most `most` numbers, the diagonal's block whole; at least d of them."""
    first = 0
    while first < d:
        end = first + 1
        while end < d and (end + 1 - first) * (end + 1) <= most:
            end += 1
        yield slice(first, end)
        first = end


def crosses(device: torch.device, other: torch.device) -> bool:
    """Whether a copy goes from a GPU to the host, where page-locked memory is of use."""
    return device.type == "cuda" and other.type == "cpu"


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A page-locked tensor; raises RuntimeError where there is no GPU, or no such memory."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)


def copy_out(to: torch.Tensor, source: torch.Tensor) -> Copied:
    """Begin to copy from a device into page-locked memory, in the order of the device's current stream."""
    to.copy_(source, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(source.device))
    return event

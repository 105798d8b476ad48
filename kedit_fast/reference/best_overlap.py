"""Reference of `best_overlap`: the row of a book of bits that shares most bits with a mask."""

from __future__ import annotations

import torch

BYTES = 1 << 26
"""Of conjunctions in memory at a time."""


def best_overlap(masks: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and number of shared bits [R] for masks [R, b] and a book [K, b] of uint8, K > 0; ties to the lowest."""
    index = torch.empty(len(masks), dtype=torch.int64, device=masks.device)
    count = torch.empty_like(index)
    rows = max(1, BYTES // max(1, book.numel()))
    for begin in range(0, len(masks), rows):
        shared = _bits(masks[begin : begin + rows, None] & book).sum(-1, dtype=torch.int64)  # [rows, K]
        best = shared.argmax(-1)
        index[begin : begin + rows] = best
        count[begin : begin + rows] = shared.gather(1, best[:, None])[:, 0]
    return index, count


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """The number of ones of each byte: sums of neighboring bits, then of pairs and of fours."""
    pairs = packed - ((packed >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F

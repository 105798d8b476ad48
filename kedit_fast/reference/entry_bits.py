"""Masks as bits: entry 8 j + i of a flattened mask is bit i of byte j."""

from __future__ import annotations

import torch


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """See `kedit_fast.ops.pack_bits`."""
    flat = (mask != 0).flatten().to(torch.uint8)
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (rows << _shifts(mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, count: int) -> torch.Tensor:
    """See `kedit_fast.ops.unpack_bits`."""
    return (bits[:, None] >> _shifts(bits.device) & 1).flatten()[:count].bool()


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)

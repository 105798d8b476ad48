"""Masks as bits: entry 8 j + i of a flattened mask is bit i of byte j."""

from __future__ import annotations

import torch


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bits, row-major; the last byte is filled with zeros.

    Args:
        mask: a tensor of any shape whose entries other than 0 are set.

    Returns:
        uint8 [ceil(entries / 8)], contiguous.

    Example:
        >>> pack_bits(torch.tensor([[True, False, True], [False, False, True]]))
        tensor([37], dtype=torch.uint8)
    """
    flat = (mask != 0).flatten().to(torch.uint8)
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (rows << _shifts(mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` entries of a mask that `pack_bits` packed, as bool [count].

    Example:
        >>> unpack_bits(torch.tensor([37], dtype=torch.uint8), 6).int().tolist()
        [1, 0, 1, 0, 0, 1]
    """
    return (bits[:, None] >> _shifts(bits.device) & 1).flatten()[:count].bool()


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)

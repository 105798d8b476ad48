"""Masks of a matrix's entries as bits, as the ops take them: entry 8 j + i of a flattened mask is bit i of byte j."""

from __future__ import annotations

import torch

from kedit_fast.ops._checks import describe, require, require_dtype
from kedit_fast.reference import entry_bits as reference


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
    return reference.pack_bits(mask)


def unpack_bits(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` entries of a mask that `pack_bits` packed, as bool [count].

    Raises:
        InvalidArgumentError: no bytes [n], or fewer bits than `count`.

    Example:
        >>> unpack_bits(torch.tensor([37], dtype=torch.uint8), 6).int().tolist()
        [1, 0, 1, 0, 0, 1]
    """
    require_dtype("bits", bits, (torch.uint8,))
    fits = bits.ndim == 1 and 0 <= count <= 8 * len(bits)
    require(fits, lambda: f"bits must be [n] with at least {count} bits; got {describe(bits)}")
    return reference.unpack_bits(bits, count)

"""Masks of a matrix's entries as bits: entry 8 j + i of a matrix read row by row is bit i of byte j."""

from __future__ import annotations

import hashlib

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.support.torch_state import plain_torch

_AT_ONCE = 1 << 22  # entries drawn at once: a multiple of 8


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A mask of any shape as bytes [ceil(entries / 8)] uint8; the last byte is filled up with zeros."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    place = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat << place).sum(1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The mask [shape] bool that `pack_bits` packed."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits[:, None] >> place) & 1).flatten()
    entries = 1
    for size in shape:
        entries *= size
    return flat[:entries].view(shape).bool()


@plain_torch()
def random_bits(entries: int, share: float, seed: int, name: str = "") -> torch.Tensor:
    """Bits of a mask that each entry is in with probability `share`, on the host: the same for the same seed and name.

    Args:
        entries: how many.
        share: in (0, 1]; 1 gives every entry.
        seed: of the generator.
        name: what the mask is for; masks of other names are independent.

    Cost: one random number an entry, 4 M at a time; entries / 8 bytes.
    Source: WISE (arXiv 2405.14768), which draws its masks unseeded.
    """
    if not 0 < share <= 1:
        raise InvalidArgumentError(f"the share of a mask's entries must be in (0, 1]; got {share}")
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    parts = []
    for begin in range(0, entries, _AT_ONCE):
        drawn = torch.rand(min(_AT_ONCE, entries - begin), generator=generator, dtype=torch.float32)
        parts.append(pack_bits(drawn < share))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)

"""Random masks of a matrix's entries, as the bits that `kedit_fast.ops.pack_bits` makes."""

from __future__ import annotations

import hashlib

import torch

from kedit_fast.errors import InvalidArgumentError
from kedit_fast.ops import pack_bits
from kedit_fast.support.torch_state import plain_torch

_AT_ONCE = 1 << 22  # entries drawn at once: a multiple of 8


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

"""Fixed places for requests that are optimized together, so that a recorded iteration fits whatever request is in them.

Every request takes as much as the largest one: rows, prefixes, tails and targets of one length. One that ends stays in
its slot, masked, until the next one is written into the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kedit_fast.editing.values.active_set import ActiveSet
from kedit_fast.editing.values.cuda_graph import GraphedStep
from kedit_fast.editing.values.slot_shape import SlotShape

MOST_SLOTS = 16
"""So many requests together have slots at most. In larger batches padding would cost more than launches do."""


class Slots:
    """An active set whose rows are slots, and which request is in each of them.

    Args:
        active: the requests that come first, one in each slot.
        requests: their indices into the caller's requests.
    """

    def __init__(self, active: ActiveSet, requests: Sequence[int]):
        self.active = active
        self.requests: list[int | None] = list(requests)
        """[v] the request in each slot; None where it has ended."""

    @property
    def free(self) -> list[int]:
        """Slots without a request."""
        return [slot for slot, request in enumerate(self.requests) if request is None]

    @property
    def taken(self) -> list[int]:
        """Slots with a request that has not ended."""
        return [slot for slot, request in enumerate(self.requests) if request is not None]

    def enter(self, entering: ActiveSet, requests: Sequence[int]) -> None:
        """Write requests into free slots, of which there are enough."""
        slots = self.free[: len(requests)]
        self.active.write_(torch.tensor(slots, device=entering.request.device), entering)
        for slot, request in zip(slots, requests, strict=True):
            self.requests[slot] = request

    def release(self, slots: Sequence[int]) -> None:
        """Free slots; what is in them stays, masked by its status."""
        for slot in slots:
            self.requests[slot] = None


@dataclass
class RecordedIteration:
    """One recorded iteration for several calls of `find_values`, whose requests come one after another.

    The calls have the same model, layer, sites and hyper-parameters. Between them weights may change, in their memory.
    """

    shape: SlotShape
    """Into which the requests of all calls fit."""
    slots: Slots | None = None
    """Those of the first call; None before it."""
    step: GraphedStep | None = None
    """The iteration on these slots; None before the first call."""

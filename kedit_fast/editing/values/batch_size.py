"""How many requests fit in memory together while their values are optimized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kedit_fast.editing.values.objective import Objective
from kedit_fast.models.forward import Site, evaluating
from kedit_fast.models.sharded import agreed_minimum, local
from kedit_fast.models.view import ModelView
from kedit_fast.models.widened import Streamed, Widening
from kedit_fast.requests.prompts import PreparedRequest
from kedit_fast.support.free_memory import free_bytes
from kedit_fast.support.torch_state import plain_torch

MOST = {"cpu": 64}
"""Type of a device -> most requests together. On a CPU a larger batch is hardly faster (benchmarks/results)."""
MOST_ELSEWHERE = 256
"""Most requests together on other devices."""
SHARE = 0.6
"""Share of the free memory that values may take."""
FEW = 8
"""So few requests always run together, without a trial."""
TRIAL = 2
"""Requests in the trial."""
TEMPORARY = 2.0
"""Peak of a backward pass, in units of what the forward pass has saved for it."""


@dataclass(frozen=True)
class BatchSize:
    """A number of requests, and the bytes that it follows from."""

    requests: int
    """How many are optimized together."""
    request_bytes: int
    """Bytes that one more request of the longest ones takes; 0 when there was no trial."""


@plain_torch()
def fitting_batch(
    view: ModelView,
    prepared: Sequence[PreparedRequest],
    sites: Sequence[Site],
    most: int | None = None,
    reserved: int = 0,
) -> BatchSize:
    """The number of requests to optimize together: as many as fit in memory, at most what is useful on the device.

    Args:
        view: the model.
        prepared: all requests.
        sites: where their deltas are added.
        most: upper bound; None for the device's.
        reserved: bytes that are free now and will not be, as those of copies that are not made yet.

    Cost: a forward pass of the two longest requests, whose saved tensors are counted.
    """
    if most is None:
        most = MOST.get(view.head.device.type, MOST_ELSEWHERE)
    most = min(most, len(prepared))
    if most <= FEW:
        return BatchSize(max(1, most), 0)
    each = request_bytes(view, prepared, sites)
    free = int(SHARE * max(0, free_bytes(view.head.device) - reserved))
    return BatchSize(agreed_minimum(view.model, max(1, min(most, free // each))), each)


@plain_torch()
def request_bytes(view: ModelView, prepared: Sequence[PreparedRequest], sites: Sequence[Site]) -> int:
    """Bytes that one request takes while its value is optimized, measured on the two longest ones."""
    longest = sorted(prepared, key=lambda r: sum(len(p.ids) for p in r.rewriting) + len(r.target))[-TRIAL:]
    with evaluating(view) as widening:
        objective = Objective.build(view, longest, sites)
        parameters = {local(p).untyped_storage().data_ptr() for p in view.model.parameters()}
        saved: dict[int, int] = {}  # bytes by address

        def count(tensor: torch.Tensor) -> Any:
            packed = tensor.detach() if widening is None else widening.pack(tensor)
            if isinstance(packed, Streamed) or (widening is not None and widening.owns(tensor)):
                return packed  # a weight's copy, which all requests share
            storage = local(tensor).untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
            return packed

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, Widening.unpack):
            delta = torch.zeros_like(objective.h0).requires_grad_(True)
            terms = objective.terms(delta)
        del terms
    return int((2 * objective.runner.state_bytes + TEMPORARY * sum(saved.values())) / len(longest)) + 1

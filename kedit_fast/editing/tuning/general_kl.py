"""DINM's term for general prompts: how far a tuned matrix moves what the model says to them."""

from __future__ import annotations

from typing import Any

import torch

from kedit_fast.editing.tuning.captured import CapturedRows
from kedit_fast.support.sums import add_by_owner_


class GeneralKL:
    """The mean of KL(p_0 || p) over the compared tokens of a request's general rows: a `Term`.

    p_0 is what the model says before the request is tuned.

    Args:
        captured: the rows, of requests 0 to u - 1; those whose role is "general" are compared.
        outputs: [N, h] outputs of the matrix as it is before the request is tuned; None for those captured.
        gradient: whether the term has a gradient. Without one it is part of the loss that is reported and stopped at,
            and changes no step, as in DINM's released code.

    Cost: when it is made, one pass of the blocks above the layer.
    """

    def __init__(self, captured: CapturedRows, outputs: torch.Tensor | None = None, gradient: bool = True):
        self.head: Any = captured.view.head
        self.gradient, self.requests = gradient, len(captured)
        places, owners = [], []
        for i, row in enumerate(captured.rows):
            if row.role == "general":
                places += range(captured.offsets[i + 1] - row.compared, captured.offsets[i + 1])
                owners += [row.request] * row.compared
        counts = torch.bincount(torch.tensor(owners, dtype=torch.int64), minlength=self.requests)
        self.places = torch.tensor(places, dtype=torch.int64, device=self.head.device)
        self._owners = torch.tensor(owners, dtype=torch.int64, device=self.head.device)
        self._weights = (1 / counts.clamp(min=1).double()).to(self.head.device)[self._owners]
        with torch.no_grad():
            outputs = captured.original if outputs is None else outputs
            self._before = captured.hidden(outputs, self.places) if places else outputs[:0]

    def losses(self, outputs: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """See `Term.losses`."""
        states = states if self.gradient else states.detach()
        dtype = torch.promote_types(states.dtype, torch.float32)
        none = torch.zeros(self.requests, dtype=dtype, device=self.head.device)
        if not len(self.places):
            return none
        kl = self.head.distribution_kl(states, self._before, reverse=True).to(dtype)
        return add_by_owner_(none, self._owners, kl * self._weights.to(dtype))

"""Values of requests, as the value loop returns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kedit_fast.solver.value_descent import Status

OnProblem = Literal["raise", "keep"]
"""What happens at a request whose loss or gradient is not finite: an error, or the others continue."""
PROBLEMS = {
    Status.PREDICTED: (
        "the model says the target already: its value would take no step (on_predicted = allow writes that)"
    ),
    Status.BAD_LOSS: "the loss of its value is not finite; is the model's output finite on its prompt?",
    Status.BAD_GRADIENT: "the gradient of its value is not finite; is the model's output finite on its prompt?",
}
USABLE = (Status.COMPLETED, Status.STOPPED)


@dataclass(frozen=True)
class Values:
    """Optimized values of u requests, at one site or two."""

    sites: tuple[str, ...]
    """The kinds of the sites: "block", "mlp", or "attention" and "mlp"."""
    all_targets: torch.Tensor
    """[sites, h, u] fp64, h0 + delta."""
    all_deltas: torch.Tensor
    """[sites, h, u] fp32."""
    losses: torch.Tensor
    """[u] fp32 on the CPU, the loss at each request's last forward pass."""
    steps: torch.Tensor
    """[u] int64 on the CPU, optimizer steps taken."""
    status: torch.Tensor
    """[u] int64 on the CPU, a `Status`: usable values are COMPLETED or STOPPED, `PROBLEMS` explains the others."""

    @staticmethod
    def in_order(parts: Sequence[tuple[Sequence[int], Values]], device: torch.device) -> Values:
        """The values of all requests in the order of their indices, on one device, from parts with their indices."""
        values = [part for _, part in parts]
        joined = Values(
            values[0].sites,
            torch.cat([part.all_targets.to(device) for part in values], 2),
            torch.cat([part.all_deltas.to(device) for part in values], 2),
            torch.cat([part.losses for part in values]),
            torch.cat([part.steps for part in values]),
            torch.cat([part.status for part in values]),
        )
        order = torch.argsort(torch.tensor([index for indices, _ in parts for index in indices]))
        return joined.select(order.tolist())

    @property
    def targets(self) -> torch.Tensor:
        """[h, u] of the last site, whose layer is written."""
        return self.all_targets[-1]

    @property
    def deltas(self) -> torch.Tensor:
        """[h, u] of the last site."""
        return self.all_deltas[-1]

    @property
    def usable(self) -> list[bool]:
        """[u] whether each value can be written to a model: it is finite and took a step."""
        return [code in USABLE for code in self.status.tolist()]

    def select(self, indices: Sequence[int]) -> Values:
        """The values of some of the requests."""
        index = torch.tensor(list(indices), dtype=torch.int64)
        column = index.to(self.all_targets.device)
        return Values(
            self.sites,
            self.all_targets[:, :, column],
            self.all_deltas[:, :, column],
            self.losses[index],
            self.steps[index],
            self.status[index],
        )

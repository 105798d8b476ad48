"""The requests that are being optimized now, with everything that the loop knows about each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from kedit_fast.editing.values.objective import Objective
from kedit_fast.solver.value_descent import Status
from kedit_fast.support.sums import add_by_owner_


@dataclass
class ActiveSet:
    """The v requests being optimized now; row i of every tensor belongs to one request.

    A field is a tensor with a row for each request, or None, or has `select`, `append` and `write_` of its own. So a
    new field takes part in `select`, `append`, `copy_` and `write_` without being named in them.
    """

    objective: Objective
    """The prompts of the requests, and the terms of their losses."""
    request: torch.Tensor
    """[v] int64, index into the caller's requests."""
    leader: torch.Tensor | None
    """[v] int64, the first request of each request's group; None where every request has a value of its own."""
    max_norm: torch.Tensor
    """[v, sites, 1] fp32, bound of |delta|."""
    rate: torch.Tensor | None
    """[v, sites, 1] fp32, Adam's step size; None where one number holds for all requests."""
    delta: torch.Tensor
    """[v, sites, h] fp32; requests of one group have the same."""
    adam_mean: torch.Tensor
    """[v, sites, h] fp32, Adam's running mean of the gradients."""
    adam_square: torch.Tensor
    """[v, sites, h] fp32, Adam's running mean of their squares."""
    loss: torch.Tensor
    """[v] fp32, at each request's last forward pass."""
    likelihood_weight: torch.Tensor
    """[v] fp32, factor of the likelihood in the next loss; 1 unless the stopping rule lowers it."""
    steps_taken: torch.Tensor
    """[v] int64, optimizer steps."""
    iterations_correct: torch.Tensor
    """[v] int64, iterations so far in which every target token was the most probable one in all prefixed contexts."""
    status: torch.Tensor
    """[v] int64, a `Status`."""
    group: torch.Tensor | None = field(init=False, default=None)
    """[v] int64, number of each request's group in this set; None where `leader` is."""
    group_size: torch.Tensor | None = field(init=False, default=None)
    """[v] int64, members of each group, by its number; 1 past the last group."""

    def __post_init__(self):
        if self.leader is not None:
            group = torch.unique(self.leader, return_inverse=True)[1]
            self.group, self.group_size = group, torch.bincount(group, minlength=len(group)).clamp(min=1)

    @classmethod
    def start(
        cls,
        objective: Objective,
        requests: Sequence[int],
        leaders: Sequence[int] | None,
        clamp_norm_factor: float,
        v_lr_scale: float | None = None,
        starting: Sequence[torch.Tensor | None] | None = None,
    ) -> ActiveSet:
        """A set of requests before their first iteration.

        Args:
            objective: of these requests.
            requests: their indices into the caller's requests.
            leaders: for each, the place in `requests` of the first one of its group; None without groups.
            clamp_norm_factor: bound of |delta| in units of |h0|; a group has its first request's bound.
            v_lr_scale: Adam's step size in units of the root mean square of h0, likewise; None for no `rate`.
            starting: for each, the value [h] of the last site that its descent starts from; None for h0.
        """
        h0, device = objective.h0, objective.device
        v = len(requests)
        norm = h0.norm(dim=2, keepdim=True)
        request = torch.tensor(requests, device=device)
        leader = None
        if leaders is not None:
            first = torch.tensor(leaders, device=device)
            norm, leader = norm[first], request[first]
        delta = torch.zeros_like(h0)
        for row, value in enumerate(starting or ()):
            if value is not None:
                delta[row, -1] = value.to(h0) - h0[row, -1]
        return cls(
            objective=objective,
            request=request,
            leader=leader,
            max_norm=clamp_norm_factor * norm,
            rate=None if v_lr_scale is None else v_lr_scale * h0.shape[2] ** -0.5 * norm,
            delta=delta,
            adam_mean=torch.zeros_like(h0),
            adam_square=torch.zeros_like(h0),
            loss=torch.zeros(v, device=device, dtype=torch.float32),
            likelihood_weight=torch.ones(v, device=device, dtype=torch.float32),
            steps_taken=torch.zeros(v, device=device, dtype=torch.int64),
            iterations_correct=torch.zeros(v, device=device, dtype=torch.int64),
            status=torch.full((v,), Status.RUNNING, device=device),
        )

    def __len__(self) -> int:
        return self.request.numel()

    def select(self, rows: torch.Tensor) -> ActiveSet:
        """The set of some of its rows, [n] int64 in increasing order, with whole groups."""

        def selected(part: Any) -> Any:
            if part is None:
                return None
            return part[rows] if isinstance(part, torch.Tensor) else part.select(rows)

        return ActiveSet(**{name: selected(part) for name, part in self._parts().items()})

    def append(self, other: ActiveSet) -> ActiveSet:
        """The set of the rows of both."""
        others = other._parts()

        def joined(part: Any, more: Any) -> Any:
            if part is None:
                return None
            return torch.cat([part, more]) if isinstance(part, torch.Tensor) else part.append(more)

        return ActiveSet(**{name: joined(part, others[name]) for name, part in self._parts().items()})

    def copy_(self, other: ActiveSet) -> None:
        """Write the tensors of a set with the same requests into this set's own tensors."""
        others = other._parts()
        for name, part in self._parts().items():
            if isinstance(part, torch.Tensor) and others[name] is not part:
                part.copy_(others[name])

    def write_(self, rows: torch.Tensor, other: ActiveSet) -> None:
        """Put the requests of another set in the place of some of this one's, in its own tensors.

        Args:
            rows: [n] int64, of those that go.
            other: of n requests without groups, of one shape with these; see `Objective.write_`.
        """
        assert self.leader is None and other.leader is None
        others = other._parts()
        for name, part in self._parts().items():
            if isinstance(part, torch.Tensor):
                part[rows] = others[name]
            elif part is not None:
                part.write_(rows, others[name])

    def _parts(self) -> dict[str, Any]:
        """What the constructor takes, by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.init}

    def group_mean(self, rows: torch.Tensor) -> torch.Tensor:
        """[v, ..] the mean of `rows` [v, ..] over each request's group; `rows` itself without groups."""
        if self.group is None or self.group_size is None:
            return rows
        sums = add_by_owner_(torch.zeros_like(rows), self.group, rows)
        return (sums / self.group_size.view(-1, *[1] * (rows.ndim - 1)))[self.group]

    def all_in_group(self, flag: torch.Tensor) -> torch.Tensor:
        """[v] bool: true where `flag` [v] is true for every request of the same group."""
        return flag if self.group is None else self.group_mean(flag.float()) == 1.0

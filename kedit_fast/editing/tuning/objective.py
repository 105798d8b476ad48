"""The loss of requests as a function of the outputs of the tuned matrix: a sum of terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

import torch

from kedit_fast.editing.tuning.captured import CapturedRows
from kedit_fast.support.sums import add_by_owner_

Reduction = Literal["request", "published"]


class Term(Protocol):
    """A term of the loss, made for the rows of u requests."""

    places: torch.Tensor
    """[n] int64 on the head's device, the tokens among the N of the rows whose last states it takes; [0] for none."""

    def losses(self, outputs: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """[u] on the head's device, fp32 or fp64, differentiable in both.

        Args:
            outputs: [N, h] of the tuned matrix.
            states: [n, h] last states at `places`, on the head's device; logits where `Head.matrix` is None.
        """
        ...


class Losses(NamedTuple):
    """What the loss of u requests is, and what it is made of."""

    total: torch.Tensor
    """[u] the weighted sum of the terms."""
    terms: dict[str, torch.Tensor]
    """Name of a term -> its losses [u], without its weight."""


class Objective:
    """The loss of the requests of some rows.

    Args:
        captured: the rows, of requests 0 to u - 1.
        terms: name -> the term.
        weights: name -> factor of the term; 1 for those that are not named.
    """

    def __init__(self, captured: CapturedRows, terms: Mapping[str, Term], weights: Mapping[str, float] | None = None):
        self.captured, self.terms, self.weights = captured, dict(terms), dict(weights or {})
        places = [term.places for term in self.terms.values()]
        self._counts = [len(part) for part in places]
        joined = torch.cat(places)
        self._wanted, inverse = torch.unique(joined, return_inverse=True)
        plain = len(self._wanted) == len(joined) and bool((joined[1:] > joined[:-1]).all())
        self._back = None if plain else inverse
        wanted, ends = self._wanted.tolist(), captured.offsets[1:]
        counts, row = [0] * len(captured.rows), 0
        for place in wanted:  # in increasing order, so the last one of a row counts
            while place >= ends[row]:
                row += 1
            counts[row] = place + 1 - captured.offsets[row]
        self._rows, self._tokens = captured, None
        if wanted:
            self._rows, self._tokens = captured.up_to(counts)
        if self._tokens is not None:  # the places among the tokens that run
            number = torch.full((ends[-1],), -1, device=self._tokens.device)
            number[self._tokens] = torch.arange(len(self._tokens), device=number.device)
            self._wanted = number[self._wanted.to(number.device)]

    def losses(self, outputs: torch.Tensor) -> Losses:
        """The losses at outputs [N, h] of the tuned matrix, differentiable in them.

        Cost: one pass of the blocks above the layer, over the tokens up to the last place in each row; the head on the
            places alone.
        """
        if len(self._wanted):
            run = outputs if self._tokens is None else outputs.index_select(0, self._tokens)
            states = self._rows.hidden(run, self._wanted)
            states = states if self._back is None else states.index_select(0, self._back)
            parts = states.split(self._counts)
        else:
            parts = [outputs[:0]] * len(self._counts)
        losses = {
            name: term.losses(outputs, part) for (name, term), part in zip(self.terms.items(), parts, strict=True)
        }
        weighted = [
            loss if (weight := self.weights.get(name, 1.0)) == 1 else weight * loss for name, loss in losses.items()
        ]
        total = weighted[0]
        for loss in weighted[1:]:
            total = total + loss.to(total)
        return Losses(total, losses)

    def gradient(self, outputs: torch.Tensor) -> tuple[Losses, torch.Tensor]:
        """The losses, detached, and the gradient [N, h] of their mean over the requests by the outputs."""
        leaf = outputs.detach().requires_grad_(True)
        with torch.enable_grad():
            losses = self.losses(leaf)
            (gradient,) = torch.autograd.grad(losses.total.mean(), leaf)
        return Losses(losses.total.detach(), {name: part.detach() for name, part in losses.terms.items()}), gradient


class Likelihood:
    """The mean over a request's rows of -(1/T) sum_t log p(target_t): a `Term`.

    Args:
        captured: the rows, of requests 0 to u - 1.
        reduction: "request", as written; "published" divides by T + 1, as the code of WISE and MEMOIR does, whose mask
            begins one place early.
    """

    def __init__(self, captured: CapturedRows, reduction: Reduction = "request"):
        self.view, device = captured.view, captured.view.head.device
        scored = [(i, row) for i, row in enumerate(captured.rows) if row.target]
        count: dict[int, int] = {}
        for _, row in scored:
            count[row.request] = count.get(row.request, 0) + 1
        extra = int(reduction == "published")
        places, targets, owners, weights = [], [], [], []
        for i, row in scored:
            places += [captured.offsets[i] + place for place in row.places]
            targets += row.target
            owners += [row.request] * len(row.target)
            weights += [1 / (count[row.request] * (len(row.target) + extra))] * len(row.target)
        self.places = torch.tensor(places, dtype=torch.int64, device=device)
        self.targets = torch.tensor(targets, dtype=torch.int64, device=device)
        self.owners = torch.tensor(owners, dtype=torch.int64, device=device)
        self.weights = torch.tensor(weights, dtype=torch.float64, device=device)
        self.requests = len(captured)

    def losses(self, outputs: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """See `Term.losses`."""
        log_prob = self.view.head.target_log_probs(states, self.targets).log_prob
        log_prob = log_prob if log_prob.dtype == torch.float64 else log_prob.float()
        none = torch.zeros(self.requests, dtype=log_prob.dtype, device=log_prob.device)
        return add_by_owner_(none, self.owners, -log_prob * self.weights.to(log_prob))

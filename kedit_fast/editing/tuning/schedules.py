"""The order of steps: a request after another, each to its stop, or epochs of mini-batches of all requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kedit_fast.editing.tuning.captured import CapturedRows
from kedit_fast.editing.tuning.objective import Objective
from kedit_fast.editing.tuning.stop_rules import StopRule
from kedit_fast.errors import EditError

NOT_FINITE = "the loss of its target is not finite; is the model's output finite there?"
DIVERGED = "steps left a loss or numbers that are not finite; is lr too large?"
PASS_TOKENS = {"cpu": 2048}
"""Type of a device -> tokens of one pass of a mini-batch; a larger one takes several, before one step."""
PASS_TOKENS_ELSEWHERE = 16384
"""Tokens of one pass on other devices."""


class Steppable(Protocol):
    """What is tuned: `matrix.TunedMatrix`, or one with the same methods."""

    @property
    def finite(self) -> torch.Tensor:
        """[] bool, whether every step so far left finite numbers."""
        ...

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [N, h] of inputs [N, d]."""
        ...

    def step(self, left: torch.Tensor, right: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """A step down the gradient left^T right; none where `active` [] is false."""
        ...

    def restart(self) -> None:
        """Begin with a new optimizer."""
        ...


@dataclass
class Descent:
    """How the steps of one request went."""

    losses: list[float] = field(default_factory=list)
    """The loss of each forward pass, in order; of the last one, without a step where a rule ended it there."""
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name of a term -> its losses [u] in the last pass."""
    steps: int = 0
    """Steps taken."""
    stopped: bool = False
    """Whether a rule ended it, and not the number of steps."""


class NotFiniteError(EditError):
    """A loss is not finite, or a step left a number that is not.

    Args:
        message: what is wrong.
        steps: steps that were taken before.
    """

    def __init__(self, message: str, steps: int = 0):
        super().__init__(message)
        self.steps = steps


def descend(
    matrix: Steppable,
    x: torch.Tensor,
    objective: Objective,
    stop: StopRule,
    most: int,
    at_end: Callable[[torch.Tensor], object] | None = None,
    outputs: Callable[[], torch.Tensor] | None = None,
) -> Descent:
    """Steps on the rows of one request, or of several with their mean loss.

    Args:
        matrix: what is tuned.
        x: [N, d] the inputs.
        objective: their loss.
        stop: when it ends before the last step.
        most: steps at most.
        at_end: called once with the outputs [N, h] where the loop ends: where a rule ends it, or before the last of
            `most` steps. WISE takes its threshold there.
        outputs: makes the layer's outputs [N, h] from the matrix as it is; None for `matrix.outputs(x)`.

    Raises:
        NotFiniteError: a loss that is not finite; the matrix has steps of this request in it.

    Cost: a product and a pass of the blocks above the layer, forward and backward, for each step; the host reads one
        number for each.
    """
    result = Descent()
    taken: list[float] = []
    for iteration in range(most):
        current = matrix.outputs(x) if outputs is None else outputs()
        ends = stop.before(taken)
        if at_end is not None and (ends or iteration == most - 1):
            at_end(current)
        if ends:
            result.stopped = True
            break
        leaf = current.detach().requires_grad_(True)
        with torch.enable_grad():
            losses = objective.losses(leaf)
            total = losses.total.mean()
            loss = float(total.detach())
            result.losses.append(loss)
            result.terms = {name: part.detach() for name, part in losses.terms.items()}
            if not torch.isfinite(total.detach()):
                raise NotFiniteError(NOT_FINITE if not taken else DIVERGED, len(taken))
            if stop.after(loss):
                result.stopped = True
                break
            (left,) = torch.autograd.grad(total, leaf)
        matrix.step(left, x)
        taken.append(loss)
        result.steps += 1
    if not bool(matrix.finite):
        raise NotFiniteError(DIVERGED, len(taken))
    return result


@dataclass
class Epochs:
    """How breadth-first steps went."""

    losses: list[float]
    """The loss of each request at its last forward pass, by its index."""
    steps: list[int]
    """The steps that a request took part in, by its index."""
    means: list[float]
    """The mean loss of each epoch."""


def epochs(
    matrix: Steppable,
    captured: CapturedRows,
    objective_of: Callable[[CapturedRows], Objective],
    *,
    most: int,
    minibatch: int,
    stop_loss: float,
    seed: int | str,
    requests: Sequence[int] | None = None,
    seen: Callable[[int], object] | None = None,
) -> Epochs:
    """Breadth-first: epochs of mini-batches of all requests, in an order of its own each.

    A mini-batch whose mean loss is below `stop_loss` takes no step, and an epoch whose mean over all requests is below
    it is the last. The host reads losses once an epoch.

    Args:
        matrix: what is tuned; its optimizer goes on from mini-batch to mini-batch.
        captured: the rows of requests, by index.
        objective_of: the loss of some of the rows.
        most: epochs at most.
        minibatch: requests of a mini-batch; the last one of an epoch is smaller.
        stop_loss: see above.
        seed: of the orders: the same seed gives the same order on every machine.
        requests: the requests that take part; None for all.
        seen: called with the number of an epoch that is done.

    Raises:
        NotFiniteError: a loss or a step that is not finite.

    Source: LocFT-BF (arXiv 2509.22072), its released `fine-tune.py`. There the order is unseeded.
    """
    chosen = list(captured.requests if requests is None else requests)
    order = random.Random(seed)
    count = 1 + max(chosen, default=-1)
    result = Epochs([float("nan")] * count, [0] * count, [])
    for epoch in range(most):
        order.shuffle(chosen)
        parts = [chosen[i : i + minibatch] for i in range(0, len(chosen), minibatch)]
        stepped, losses = [], []
        for part in parts:
            loss, left, x = gradient_of(matrix, captured, part, objective_of)
            active = loss.mean() >= stop_loss
            matrix.step(left, x, active)
            stepped.append(active)
            losses.append(loss)
        values = torch.cat(losses).tolist()  # the host waits here
        for part, active in zip(parts, torch.stack(stepped).tolist(), strict=True):
            for request in part:
                result.steps[request] += int(active)
        for request, loss in zip((request for part in parts for request in part), values, strict=True):
            result.losses[request] = loss
        mean = sum(values) / len(values)
        result.means.append(mean)
        if not (abs(mean) < float("inf") and bool(matrix.finite)):
            raise NotFiniteError(f"epoch {epoch + 1}: {DIVERGED}", epoch + 1)
        if seen is not None:
            seen(epoch + 1)
        if mean < stop_loss:
            break
    return result


def gradient_of(
    matrix: Steppable,
    captured: CapturedRows,
    requests: Sequence[int],
    objective_of: Callable[[CapturedRows], Objective],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses [v] of v requests, and the gradient of their mean as factors: left [N, h] and inputs [N, d].

    Requests with many tokens run in several passes, which changes rounding alone.
    """
    losses, lefts, inputs = [], [], []
    for part in in_passes(captured, requests):
        rows = captured.of_requests(part)
        loss, left = objective_of(rows).gradient(matrix.outputs(rows.x))
        losses.append(loss.total)
        lefts.append(left * (len(part) / len(requests)) if len(part) != len(requests) else left)
        inputs.append(rows.x)
    if len(losses) == 1:
        return losses[0], lefts[0], inputs[0]
    return torch.cat(losses), torch.cat(lefts), torch.cat(inputs)


def in_passes(captured: CapturedRows, requests: Sequence[int]) -> list[list[int]]:
    """Requests in parts of at most `PASS_TOKENS` tokens, or one request."""
    most = PASS_TOKENS.get(captured.x.device.type, PASS_TOKENS_ELSEWHERE)
    tokens = captured.tokens
    parts: list[list[int]] = []
    size = most + 1
    for request in requests:
        if size + tokens[request] > most:
            parts.append([])
            size = 0
        parts[-1].append(request)
        size += tokens[request]
    return parts

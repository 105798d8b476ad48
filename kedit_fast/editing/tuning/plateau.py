"""Steps on one request until its loss is small and no longer changes, as WISE and MEMOIR stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kedit_fast.editing.tuning.matrix import TunedMatrix
from kedit_fast.editing.tuning.objective import Objective

LEARNED = math.log(2)
"""A target is learned when its mean loss is at most this: its tokens have, in the geometric mean, a probability of a
half or more."""


@dataclass(frozen=True)
class Ending:
    """How the steps on one request ended."""

    steps: int
    """Steps that were taken."""
    loss: float
    """The loss at the last pass, which came before the last step or, after a stop, before the one before it."""
    likelihood: float
    """The part of it that is the target's."""
    outputs: torch.Tensor
    """[N, h] of the tuned layer: before the last step; at a stop, after it."""

    @property
    def learned(self) -> bool:
        """Whether the target became likely."""
        return self.likelihood <= LEARNED


def until_plateau(
    objective: Objective,
    matrix: TunedMatrix,
    x: torch.Tensor,
    outputs: Callable[[], torch.Tensor],
    num_steps: int,
    stop_loss: float,
    stop_change: float,
) -> Ending:
    """Tune a matrix on one request.

    A stop is decided before a pass, by the two losses before it: the last one is at most `stop_loss`, and differs from
    the one before by at most `stop_change`. Otherwise every one of `num_steps` iterations takes a step.

    Args:
        objective: the loss of the request; its term "likelihood" is the target's.
        matrix: what is tuned.
        x: [N, d] inputs of the matrix.
        outputs: makes the layer's outputs [N, h] from the matrix as it is.
        num_steps: iterations at most.
        stop_loss: see above.
        stop_change: see above.

    Source: WISE's released `EarlyStopMeter`; the loss that the release computes after the decision is not computed.
    """
    matrix.restart()
    before_last, last, likelihood = 0.0, math.inf, math.inf
    result = outputs()
    for step in range(num_steps):
        if abs(last - before_last) <= stop_change and last <= stop_loss:
            return Ending(step, last, likelihood, result)
        losses, gradient = objective.gradient(result)
        before_last, last = last, float(losses.total[0])
        likelihood = float(losses.terms["likelihood"][0])
        matrix.step(gradient, x)
        if step < num_steps - 1:
            result = outputs()
    return Ending(num_steps, last, likelihood, result)

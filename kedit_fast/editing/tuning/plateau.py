"""Steps on one request until its loss is small and no longer changes, as WISE and MEMOIR stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kedit_fast.editing.tuning.matrix import TunedMatrix
from kedit_fast.editing.tuning.objective import Objective
from kedit_fast.editing.tuning.schedules import NotFiniteError, descend
from kedit_fast.editing.tuning.stop_rules import Plateau

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

    See `stop_rules.Plateau` for its end. Where a loss or a step is not finite, the losses of the ending are NaN.

    Args:
        objective: the loss of the request; its term "likelihood" is the target's.
        matrix: what is tuned.
        x: [N, d] inputs of the matrix.
        outputs: makes the layer's outputs [N, h] from the matrix as it is.
        num_steps: iterations at most.
        stop_loss: see above.
        stop_change: see above.

    Source: WISE's released `EarlyStopMeter`.
    """
    matrix.restart()
    ends: list[torch.Tensor] = []
    rule = Plateau(stop_loss, stop_change)
    try:
        descent = descend(matrix, x, objective, rule, num_steps, ends.append, outputs)
    except NotFiniteError as error:
        return Ending(error.steps, math.nan, math.nan, ends[0] if ends else outputs())
    return Ending(descent.steps, descent.losses[-1], float(descent.terms["likelihood"][0]), ends[0])
